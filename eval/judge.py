"""Training of the judge that scores clips of the rendered world: `python -m eval.judge --out judge.safetensors`."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eval.reading import ATTRIBUTES, ClipReading, Judge, load_judge, read_clip, read_path, tracks
from model import UserError
from sampling import decode, derived_seed, encode_videos
from train.pretrain import pretrain
from train.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    WORLD_MOTIONS,
    Scenes,
    make_scenes,
    random_scenes,
    render,
)
from weights import Base, atomic_write, load_base, parse_settings, read_json, run_command, write_json
from weights.folders import locked

__all__ = ["ClipReading", "Judge", "JudgeSettings", "load_judge", "read_clip", "train_judge"]

MIRRORED = {"moving left": "moving right", "circling clockwise": "circling counterclockwise"}


@dataclass(kw_only=True)
class JudgeSettings:
    """How the judge is trained.

    Args:
        out: the file to write, .safetensors; beside it lies a folder .run while the training is not done.
        steps: of the part that reads frames.
        batch_size: frames of a step, half of them with looks that the base never saw: these train the mask alone.
        learning_rate: of AdamW, at its highest.
        clips: clips whose paths the part that reads motion is trained on.
        motion_steps: of that part.
        base: one whose autoencoder every fourth frame goes through, as all that the judge is for; not given: none does.
        seed: of everything random.
    """

    out: str
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 4e-3
    clips: int = 1500
    motion_steps: int = 1500
    base: str | None = None
    seed: int = 0


def train_judge(settings: JudgeSettings) -> Judge:
    """Train a judge, or go on where it was stopped, and write it in float16.

    Raises:
        UserError: settings out of range or other than those the training was begun with, or a file that cannot be
            written.
        KeyboardInterrupt: the training was stopped; the same command goes on.
    """
    if settings.steps < 1 or settings.batch_size < 16 or settings.clips < 1 or settings.motion_steps < 1:
        raise UserError("steps, clips and motion_steps must be at least 1, and batch_size at least 16")
    work = begin(settings)
    with locked(work):
        judge = trained(settings, work)
        state = {name: t.half() if t.is_floating_point() else t for name, t in judge.state_dict().items()}
        with atomic_write(settings.out) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
        shutil.rmtree(work)
    return load_judge(settings.out)


def trained(settings: JudgeSettings, work: Path) -> Judge:
    """A judge after both parts of its training, which go on from the states in `work`."""
    torch.manual_seed(settings.seed)
    judge = Judge().to(memory_format=torch.channels_last)
    vae = None if settings.base is None else load_base(settings.base, device="cpu").vae.eval()

    def seen(frames: Tensor, generator: torch.Generator) -> Tensor:
        if vae is not None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                decoded = vae.decode(vae.encode(frames[::4]).chunk(2, dim=1)[0])
            frames[::4] = decoded.float().clamp(-1, 1)
        return worn(frames, generator)

    def frame_loss(generator: torch.Generator) -> dict[str, Tensor]:
        half = settings.batch_size // 2
        times = torch.rand((half, 1), generator=generator)
        known, strange = random_scenes(half, generator, times), strange_scenes(half, generator, times)
        frames, masks = (torch.cat(pair)[:, :, 0] for pair in zip(render(known), render(strange), strict=True))
        frames = seen(frames, generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            reading = judge(frames)
        logits = reading.mask.float()
        cover, overlap = logits.sigmoid(), F.binary_cross_entropy_with_logits(logits, masks)
        dice = 1 - 2 * (cover * masks).sum(dim=(1, 2, 3)) / (cover + masks).sum(dim=(1, 2, 3))
        losses = {
            name: F.cross_entropy(getattr(reading, name)[:half].float(), getattr(known, name)) for name in ATTRIBUTES
        }
        return {**losses, "mask": 10 * overlap, "dice": dice.mean()}

    pretrain(
        judge,
        frame_loss,
        work / "frames",
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.02,
        seed=settings.seed,
    )
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "clips"))
    seen_tracks, motions = clip_tracks(judge, settings.clips, generator)

    def motion_loss(generator: torch.Generator) -> dict[str, Tensor]:
        picked = torch.randint(len(motions), (128,), generator=generator)
        noise = torch.randn((128, *seen_tracks.shape[1:]), generator=generator)
        wobbling = wobbled(seen_tracks, motions, picked, generator)
        return {"motion": F.cross_entropy(judge.motion(wobbling + 0.05 * noise), motions[picked])}

    pretrain(
        judge.motion.requires_grad_(True),
        motion_loss,
        work / "motion",
        steps=settings.motion_steps,
        learning_rate=2e-3,
        weight_decay=0.02,
        seed=settings.seed,
    )
    return judge


def begin(settings: JudgeSettings) -> Path:
    """The folder of an unfinished training, with folders for its two parts; other settings than there are refused."""
    work = Path(settings.out).with_suffix(".run")
    file, wanted = work / "settings.json", {k: v for k, v in asdict(settings).items() if k != "out"}
    if file.is_file() and read_json(file) != wanted:
        raise UserError(f"{work} was begun with other settings: give them again, delete it, or give --out a new name")
    write_json(file, wanted)
    for part in ("frames", "motion"):
        (work / part).mkdir(exist_ok=True)
    return work


def strange_scenes(count: int, generator: torch.Generator, times: Tensor) -> Scenes:
    """Scenes of any shape, texture and motion, held-out ones too, in two colours that have nothing to do with each
    other: what a person may bring. Times (count, f).
    """

    def pick(number: int) -> Tensor:
        return torch.randint(number, (count,), generator=generator)

    colour, background = random_scenes(count, generator, times[:, :1]).colour, pick(len(BACKGROUNDS))
    named = torch.tensor(list(COLOURS.values()))[pick(len(COLOURS))]
    free = torch.rand((count, 3), generator=generator)
    second = torch.where(torch.rand((count, 1), generator=generator) < 0.7, named, free)
    looks = (pick(len(SHAPES)), pick(len(TEXTURES)), colour, second, background)
    return make_scenes(*looks, pick(len(MOTIONS)), generator, times)


def worn(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Frames (n, 3, h, w) in [-1, 1] with what generated ones suffer from: blur, noise, wrong light and contrast."""

    def amount(high: float) -> Tensor:
        return high * torch.rand((len(frames), 1, 1, 1), generator=generator)

    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    frames = torch.lerp(frames, blurred, amount(1.0))
    coarse = F.interpolate(F.avg_pool2d(frames, 2), scale_factor=2, mode="bilinear")
    frames = torch.lerp(frames, coarse, amount(1.0))
    noise = torch.randn(frames.shape, generator=generator)
    frames = frames * (1 + amount(0.16) - 0.08) + amount(0.16) - 0.08 + noise * amount(0.08)
    return frames.clamp(-1, 1)


