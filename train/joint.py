"""A baseline of CustomTTT: MotionDirector on AnimateDiff ("DiffDirector"), which trains both LoRAs in the same steps.

python -m train.joint --base sd15.safetensors --motion_module v3_sd15_mm.ckpt --video playguitar.mp4
    --prompt "a man is playing guitar" --images teddy/ --appearance_prompt "a teddy bear" --out runs/joint
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora import adapter_parameters, adapters
from model import LatentDistribution, UNet3D, UserError
from sampling import encode, encode_videos
from train.data import clip_files, read_clip, read_subject, subject_files
from train.folder import RunFolder
from train.loop import LoopSettings
from train.losses import motion_loss, noise_loss
from train.settings import ClipSettings, filled
from train.stage import Noised, draw, fresh_adapter, noised, predict_noised, run_stage
from weights import Base, open_base, parse_settings, run_command, with_source

MASKED = 0.2  # share of the steps that leave the appearance LoRA out


@dataclass(kw_only=True)
class JointSettings(ClipSettings):
    """MotionDirector's training: a LoRA of looks and one of motion, on all layers, both in every step.

    Whose looks is our reading: the subject's, from photos, as the comparison with CustomTTT needs; MotionDirector's own
    is without --images.

    Args:
        images: folder with pictures of the subject; a .txt beside a picture is its own caption. Not given: the looks
            are those of the video, from one random frame a step, noised as the clip itself, under the clip's prompt.
        appearance_prompt: of the images, a plain description of the subject ("a teddy bear").
        trigger: the words of that prompt that name the subject, noted in the file for other tools.
        appearance_learning_rate: of the appearance LoRA, where learning_rate is the motion LoRA's; not given: the
            base's (1e-5).
    """

    images: str | None = None
    appearance_prompt: str | None = None
    trigger: str = ""
    appearance_learning_rate: float | None = None

    def loop(self) -> LoopSettings:
        """As of every stage, with a learning rate of the appearance LoRA's own; raises UserError for a bad one too."""
        rate = self.appearance_learning_rate
        if rate is None or not 0 < rate <= 1:
            raise UserError(f"appearance_learning_rate must be above 0 and at most 1, and is {rate}")
        return dataclasses.replace(super().loop(), rates={"appearance": rate})


def train_joint(settings: JointSettings, base: Base | None = None) -> Path:
    """Train dW_s and dW_t together (MotionDirector, arXiv 2310.08465, section 4.2; CustomTTT, Table 1: DiffDirector).

    In each step the appearance LoRA learns from a single picture, then the motion LoRA from the clip, the appearance
    LoRA on and fixed, so that what is left to learn is motion. One step in five leaves the appearance LoRA out. Both
    move at the step's end.

    Args:
        settings: of the run.
        base: one that is loaded already; None loads what the settings name.

    Returns:
        The LoRA file with both adapters; at once, if the run was finished before.

    Raises:
        UserError: bad settings or files, an --out of another run, or a loss that is not finite.
    """
    check_words(settings)
    folder, inputs = RunFolder(settings.out), input_files(settings)
    settings = with_source(settings, base)
    if folder.is_done(settings, inputs):
        return folder.lora

    base = base or open_base(settings)
    unet, full = base.unet, with_defaults(settings, base)
    frames = read_clip(full.video, full.num_frames, full.height, full.width, full.fps, full.frame_step, full.start)
    photos = None if full.images is None else encoded_photos(base, full)
    clip, text = encode_videos(base, frames.transpose(0, 1)[None]), encode(base, [full.prompt])
    copies = [0] * full.batch_size
    latents, text = LatentDistribution(clip.mean[copies], clip.std[copies]), text[copies]

    def pictures(clips: Noised, generator: torch.Generator) -> tuple[Noised, Tensor]:
        if photos is None:
            return clips.frame(int(torch.randint(full.num_frames, (), generator=generator))), text
        its, captions = photos
        i = torch.randint(len(captions), (full.batch_size,), generator=generator)
        drawn = draw(LatentDistribution(its.mean[i], its.std[i]), generator)
        return noised(base.schedule, drawn, generator, full.timestep_skew), captions[i]

    def losses(step: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor | None]]:
        masked = torch.rand((), generator=generator).item() < MASKED
        clips = noised(base.schedule, draw(latents, generator), generator, full.timestep_skew)
        shown, caption = pictures(clips, generator)
        yield "appearance_loss", None if masked else noise_loss(*predict_noised(unet, shown, caption, motion=False))
        with fixed(unet, "appearance"), adapters(unet, {"appearance": float(not masked), "motion": 1.0}):
            yield "motion_loss", motion_loss(*predict_noised(unet, clips, text), generator)

    words = {"appearance": (full.appearance_prompt or full.prompt, full.trigger), "motion": (full.prompt, "")}
    with both_adapters(unet, full):
        return run_stage(base, words, losses, full, folder, inputs)


