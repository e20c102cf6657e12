"""What the stages share: latents drawn anew each step, the student's prediction, previews."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora import add_adapter, remove_adapter
from model import LatentDistribution, NoiseSchedule, UNet3D, UserError
from sampling import derived_seed, sample_videos, write_media
from train.folder import RunFolder
from train.loop import Losses, train
from train.losses import skewed_timesteps
from train.settings import TrainSettings
from weights import Base, placed, write_json
from weights.embeddings import Embedding
from weights.folders import locked


@contextmanager
def set_aside(base: Base, text_needed: bool = False) -> Iterator[None]:
    """Within the block the VAE and the text encoder are on the CPU: the training steps need neither, as a rule."""
    text_home = base.unet.device if text_needed else torch.device("cpu")
    with placed(base.vae, torch.device("cpu")), placed(base.text, text_home):
        yield


def draw(latents: LatentDistribution, generator: torch.Generator) -> Tensor:
    """One sample of the latents, with noise from the step's CPU generator."""
    return latents.sample(normal(latents.mean, generator))


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise shaped as `like` and on its device, drawn in float32 on the CPU."""
    return torch.randn(like.shape, generator=generator).to(like.device)


class Noised(NamedTuple):
    """Latents at random diffusion steps, and what the network should say of them.

    Args:
        latents: noisy, (b, c, f, h, w) float32.
        timesteps: (b,), on the CPU.
        target: (b, c, f, h, w).
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor

    def frame(self, k: int) -> "Noised":
        """Frame k by itself, as clips of one frame."""
        return Noised(self.latents[:, :, k : k + 1], self.timesteps, self.target[:, :, k : k + 1])


def noised(schedule: NoiseSchedule, latents: Tensor, generator: torch.Generator, skew: float = 1.0) -> Noised:
    """Clean latents (b, c, f, h, w) noised at a random t in [0, 1000); see `predict` for the arguments."""
    timesteps = skewed_timesteps(len(latents), skew, schedule.num_train_timesteps, generator)
    noise = normal(latents, generator)
    noisy = schedule.add_noise(latents, noise, timesteps)
    return Noised(noisy, timesteps, schedule.target(latents, noise, timesteps))


def predict_noised(unet: UNet3D, noisy: Noised, text: Tensor, *, motion: bool = True) -> tuple[Tensor, Tensor]:
    """The network's prediction for noised latents, and what it should be: (b, c, f, h, w) both."""
    prediction = unet(noisy.latents.to(unet.dtype), noisy.timesteps.to(unet.device), text, motion=motion)
    return prediction, noisy.target


def predict(
    unet: UNet3D,
    schedule: NoiseSchedule,
    latents: Tensor,
    text: Tensor,
    generator: torch.Generator,
    *,
    motion: bool = True,
    skew: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The network's prediction for latents noised at a random t in [0, 1000), and what it should be.

    Args:
        unet: the network, its adapters switched as wanted.
        schedule: the noise schedule.
        latents: clean and scaled, (b, c, f, h, w) float32.
        text: embeddings (b, n, d).
        generator: the step's, on the CPU.
        motion: False bypasses the motion modules.
        skew: of the timesteps, see `skewed_timesteps`: 1 draws them evenly, as both papers do.

    Returns:
        Prediction and target, (b, c, f, h, w).
    """
    return predict_noised(unet, noised(schedule, latents, generator, skew), text, motion=motion)


def train_adapter(
    base: Base,
    name: str,
    kind: str,
    losses: Losses,
    settings: Any,
    folder: RunFolder,
    inputs: Mapping[str, Path],
    words: tuple[str, str] | None = None,
    token: Embedding | None = None,
) -> Path:
    """Train one fresh adapter of `kind`, write its LoRA file, and leave the network as it was.

    Its prompt and trigger are `words`; not given: the settings' prompt, and none. A `token` is trained with it, see
    `run_stage`.

    Raises:
        UserError: layers that have no transformer of this kind, or what `run_stage` raises.
    """
    with fresh_adapter(base.unet, name, kind, settings.layers, settings.targets, settings):
        words_of = {name: words or (settings.prompt, "")}
        return run_stage(base, words_of, losses, settings, folder, inputs, token=token)


@contextmanager
def fresh_adapter(
    unet: UNet3D, name: str, kind: str, layers: Sequence[int] | None, targets: str, settings: Any
) -> Iterator[None]:
    """Within the block a fresh adapter of the settings' rank and dropout is in the network, switched off.

    Where its A starts depends on the settings' seed and its name alone. For the rest see `add_adapter`.

    Raises:
        UserError: layers that have no transformer of this kind, or a number out of its range.
    """
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "start", name))
    options = {"targets": targets, "dropout": settings.dropout, "generator": generator}
    add_adapter(unet, name, kind, layers, settings.rank, **options)
    try:
        yield
    finally:
        remove_adapter(unet, name)


def run_stage(
    base: Base,
    words: Mapping[str, tuple[str, str]],
    losses: Losses,
    settings: TrainSettings,
    folder: RunFolder,
    inputs: Mapping[str, Path],
    measure: Callable[[], Mapping[str, Any]] | None = None,
    token: Embedding | None = None,
) -> Path:
    """Train the adapters that `words` names (with their prompt and trigger) to the end, and write their LoRA file.

    What `measure` finds at the end goes into `report.json`. A `token` is trained with them, at the settings'
    token_learning_rate and without decay, and is written to a file of its own.

    Raises:
        UserError: an --out of another run, or one that another process is at work in, or a loss that is not finite.
    """
    loop = settings.loop()
    rates = {"lr": getattr(settings, "token_learning_rate", None), "weight_decay": 0.0}
    further = [] if token is None else [{"params": [token.vectors], **rates}]
    shown = settings.preview_prompt or (next(iter(words.values()))[0] if len(words) == 1 else settings.prompt)
    with locked(folder.path):
        folder.begin(settings, inputs, base)
        base.unet.gradient_checkpointing(settings.gradient_checkpointing)
        with set_aside(base, text_needed=token is not None):
            train(base.unet, list(words), losses, loop, folder, previewer(base, settings, folder, shown), further)
            if measure is not None:
                write_json(folder.path / "report.json", measure())
        folder.finish(base, words, settings, token)
    return folder.lora


def previewer(base: Base, settings: TrainSettings, folder: RunFolder, prompt: str) -> Callable[[int], None]:
    """A function that writes the clip which `generate` would give with the run's seed after `done` steps."""

    def preview(done: int) -> None:
        moving = base.unet.config.motion is not None
        sizes: dict[str, Any] = {"height": settings.height, "width": settings.width}
        sizes["num_frames"] = settings.num_frames if moving else 1
        file = folder.path / "previews" / f"step-{done:05d}.{'mp4' if moving else 'png'}"
        try:
            video = sample_videos(base, [prompt], [settings.seed], progress="preview", **sizes)
            write_media(file, video[0], fps=base.recipe.fps)
        except UserError as error:  # a picture that fails is no reason to lose the run
            warnings.warn(f"no preview after step {done}: {error}", stacklevel=2)

    return preview
