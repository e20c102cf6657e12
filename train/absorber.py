"""Appearance absorbers: stage 1 of Customize-A-Video, which takes a clip's looks off the motion LoRA's hands.

python -m train.absorber --base sd15.safetensors --motion_module v3_sd15_mm.ckpt --video jogging.mp4
    --prompt "a <look> man" --initializer man --out runs/jogging-looks
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import layers_with
from model import LatentDistribution, UserError
from sampling import derived_seed, encode, encode_videos
from sampling.media import check_size
from train.data import clip_files, read_clip
from train.folder import RunFolder
from train.losses import noise_loss
from train.settings import AdapterSettings, ClipSettings, filled
from train.stage import draw, predict, run_stage, train_adapter
from weights import Base, Embedding, learned_tokens, open_base, parse_settings, run_command, save_embedding, with_source
from weights.detect import TOKEN_FILE
from weights.embeddings import is_known
from weights.lora import FILE_NAME
from weights.tokenizer import composed, contains, tokenize

NAME = "absorber"  # of its adapter
RESULTS = {"lora": (FILE_NAME,), "token": (TOKEN_FILE,), "dual": (TOKEN_FILE, FILE_NAME)}  # files of a finished run
UNUSED = {  # what a kind does without, and the settings that belong to it
    "token": ("LoRA", ("rank", "layers", "targets", "dropout", "learning_rate")),
    "lora": ("token", ("token", "initializer", "vectors", "token_learning_rate")),
}
TOKEN_RATE = 0.01  # of the spread of CLIP's vectors: what Lion moves each number by in a step


@dataclass(kw_only=True)
class AbsorberSettings(AdapterSettings, ClipSettings):
    """Stage 1 of Customize-A-Video: the looks of a clip, to be left out of its motion LoRA.

    Args:
        video: any video, or a folder of frames.
        prompt: what it looks like, without its motion ("a <look> man"); the token stands for what words do not say.
        kind: lora (on the spatial transformers), token (a word that is learned, the networks frozen), or dual: both,
            learned together, the paper's best.
        token: the word that is learned; it must be in the prompt, and must not if the kind is lora.
        initializer: word whose vector the token starts from ("man").
        vectors: of the token, which so takes the place of several words.
        token_learning_rate: of the token's vectors; not given: a hundredth of the spread of the numbers in CLIP's
            (about 1.4e-4 for Stable Diffusion).
        layers: layers of the nine that the LoRA is on; not given: all.
        learning_rate: of the LoRA; not given: the base's for looks (1e-5).
        steps: training steps; not given: the base's for looks (500).
        num_frames: frames of the video to take crops of; not given: the base's (16).
        batch_size: crops in a step; not given: the base's (1).
        crops: random crops of random frames, encoded before the first step.
        crop_from: height and width of the smallest crop, as a share of the frame's.
        crop_to: the same of the largest.
    """

    kind: Literal["lora", "token", "dual"] = "dual"
    token: str = "<look>"
    initializer: str | None = None
    vectors: int = 1
    token_learning_rate: float | None = None
    crops: int = 200
    crop_from: float = 0.33
    crop_to: float = 0.67


def train_absorber(settings: AbsorberSettings, base: Base | None = None) -> Path:
    """Train a spatial LoRA, a token, or both on a clip's frames in random order (Customize-A-Video, stage 1).

    The motion modules are bypassed, so that nothing of the motion gets in; random crops keep out where things are.

    Args:
        settings: of the run.
        base: one that is loaded already; None loads what the settings name.

    Returns:
        The run's folder, which `train.motion --absorbers` takes; at once, if the run was finished before.

    Raises:
        UserError: bad settings or files, an --out of another run, or a loss that is not finite.
    """
    warn_of_unused(settings)
    check_settings(settings)
    folder, inputs = RunFolder(settings.out, RESULTS[settings.kind]), clip_files(settings.video)
    settings = with_source(settings, base)
    if folder.is_done(settings, inputs):
        return folder.path

    base = base or open_base(settings)
    full = with_defaults(settings, base)
    token = None if full.kind == "lora" else first_vectors(base, full)
    with learned_tokens(base, [token] if token else []):
        crops = encode_videos(base, random_crops(full)[:, :, None])
        fixed = encode(base, [full.prompt]) if token is None else None

        def losses(step: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
            i = torch.randint(full.crops, (full.batch_size,), generator=generator)
            latents = draw(LatentDistribution(crops.mean[i], crops.std[i]), generator)
            text = encode_with_gradients(base, full.prompt) if fixed is None else fixed
            text = text.expand(full.batch_size, -1, -1)
            pair = predict(base.unet, base.schedule, latents, text, generator, motion=False, skew=full.timestep_skew)
            yield "loss", noise_loss(*pair)

        if full.kind == "token":
            run_stage(base, {}, losses, full, folder, inputs, token=token)
        else:
            train_adapter(base, NAME, "spatial", losses, full, folder, inputs, token=token)
    return folder.path


def encode_with_gradients(base: Base, prompt: str) -> Tensor:
    """Embeddings (1, n, d) of the prompt, through which gradients reach a learned token."""
    return base.text(base.tokens([prompt])).to(base.unet.device, base.unet.dtype)


def random_crops(settings: Any) -> Tensor:
    """Random crops of random frames, of the frame's own shape: (crops, 3, height, width) in [-1, 1].

    Sides are from crop_from to crop_to of the frame's, which is read at twice the size that crops come out at.

    Raises:
        UserError: a video that cannot be read or is too short, or a size that does not divide by 8.
    """
    height, width = settings.height, settings.width
    check_size(height, width)
    clip = (settings.num_frames, 2 * height, 2 * width, settings.fps, settings.frame_step, settings.start)
    frames = read_clip(settings.video, *clip)
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "crops"))
    crops = []
    for _ in range(settings.crops):
        frame = frames[torch.randint(len(frames), (), generator=generator)]
        share, down, right = torch.rand(3, generator=generator).tolist()
        side = settings.crop_from + share * (settings.crop_to - settings.crop_from)
        h, w = max(1, round(side * 2 * height)), max(1, round(side * 2 * width))
        top, left = round(down * (2 * height - h)), round(right * (2 * width - w))
        crop = frame[None, :, top : top + h, left : left + w]
        crops.append(F.interpolate(crop, (height, width), mode="bicubic", antialias=True).clamp(-1, 1))
    return torch.cat(crops)


def first_vectors(base: Base, settings: Any) -> Embedding:
    """The token before training: each of its vectors is that of the initial word.

    Raises:
        UserError: that word is more than one token to CLIP, or none; or the token is a word of CLIP's own, or one that
            a file could not hold.
    """
    numbers = base.tokenizer(settings.initializer, add_special_tokens=False)["input_ids"]
    if len(numbers) != 1:
        raise UserError(
            f"the initializer {settings.initializer!r} is {len(numbers)} tokens to CLIP: take a plain word that is one"
        )
    places = base.text.config.max_position_embeddings - 2
    taken = min(settings.vectors, places + 1)
    if len(tokenize(base.tokenizer, composed(settings.prompt), {settings.token: range(taken)})) > places:
        raise UserError(
            f"the prompt {settings.prompt!r} with {settings.vectors} vectors for {settings.token} does not fit into "
            f"the {places} tokens of the text encoder: fewer --vectors, or a shorter prompt"
        )
    row = base.text.clip.embeddings.token_embedding.weight[numbers[0]].detach().float()
    start = Embedding(settings.token, nn.Parameter(row.repeat(settings.vectors, 1)))
    if is_known(base, start.token):
        raise UserError(f"the token {start.token!r} is a word of CLIP's own: take another --token, such as <my-look>")
    try:  # a word that no file can hold should show before the training, not after
        with TemporaryDirectory() as folder:
            save_embedding(Path(folder) / TOKEN_FILE, start)
    except UserError as error:
        raise UserError(f"{start.token!r} would not be read as a token from its file: take another --token") from error
    return start


def warn_of_unused(settings: AbsorberSettings) -> None:
    """Say which settings are of what the kind does not learn: no refusal, since a run's settings.json has them all."""
    other, its = UNUSED.get(settings.kind, ("", ()))
    defaults = {field.name: field.default for field in fields(AbsorberSettings)}
    if unused := [name for name in its if getattr(settings, name) != defaults[name]]:
        names = " and ".join(unused)
        warnings.warn(f"--kind {settings.kind} learns no {other}: no effect of {names}", stacklevel=3)