def worn_clips(videos: Tensor, generator: torch.Generator) -> Tensor:
    """The same for videos (n, 3, f, h, w): every frame differently."""
    frames = worn(videos.transpose(1, 2).flatten(0, 1), generator)
    return frames.unflatten(0, (len(videos), -1)).transpose(1, 2)


def clip_tracks(judge: Judge, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the motion head sees of `count` worn clips and of their mirror images: tracks, and numbers of motions."""
    parts = []
    for start in tqdm(range(0, count, 50), desc="paths", mininterval=2):
        scenes = random_scenes(min(50, count - start), generator)
        clip = read_clip(judge, worn_clips(render(scenes)[0], generator))
        mirrored = clip.path * torch.tensor([-1.0, 1.0, 1.0])
        parts += [
            (tracks(clip.path, clip.turning), scenes.motion),
            (tracks(mirrored, clip.turning), mirrored_motions()[scenes.motion]),
        ]
    seen, motions = zip(*parts, strict=True)
    return torch.cat(seen), torch.cat(motions)


def wobbled(seen: Tensor, motions: Tensor, picked: Tensor, generator: torch.Generator) -> Tensor:
    """The `picked` (n,) of the tracks `seen` (m, TRACKS, MOMENTS), with turning that tells spinning from resting alone.

    A rendered subject that travels never turns, so turning would tell spinning from everything; but generated ones
    wobble on their way. All other motions get the turning of a random clip that spins or rests.
    """
    stays = torch.isin(motions, torch.tensor([WORLD_MOTIONS.index(name) for name in ("spinning", "resting")]))
    if not stays.any():
        return seen[picked]
    donors = stays.nonzero().flatten()
    others = donors[torch.randint(len(donors), picked.shape, generator=generator)]
    sources = torch.where(stays[picked], picked, others)
    return torch.cat([seen[picked, :-1], seen[sources, -1:]], dim=1)


def mirrored_motions() -> Tensor:
    """For each of WORLD_MOTIONS the number of what it is in a mirror that swaps left and right."""
    swapped = MIRRORED | {b: a for a, b in MIRRORED.items()}
    return torch.tensor([WORLD_MOTIONS.index(swapped.get(name, name)) for name in WORLD_MOTIONS])


@torch.no_grad()
def judge_accuracy(
    judge: Judge, count: int = 240, seed: int = 1, change: Callable[[Tensor], Tensor] = torch.clone
) -> dict[str, float]:
    """How often `judge` is right about `count` fresh clips, and how near its masks are.

    Args:
        judge: reads the clips.
        count: clips, at least 1.
        seed: of the clips.
        change: what happens to clips (n, 3, f, 64, 64) before the judge sees them; as they were rendered, by default.

    Returns:
        Shares by attribute (clip by clip) and for "motion"; "frames", the share of single frames with all four
        attributes right; "centroid_px", the mean distance of centroids in pixels; "mask_iou"; and "strange_iou", of
        subjects with held-out looks.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "accuracy"))
    scenes = random_scenes(count, generator)
    videos, masks = render(scenes)
    true_path, _ = read_path(videos, masks)
    videos = change(videos)
    clip = read_clip(judge, videos)
    found = {
        name: (getattr(clip, name).argmax(dim=1) == getattr(scenes, name)).float().mean().item()
        for name in (*ATTRIBUTES, "motion")
    }
    single = judge(videos[:, :, 5])
    right = [getattr(single, name).argmax(dim=1) == getattr(scenes, name) for name in ATTRIBUTES]
    found["frames"] = torch.stack(right).all(dim=0).float().mean().item()
    found["centroid_px"] = (clip.path - true_path)[..., :2].norm(dim=-1).mean().item() * videos.shape[-1]
    found["mask_iou"] = overlap(clip.masks, masks)
    videos, masks = render(strange_scenes(count, generator, torch.linspace(0, 1, 2).expand(count, 2)))
    found["strange_iou"] = overlap(read_clip(judge, change(videos)).masks, masks)
    return found


