"""The recipe of the tiny base: four networks trained from nothing on the rendered world, `python -m train.tiny`.

Stages, in this order: `clip` (text encoder and scorer, contrastively), `vae` (the autoencoder), `image` (the spatial
UNet, on single frames), `video` (motion modules, on clips, with the spatial part frozen except for the keys and values
of its text: AnimateDiff, section 4). What they give is written in the layouts that `load_base` reads.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from model import (
    TINY,
    AutoencoderKL,
    LatentDistribution,
    NoiseSchedule,
    UNet3D,
    UserError,
)
from sampling import derived_seed
from train.losses import noise_weights, skewed_timesteps
from train.pretrain import pretrain
from train.tiny_parts import (
    LENGTH,
    RECIPE,
    SCALE,
    SPARE,
    VAE,
    WORDLESS,
    clip_config,
    encoded,
    folder_of,
    keep_settings,
    load_trained,
    measured_scale,
    nameless,
    picking_weights,
    random_captions,
    recoloured,
    single_frames,
    spoken_tokens,
    started,
    tokens_of,
    trained_clip,
    trained_text,
    trained_vae,
    with_spare_words,
    word_loss,
)
from train.vocabulary import write_tokenizer
from train.world import SHAPES, random_scenes, render
from weights import parse_settings, run_command, write_json
from weights.device import choose_device
from weights.folders import locked
from weights.save import save_base

INSIDE = 6.0  # a pixel inside the subject counts so much more than one of the background
MANY_COLOURED = 12  # of the autoencoder's 16 frames a step have a second colour that is not the first's shade
KL = 3e-4  # of the KL divergence per latent, against the error per pixel
# Timesteps are 1000 u ** skew, u even in [0, 1); the second number is noise_weights' power. Where a subject goes is
# decided where nearly all is noise: with the image stage's numbers 2,500 steps of clips did not tell left from right.
FOCUS = {"image": (1.0, 0.5), "video": (0.5, 1.0)}
BUILDS_ON = {"image": ("clip", "vae"), "video": ("clip", "vae", "image")}


@dataclass(kw_only=True)
class TinySettings:
    """How the tiny base is trained.

    Args:
        out: folder for the stages' states and logs, and for the finished base in base/.
        stage: one of the four (those before it must be done), or all that are not done yet.
        start: folder of a tiny base whose weights the stages go on from, or "tiny"; not given: from random ones. A
            stage of 0 steps keeps them.
        device: "cuda", "cpu"; not given: CUDA if there is one.
        seed: of everything random.
        clip_steps: batches of 96 frames with their captions.
        vae_steps: batches of 16 frames.
        image_steps: batches of 64 frames.
        video_steps: batches of 4 clips.
        frames: frames encoded ahead for the image stage.
        clips: clips encoded ahead for the video stage.
    """

    out: str = "tiny"
    stage: Literal["all", "clip", "vae", "image", "video"] = "all"
    start: str | None = None
    device: str | None = None
    seed: int = 0
    clip_steps: int = 1800
    vae_steps: int = 4600
    image_steps: int = 15000
    video_steps: int = 8000
    frames: int = 24576
    clips: int = 2048


def train_tiny(settings: TinySettings) -> Path:
    """Run the stages that `settings.stage` names and, after the last one, write the base.

    Returns the folder of the base, or of the single stage. Raises UserError for an --out of another run, a stage whose
    forerunners are not done, or a loss that is not finite; KeyboardInterrupt where it was stopped: it can go on.
    """
    out = Path(settings.out)
    _begin(out, settings)
    stages = {"clip": train_clip, "vae": train_vae, "image": train_image, "video": train_video}
    for name, stage in stages.items():
        if settings.stage in ("all", name):
            _check_order(out, name)
            with locked(out / name):
                stage(out, settings)
    if settings.stage not in ("all", "video"):
        return out / settings.stage
    unet, clip = load_trained(out / "video", UNet3D(TINY)), trained_clip(out)
    save_base(out / "base", unet, trained_vae(out), trained_text(out), out / "tokenizer", RECIPE, clip=clip)
    return out / "base"


def train_clip(out: Path, settings: TinySettings) -> None:
    """Frames and captions, matched within batches of 96 (CLIP, section 2.3), and captions kept word by word.

    In a batch hardly two captions differ in one word alone. Matching so has no use for left and right, or circle and
    square, and its text states of them come to be nearly the same: a UNet that reads those cannot tell them apart.
    """
    size = write_tokenizer(out / "tokenizer", LENGTH)
    torch.manual_seed(derived_seed(settings.seed, "clip"))
    clip = CLIPModel(clip_config(size))
    # drawn as small as CLIP does, words that matching has no use for stay as near each other as they begin
    nn.init.normal_(clip.text_model.embeddings.token_embedding.weight, std=clip.config.text_config.hidden_size**-0.5)
    clip = started(clip, settings.start, "clip").to(choose_device(settings.device))
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer", local_files_only=True)
    table = clip.text_model.embeddings.token_embedding.weight
    spoken = spoken_tokens(tokenizer).to(clip.device)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        scenes = single_frames(96, generator)
        frames, _ = render(scenes)
        tokens = tokens_of(tokenizer, random_captions(scenes, generator)).to(clip.device)
        seen = clip(tokens, frames[:, :, 0].to(clip.device))
        logits, match = seen.logits_per_text, torch.arange(len(tokens), device=clip.device)
        return {
            "contrast": (F.cross_entropy(logits, match) + F.cross_entropy(logits.T, match)) / 2,
            "words": word_loss(seen.text_model_output.last_hidden_state, tokens, table, spoken),
        }

    pretrain(
        clip,
        loss,
        out / "clip",
        steps=settings.clip_steps,
        learning_rate=1e-3,
        weight_decay=0.02,
        seed=settings.seed,
    )


def train_vae(out: Path, settings: TinySettings) -> None:
    """Frames to latents and back; pixels of the subject weigh seven times as much as the background's.

    Without that weight a short training learns the background, and drops the subject. Most frames have a second
    colour as no caption tells it: an autoencoder that has only seen darkened firsts paints every other one black, and
    no LoRA could mend that. Latents of the others stay near those of --start, whose UNet knows them.
    """
    device = choose_device(settings.device)
    torch.manual_seed(derived_seed(settings.seed, "vae"))
    vae = started(AutoencoderKL(VAE), settings.start, "vae").to(device)
    before = copy.deepcopy(vae).eval().requires_grad_(False) if settings.start else None

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        scenes = recoloured(single_frames(16, generator), MANY_COLOURED, generator)
        frames, mask = (part[:, :, 0].to(device) for part in render(scenes))
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = vae.encode(frames).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            noise = torch.randn(mean.shape, generator=generator).to(device)
            decoded = vae.decode(mean + torch.exp(0.5 * log_variance) * noise).float()
            known = before.encode(frames[MANY_COLOURED:]).float().chunk(2, dim=1)[0] if before else None
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        difference = decoded - frames
        losses = {
            "pixels": ((difference.abs() + 2 * difference.square()) * (1 + INSIDE * mask)).mean(),
            "kl": KL * kl.mean(),
        }
        if known is not None:
            losses["moved"] = F.mse_loss(mean[MANY_COLOURED:], known)
        return losses

    pretrain(vae, loss, out / "vae", steps=settings.vae_steps, learning_rate=1.5e-3, seed=settings.seed)
    if not (out / "vae" / SCALE).is_file():
        write_json(out / "vae" / SCALE, {"scaling_factor": measured_scale(vae, device)})


def train_image(out: Path, settings: TinySettings) -> None:
    """The spatial UNet learns to denoise single frames, as Stable Diffusion's (CustomTTT's motion=False)."""
    torch.manual_seed(derived_seed(settings.seed, "image"))
    unet = started(UNet3D(dataclasses.replace(TINY, motion=None)), settings.start, "unet")
    _train_unet(out, settings, "image", unet, 64, settings.image_steps, [(list(unet.parameters()), 1.0)])


def train_video(out: Path, settings: TinySettings) -> None:
    """Motion modules learn clips; of the spatial part only the keys and values of the text move with them.

    Motion modules see no text, and where a single frame does not tell the motion (growing, resting), the frozen
    spatial part has nothing to hand on to them: its text keys and values learn to.
    """
    torch.manual_seed(derived_seed(settings.seed, "video"))
    unet = UNet3D(TINY)
    for name, module in unet.named_modules():
        if ".temporal." in name and name.endswith("proj_out") and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    unet = started(unet, settings.start, "unet")
    spatial = load_trained(out / "image", UNet3D(dataclasses.replace(TINY, motion=None)))
    unet.load_state_dict(spatial.state_dict(), strict=False)
    text = ("attn2.to_k.weight", "attn2.to_v.weight")
    modules = [p for name, p in unet.named_parameters() if ".temporal." in name]
    moving = [p for name, p in unet.named_parameters() if ".spatial." in name and name.endswith(text)]
    # what is there already, and sees four captions a step instead of 64, must not be learnt anew
    _train_unet(out, settings, "video", unet, 4, settings.video_steps, [(modules, 1.0), (moving, 0.2)])


def _train_unet(
    out: Path,
    settings: TinySettings,
    stage: str,
    unet: UNet3D,
    batch: int,
    steps: int,
    trained: list[tuple[list[nn.Parameter], float]],
) -> None:
    """Noise prediction on latents encoded ahead, with captions of which one in ten is empty (DDPM, algorithm 1)."""
    device = choose_device(settings.device)
    unet.requires_grad_(False).to(device)
    for parameter in (p for group, _ in trained for p in group):
        parameter.requires_grad_(True)
    text, schedule = trained_text(out).to(device), NoiseSchedule()
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer", local_files_only=True)
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, stage, "scenes"))
    clips, (skew, power) = stage == "video", FOCUS[stage]
    scenes = random_scenes(settings.clips, generator) if clips else single_frames(settings.frames, generator)
    scenes = nameless(scenes, round(WORDLESS * len(scenes)), generator)
    weights = picking_weights(scenes) if clips else torch.ones(len(scenes))
    latents = encoded(out, stage, scenes, device)

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        picked = torch.multinomial(weights, batch, replacement=True, generator=generator)
        chosen = LatentDistribution(latents.mean[picked].float(), latents.std[picked].float())
        clean = chosen.sample(torch.randn(chosen.mean.shape, generator=generator)).to(device)
        wordless = scenes.shape[picked] >= len(SHAPES)
        prompts = with_spare_words(random_captions(scenes[picked], generator), SPARE[stage], wordless, generator)
        dropped = torch.rand(batch, generator=generator) < 0.1
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        with torch.no_grad():
            embedded = text(tokens_of(tokenizer, prompts).to(device))
        timesteps = skewed_timesteps(batch, skew, schedule.num_train_timesteps, generator)
        noise = torch.randn(chosen.mean.shape, generator=generator).to(device)
        noisy = schedule.add_noise(clean, noise, timesteps)
        prediction = unet(noisy, timesteps.to(device), embedded, motion=clips)
        error = (prediction - noise).square().flatten(1).mean(dim=1)
        return {"noise": (noise_weights(schedule, timesteps, power).to(device) * error).mean()}

    pretrain(unet, loss, out / stage, steps=steps, learning_rate=1e-3, seed=settings.seed, trained=trained)


def _check_order(out: Path, stage: str) -> None:
    """A stage must not be trained anew under those that were built on it."""
    built = [later for later in BUILDS_ON if stage in BUILDS_ON[later] and (out / later / "state.pt").is_file()]
    if built and not (out / stage / "state.pt").is_file():
        raise UserError(f"{out}: {' and '.join(built)} built on another {stage}: delete their folders first")


def _begin(out: Path, settings: TinySettings) -> None:
    """Write down the settings, or refuse to go on under others."""
    record = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "stage", "device")}
    counts = {name: value for name, value in record.items() if name.endswith(("_steps", "frames", "clips"))}
    least = {name: int(settings.start is None or not name.endswith("_steps")) for name in counts}
    if low := [name for name, value in counts.items() if value < least[name]]:
        raise UserError(f"{', '.join(low)} must be at least 1 (with --start, steps may be 0: its weights as they are)")
    if settings.start is not None and not (folder_of(settings.start) / "clip" / "config.json").is_file():
        raise UserError(f"{settings.start} is no tiny base: it has no clip/ folder")
    keep_settings(out, record)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m train.tiny`."""
    about = "Train the tiny base on the rendered world: all stages, or one."
    print(train_tiny(parse_settings(TinySettings, argv, prog="python -m train.tiny", description=about)))


if __name__ == "__main__":
    run_command(main)