def check_settings(settings: AbsorberSettings) -> None:
    """Raises UserError for numbers out of range, and for a token without a place or a start, or that is not learned."""
    if settings.crops < 1 or settings.vectors < 1 or not 0 < settings.crop_from <= settings.crop_to <= 1:
        raise UserError(
            "crops and vectors must be at least 1, and crop_from and crop_to between 0 and 1 and in this order: got "
            f"{settings.crops}, {settings.vectors}, {settings.crop_from} and {settings.crop_to}"
        )
    rate = settings.token_learning_rate
    if rate is not None and not 0 < rate <= 1:
        raise UserError(f"token_learning_rate must be above 0 and at most 1, and is {rate}")
    if settings.kind == "lora":
        if contains(settings.prompt, settings.token):
            raise UserError(
                f"the prompt {settings.prompt!r} holds the token {settings.token}, which --kind lora does not learn: "
                "leave it out, or take --kind dual"
            )
        return
    if not settings.initializer:
        raise UserError("give --initializer, a plain word for what is in the video (man, car), where the token starts")
    if not contains(settings.prompt, settings.token):
        raise UserError(
            f"the token {settings.token} is not in the prompt {settings.prompt!r}: write it where the looks belong "
            f"(a {settings.token} {settings.initializer})"
        )


def with_defaults(settings: AbsorberSettings, base: Base) -> Any:
    """The settings with the base's recipe for looks wherever nothing was asked for, on all layers."""
    recipe, table = base.recipe, base.text.clip.embeddings.token_embedding.weight
    return filled(
        settings,
        base,
        layers=list(layers_with(base.unet, "spatial")),
        steps=recipe.appearance_steps,
        learning_rate=recipe.appearance_learning_rate,
        batch_size=recipe.appearance_batch_size,
        token_learning_rate=TOKEN_RATE * table.float().std().item(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt absorber`."""
    about = "Learn the looks of a clip, so that its motion LoRA need not."
    settings = parse_settings(AbsorberSettings, argv, prog="customttt absorber", description=about)
    print(f"absorber: {train_absorber(settings)}")


if __name__ == "__main__":
    run_command(main)
