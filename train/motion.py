"""Stage 2 of CustomTTT: the motion of one video, in a LoRA on the motion modules of layers 2 and 5.

python -m train.motion --base sd15.safetensors --motion_module v3_sd15_mm.ckpt --video playguitar.mp4
    --prompt "a man is playing guitar" --out runs/guitar
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import LatentDistribution
from sampling import encode, encode_videos
from train.data import clip_files, read_clip
from train.folder import RunFolder
from train.losses import motion_loss
from train.settings import AdapterSettings, filled
from train.stage import draw, predict, train_adapter
from weights import Base, open_base, parse_settings, run_command, with_source


@dataclass(kw_only=True)
class MotionSettings(AdapterSettings):
    """Stage 2: the motion of one video.

    Args:
        video: any video, or a folder of frames.
        prompt: what is to be seen in it ("a man is playing guitar").
        fps: take frames at this rate; not given: every frame_step-th frame.
        frame_step: take every n-th frame.
        start: seconds into the video.
        debiased: add MotionDirector's appearance-debiased term to the loss (our reading); false is the plain noise MSE.
    """

    video: str
    fps: float | None = None
    frame_step: int = 1
    start: float = 0.0
    debiased: bool = True


def train_motion(settings: MotionSettings, base: Base | None = None) -> Path:
    """Train dW_t on an ordered clip with the full network (CustomTTT, section 3.1; supplement, Table 2).

    Args:
        settings: of the run.
        base: one that is loaded already; None loads what the settings name.

    Returns:
        The LoRA file; at once, if the run was finished before.

    Raises:
        UserError: bad settings or files, an --out of another run, or a loss that is not finite.
    """
    folder, inputs = RunFolder(settings.out), clip_files(settings.video)
    settings = with_source(settings, base)
    if folder.is_done(settings, inputs):
        return folder.lora

    base = base or open_base(settings)
    full = with_defaults(settings, base)
    frames = read_frames(settings, base)
    clip, text = encode_videos(base, frames.transpose(0, 1)[None]), encode(base, [full.prompt])
    copies = [0] * full.batch_size
    latents, text = LatentDistribution(clip.mean[copies], clip.std[copies]), text[copies]

    def losses(step: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        clips = draw(latents, generator)
        prediction, target = predict(base.unet, base.schedule, clips, text, generator, skew=full.timestep_skew)
        yield "loss", motion_loss(prediction, target, generator, full.debiased)

    return train_adapter(base, "motion", "temporal", losses, full, folder, inputs)


def read_frames(settings: MotionSettings, base: Base) -> Tensor:
    """The clip as the settings ask for it: (num_frames, 3, height, width) in [-1, 1].

    Raises:
        UserError: a video that cannot be read, is too short, or sizes that do not fit.
    """
    full = with_defaults(settings, base)
    size = (full.num_frames, full.height, full.width)
    return read_clip(full.video, *size, full.fps, full.frame_step, full.start)


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
