"""A video made anew with other words, frame by frame: `python -m sampling.edit`.

The video's latents are taken back to noise by DDIM inversion, and new clips start from there.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora import adapters
from model import UserError
from sampling.ddim import AtStep, ddim_invert
from sampling.generate import GenerateSettings, clip_files, generate_files
from sampling.guidance import guided
from sampling.media import check_size, read_video
from sampling.sample import encode, encode_videos, evaluating
from weights import Base, open_base, parse_settings, run_command, with_source


@dataclass(kw_only=True)
class EditSettings(GenerateSettings):
    """What to make of a video.

    Args:
        video: the source: any video, or a folder of frames.
        source_prompt: what is to be seen in it, for its inversion; MotionDirector's is empty.
        fps: take the video's frames at this rate, and write clips of it; not given: every frame_step-th frame, written
            at the base's rate.
        frame_step: take every n-th frame of the video.
        start: seconds into the video.
        steps: DDIM steps to noise, and as many back.
        strength: how far back to noise the video is taken, a share of the steps: 1 is all the way, less keeps more of
            its looks, 0 is the video through the autoencoder alone.
        noise_prior: the inverted noise's share of the start, above 0; the rest is the seed's. 1 follows the video frame
            by frame, 0.1 to 0.5 keeps its motion and varies the rest (MotionDirector).
        refine: evaluations added to each step of the inversion; one gives the video itself back far more closely.
        invert_with_lora: have the LoRAs on while inverting, too.
    """

    video: str
    source_prompt: str = ""
    frame_step: int = 1
    start: float = 0.0
    steps: int | None = 50
    strength: float = 1.0
    noise_prior: float = 1.0
    refine: int = 0
    invert_with_lora: bool = False


def edit_files(settings: EditSettings, base: Base | None = None) -> list[Path]:
    """Invert the video, sample every prompt (with every seed, where seeds matter) from there, and write the clips.

    Customize-A-Video's frame-precise editing, with a motion LoRA among `lora`, and MotionDirector's noise prior. Both
    leave open whether the LoRA is on during inversion (MotionDirector's code: off, unless its cache is missing); *our
    reading*: off, `invert_with_lora` is the other.

    Args:
        settings: what, how and where to.
        base: one that is loaded already; None loads what the settings name.

    Returns:
        The files written, prompts outermost.

    Raises:
        UserError: bad settings or files, a video that is too short, or sampling that failed; clips written before it
            are whole.
    """
    check_edit(settings)
    settings = with_source(settings, base)
    base = base or open_base(settings)
    steps = base.recipe.sampling_steps if settings.steps is None else settings.steps
    only_last = round(settings.strength * steps)
    if settings.strength and steps > 0 and not only_last:
        raise UserError(
            f"strength {settings.strength:g} of {steps} steps is not one step, and nothing would be made anew: give "
            f"{1 / steps:g} or more, or 0 for the video through the autoencoder alone"
        )
    video = encode_videos(base, read_source(settings, base).transpose(0, 1)[None]).mean

    def start(at_step: AtStep | None) -> dict[str, Any]:
        unet, text = base.unet, base.text.clip
        kept = settings.invert_with_lora
        with nullcontext() if kept else adapters(unet, {}), nullcontext() if kept else adapters(text, {}):
            options: dict[str, Any] = {"spacing": settings.spacing, "only_last": only_last, "refine": settings.refine}
            options["at_step"] = at_step if kept else None
            words = encode(base, [settings.source_prompt])
            inverted = invert_latents(base, video, words, steps, progress="inverting", **options)
        return {"inverted": inverted, "noise_prior": settings.noise_prior, "only_last": only_last, "steps": steps}

    return generate_files(settings, base, start)


def check_edit(settings: EditSettings) -> None:
    """Raise UserError for what can be told to be wrong before anything is loaded."""
    files = [file for _, _, file in clip_files(settings)]
    if not 0 <= settings.strength <= 1:
        raise UserError(f"strength must be from 0 (the video itself) to 1, and is {settings.strength}")
    if settings.refine < 0:
        raise UserError(f"refine must not be negative, and is {settings.refine}")
    if not 0 < settings.noise_prior <= 1:
        raise UserError(
            f"noise_prior must be above 0 and at most 1, and is {settings.noise_prior} (with nothing of the video in "
            "the noise, use `customttt generate`)"
        )
    if settings.noise_prior < 1 and settings.strength < 1:
        raise UserError(
            f"noise_prior {settings.noise_prior} mixes pure noise into the start, and at strength {settings.strength} "
            "the start is no pure noise: give one of the two"
        )
    if settings.invert_with_lora and not settings.lora:
        raise UserError("invert_with_lora has LoRAs on while inverting, and there is none: give --lora too")
    if settings.noise_prior == 1 and (settings.eta == 0 or settings.strength == 0):
        if len(settings.seed) > 1:
            raise UserError(
                "several seeds give the same clip here, where nothing is random: give one, or --noise_prior below 1"
            )
        if settings.seed != [0]:
            warnings.warn(f"seed {settings.seed[0]} has no effect: nothing is random here", stacklevel=3)
    if not Path(settings.video).exists():
        raise UserError(f"{settings.video} does not exist.")
    if Path(settings.video).resolve() in [file.resolve() for file in files]:
        raise UserError(f"--out {settings.out} would overwrite the video it is made from: give another name")


def read_source(settings: EditSettings, base: Base) -> Tensor:
    """The video as the settings ask for it: (num_frames, 3, height, width) in [-1, 1].

    Raises:
        UserError: a video that cannot be read or is too short, or sizes not divisible by 8.
    """
    given, usual = settings, base.recipe
    height = usual.height if given.height is None else given.height
    width = usual.width if given.width is None else given.width
    frames = usual.num_frames if given.num_frames is None else given.num_frames
    check_size(height, width)
    return read_video(given.video, frames, height, width, given.fps, given.frame_step, given.start)


def invert_latents(base: Base, latents: Tensor, text: Tensor, steps: int, **options: Any) -> Tensor:
    """Take scaled latents of clips back to noise with the adapters that are on, without guidance.

    Args:
        base: the network and its companions.
        latents: (b, 4, f, h / 8, w / 8) float32, see `encode_videos`.
        text: embeddings (b, n, d) of what is to be seen in the clips, see `encode`.
        steps: DDIM steps.
        options: those of `ddim_invert`.

    Raises:
        UserError: as `ddim_invert`.
    """
    with evaluating(base.unet):
        return ddim_invert(guided(base.unet, text, None, 1.0), latents, base.schedule, steps, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt edit`."""
    about = "Make a video anew with other words, its motion kept frame by frame."
    edit_files(parse_settings(EditSettings, argv, prog="customttt edit", description=about))


if __name__ == "__main__":
    run_command(main)