def through_vae(base: Base, videos: Tensor) -> Tensor:
    """Videos (n, 3, f, h, w) in [-1, 1] as they come back from the base's autoencoder, without noise, on the CPU."""
    return decode(base, encode_videos(base, videos).mean).transpose(1, 2)


def overlap(masks: Tensor, others: Tensor) -> float:
    """Mean intersection over union of masks of one shape, their pixels in the last two dimensions."""
    shared, either = torch.minimum(masks, others).sum(dim=(-2, -1)), torch.maximum(masks, others).sum(dim=(-2, -1))
    return (shared / either.clamp_min(1e-6)).mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m eval.judge`."""
    about = "Train the judge that scores clips of the rendered world, and say how often it is right on fresh ones."
    settings = parse_settings(JudgeSettings, argv, prog="python -m eval.judge", description=about)
    judge = train_judge(settings)
    wear = torch.Generator().manual_seed(derived_seed(settings.seed, "wear"))
    seen = {"rendered": judge_accuracy(judge), "worn": judge_accuracy(judge, change=lambda v: worn_clips(v, wear))}
    if settings.base is not None:
        base = load_base(settings.base, device="cpu")
        seen["decoded"] = judge_accuracy(judge, change=lambda videos: through_vae(base, videos))
    print(" " * 12 + "".join(f"{name:>10}" for name in seen))
    for name in seen["rendered"]:
        print(f"{name:12}" + "".join(f"{found[name]:10.4f}" for found in seen.values()))


if __name__ == "__main__":
    run_command(main)