@contextmanager
def both_adapters(unet: UNet3D, settings: Any) -> Iterator[None]:
    """Within the block fresh adapters "appearance" and "motion" are in the network, on the baseline's linear layers.

    On all layers, the spatial one with the transformers' projections, the temporal one without: 30,461,952 parameters
    at rank 32 (CustomTTT, Table 1: 30.46 M).

    Raises:
        UserError: a network without motion modules, or a number out of its range.
    """
    looks = fresh_adapter(unet, "appearance", "spatial", None, "all", settings)
    with looks, fresh_adapter(unet, "motion", "temporal", None, "blocks", settings):
        yield


@contextmanager
def fixed(unet: UNet3D, name: str) -> Iterator[None]:
    """Within the block an adapter acts as it is switched, and gets no gradient."""
    parameters = adapter_parameters(unet, name)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def encoded_photos(base: Base, full: Any) -> tuple[LatentDistribution, Tensor]:
    """Latents of the subject's n photos, each a clip of one frame, and embeddings of their captions (n, 77, d)."""
    images, captions = read_subject(full.images, full.appearance_prompt, full.height, full.width)
    return encode_videos(base, images[:, :, None]), encode(base, captions)


def check_words(settings: JointSettings) -> None:
    """Raises UserError where photos and their prompt are not given together, or the trigger is not in that prompt."""
    if (settings.images is None) != (settings.appearance_prompt is None):
        raise UserError(
            '--images and --appearance_prompt go together: photos, and what they show, as in "a teddy bear"; without '
            "both the looks are those of the video"
        )
    prompt = settings.appearance_prompt or settings.prompt
    if settings.trigger not in prompt:
        raise UserError(f"the trigger {settings.trigger!r} is not in the prompt {prompt!r}")


def input_files(settings: JointSettings) -> dict[str, Path]:
    """The files that the run depends on, by name: a photo and a frame may be called alike."""
    seen = {} if settings.images is None else subject_files(settings.images)
    named = {"images": seen, "video": clip_files(settings.video)}
    return {f"{flag}/{name}": file for flag, files in named.items() for name, file in files.items()}


def with_defaults(settings: JointSettings, base: Base) -> Any:
    """The settings with the base's recipe wherever nothing was asked for: as many steps as its longer stage has."""
    recipe = base.recipe
    return filled(
        settings,
        base,
        steps=max(recipe.appearance_steps, recipe.motion_steps),
        learning_rate=recipe.motion_learning_rate,
        appearance_learning_rate=recipe.appearance_learning_rate,
        batch_size=recipe.motion_batch_size,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt joint`."""
    about = "A baseline, MotionDirector's: train both LoRAs in the same steps, on all layers."
    settings = parse_settings(JointSettings, argv, prog="customttt joint", description=about)
    print(f"both LoRAs: {train_joint(settings)}")


if __name__ == "__main__":
    run_command(main)
