"""Stage 2 of CustomTTT: the motion of one video, in a LoRA on the motion modules of layers 2 and 5.

python -m train.motion --base sd15.safetensors --motion_module v3_sd15_mm.ckpt --video playguitar.mp4
    --prompt "a man is playing guitar" --out runs/guitar
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import LatentDistribution, UserError
from sampling import encode_videos
from train.absorbed import absorbed, at_work, encode_with, plain
from train.absorber_files import find_absorbers, warn_of_strangers
from train.data import clip_files, read_clip
from train.folder import RunFolder
from train.losses import motion_loss
from train.settings import AdapterSettings, ClipSettings, filled
from train.stage import draw, predict, train_adapter
from weights import Base, open_base, parse_settings, run_command, with_source

NAME = "motion"  # of the adapter


@dataclass(kw_only=True)
class MotionSettings(AdapterSettings, ClipSettings):
    """Stage 2: the motion of one video, or the one that several share.

    Args:
        prompt: what is to be seen in it ("a man is playing guitar").
        debiased: add MotionDirector's appearance-debiased term to the loss (our reading); false is the plain noise MSE.
        clip_frames: frames to read, of which a step sees num_frames in a row, from a random one on; not given:
            num_frames.
        absorbers: what holds the looks while the motion is learned (Customize-A-Video): run folders of train.absorber,
            LoRAs of any tool, textual-inversion files, or a DreamBooth checkpoint. Behind a colon stands a LoRA's
            strength if not 1, or a file's token if not its own. Tokens must be in the prompt.
        allow_partial: use what fits of absorbers' LoRA files that do not fit wholly.
        more_videos: other videos of the same motion; the absorbers are then one for each video, in this order.
        more_prompts: what is to be seen in those; not given: the prompt.
    """

    debiased: bool = True
    clip_frames: int | None = None
    absorbers: list[str] = field(default_factory=list)
    allow_partial: bool = False
    more_videos: list[str] = field(default_factory=list)
    more_prompts: list[str] = field(default_factory=list)


def train_motion(settings: MotionSettings, base: Base | None = None) -> Path:
    """Train dW_t on ordered clips with the full network (CustomTTT, section 3.1; Customize-A-Video, stage 2).

    Absorbers are on and frozen while it trains, and are not part of what is written.

    Args:
        settings: of the run.
        base: one that is loaded already; None loads what the settings name.

    Returns:
        The LoRA file; at once, if the run was finished before.

    Raises:
        UserError: bad settings or files, an --out of another run, or a loss that is not finite.
    """
    folder, inputs = RunFolder(settings.out), motion_files(settings)
    settings = with_source(settings, base)
    if folder.is_done(settings, inputs):
        return folder.lora

    base = base or open_base(settings)
    full = with_defaults(settings, base)
    videos = read_frames(settings, base)
    sides = find_absorbers(full.absorbers, len(videos))
    with absorbed(base, sides, full.allow_partial) as looks:
        prompts = [full.prompt, *(full.more_prompts or [full.prompt] * (len(videos) - 1))]
        texts = [encode_with(base, side, prompt) for side, prompt in zip(looks, prompts, strict=True)]
        clips = [encode_videos(base, frames.transpose(0, 1)[None]) for frames in videos]

        def losses(step: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
            i = int(torch.randint(len(clips), (), generator=generator)) if len(clips) > 1 else 0
            latents = draw(windows(clips[i], full.num_frames, full.batch_size, generator), generator)
            text = texts[i].expand(full.batch_size, -1, -1)
            with at_work(base.unet, looks[i], {NAME: 1.0}):
                pair = predict(base.unet, base.schedule, latents, text, generator, skew=full.timestep_skew)
                yield "loss", motion_loss(*pair, generator, full.debiased)

        words = (plain(full.prompt, looks[0]), "")
        return train_adapter(base, NAME, "temporal", losses, full, folder, inputs, words)


def windows(clip: LatentDistribution, length: int, count: int, generator: torch.Generator) -> LatentDistribution:
    """`count` stretches of `length` frames of a clip's latents, each from a random frame on."""
    spare = clip.mean.shape[2] - length
    starts = torch.randint(spare + 1, (count,), generator=generator).tolist() if spare else [0] * count
    cut = [torch.cat([whole[:, :, start : start + length] for start in starts]) for whole in (clip.mean, clip.std)]
    return LatentDistribution(*cut)


def motion_files(settings: MotionSettings) -> dict[str, Path]:
    """The files that a run depends on, by name: videos and absorbers.

    Raises:
        UserError: one that is not there, or numbers of videos, prompts and absorbers that do not go together; a warning
            where an absorber was trained on another clip than the one it serves.
    """
    further = len(settings.more_videos)
    if settings.more_prompts and len(settings.more_prompts) != further:
        raise UserError(f"{len(settings.more_prompts)} --more_prompts for {further} --more_videos: give one for each")
    sides = find_absorbers(settings.absorbers, 1 + further)
    clips = [clip_files(video) for video in (settings.video, *settings.more_videos)]
    warn_of_strangers(sides, clips)
    found = dict(clips[0])
    for i, files in enumerate(clips[1:], start=2):
        found |= {f"video {i}: {name}": file for name, file in files.items()}
    for i, its in enumerate(chain.from_iterable(sides), start=1):
        found |= {f"absorber {i}: {file.name}": file for file in its.files()}
    return found


def read_frames(settings: MotionSettings, base: Base) -> list[Tensor]:
    """The clips as the settings ask for them: each (clip_frames, 3, height, width) in [-1, 1].

    Raises:
        UserError: a video that cannot be read, is too short, or sizes that do not fit.
    """
    full = with_defaults(settings, base)
    count = full.num_frames if full.clip_frames is None else full.clip_frames
    if count < full.num_frames:
        raise UserError(f"clip_frames must be at least num_frames, {full.num_frames}, and is {count}")
    how = (count, full.height, full.width, full.fps, full.frame_step, full.start)
    try:
        return [read_clip(video, *how) for video in (full.video, *full.more_videos)]
    except UserError as error:
        flag = "num_frames" if full.clip_frames is None else "clip_frames"  # what to lower for a video too short
        raise UserError(str(error).replace("num_frames", flag)) from error


def with_defaults(settings: MotionSettings, base: Base) -> Any:
    """The settings with the base's recipe wherever nothing was asked for."""
    recipe = base.recipe
    return filled(
        settings,
        base,
        layers=list(recipe.motion_layers),
        steps=recipe.motion_steps,
        learning_rate=recipe.motion_learning_rate,
        batch_size=recipe.motion_batch_size,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt motion`."""
    about = "Stage 2: train a LoRA of the motion in one video."
    settings = parse_settings(MotionSettings, argv, prog="customttt motion", description=about)
    print(f"motion LoRA: {train_motion(settings)}")


if __name__ == "__main__":
    run_command(main)
