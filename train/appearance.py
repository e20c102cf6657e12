"""Stage 1 of CustomTTT: a subject's looks, in a LoRA on the spatial transformers of layers 2 and 6.

python -m train.appearance --base sd15.safetensors --images teddy/ --prompt "a teddy bear" --out runs/teddy
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model import LatentDistribution, UserError
from sampling import encode, encode_videos
from train.data import read_subject, subject_files
from train.folder import RunFolder
from train.losses import noise_loss
from train.settings import AdapterSettings, filled
from train.stage import draw, predict, train_adapter
from weights import Base, open_base, parse_settings, run_command, with_source


@dataclass(kw_only=True)
class AppearanceSettings(AdapterSettings):
    """Stage 1: the looks of a subject.

    Args:
        images: folder with pictures of the subject; a .txt beside a picture is its own caption.
        prompt: a plain description of the subject ("a teddy bear").
        trigger: the words of the prompt that name the subject, noted in the file for other tools.
        beta_schedule: noise schedule of this stage. Our reading is AnimateDiff's linear one, as in the codebase behind
            the paper's baseline; scaled_linear is Stable Diffusion's own.
    """

    images: str
    trigger: str = ""
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"


def train_appearance(settings: AppearanceSettings, base: Base | None = None) -> Path:
    """Train dW_s on pictures, the motion modules bypassed (CustomTTT, section 3.1; supplement, Table 2).

    Args:
        settings: of the run.
        base: one that is loaded already; None loads what the settings name.

    Returns:
        The LoRA file; at once, if the run was finished before.

    Raises:
        UserError: bad settings or files, an --out of another run, or a loss that is not finite.
    """
    if settings.trigger not in settings.prompt:
        raise UserError(f"the trigger {settings.trigger!r} is not in the prompt {settings.prompt!r}")
    folder, inputs = RunFolder(settings.out), subject_files(settings.images)
    settings = with_source(settings, base)
    if folder.is_done(settings, inputs):
        return folder.lora

    base = base or open_base(settings)
    full = with_defaults(settings, base)
    images, captions = read_subject(full.images, full.prompt, full.height, full.width)
    latents, text = encode_videos(base, images[:, :, None]), encode(base, captions)
    schedule = dataclasses.replace(base.schedule, beta_schedule=full.beta_schedule)

    def losses(step: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        i = torch.randint(len(images), (full.batch_size,), generator=generator)
        pictures = draw(LatentDistribution(latents.mean[i], latents.std[i]), generator)
        pair = predict(base.unet, schedule, pictures, text[i], generator, motion=False, skew=full.timestep_skew)
        yield "loss", noise_loss(*pair)

    return train_adapter(base, "appearance", "spatial", losses, full, folder, inputs, (full.prompt, full.trigger))


def with_defaults(settings: AppearanceSettings, base: Base) -> Any:
    """The settings with the base's recipe wherever nothing was asked for."""
    recipe = base.recipe
    return filled(
        settings,
        base,
        layers=list(recipe.appearance_layers),
        steps=recipe.appearance_steps,
        learning_rate=recipe.appearance_learning_rate,
        batch_size=recipe.appearance_batch_size,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt appearance`."""
    about = "Stage 1: train a LoRA of a subject's looks on a few pictures."
    settings = parse_settings(AppearanceSettings, argv, prog="customttt appearance", description=about)
    print(f"appearance LoRA: {train_appearance(settings)}")


if __name__ == "__main__":
    run_command(main)
