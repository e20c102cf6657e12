"""What the stages share: latents drawn anew each step, the student's prediction, previews."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from weights.folders import locked


@torch.no_grad()
def encode_videos(base: Base, videos: Tensor) -> LatentDistribution:
    """Mean and spread of the scaled latents of videos (b, 3, f, h, w) in [-1, 1], float32 on the UNet's device.

    Done once, before the first step: a step only draws from it.
    """
    with placed(base.vae, base.unet.device):
        latents = base.vae.encode_latents(videos.to(base.unet.device, base.vae.dtype))
    return LatentDistribution(latents.mean.float(), latents.std.float())


@contextmanager
def set_aside(base: Base) -> Iterator[None]:
    """Within the block the VAE and the text encoder are on the CPU: the training steps need neither."""
    with placed(base.vae, torch.device("cpu")), placed(base.text, torch.device("cpu")):
        yield


def draw(latents: LatentDistribution, generator: torch.Generator) -> Tensor:
    """One sample of the latents, with noise from the step's CPU generator."""
    return latents.sample(normal(latents.mean, generator))


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise shaped as `like` and on its device, drawn in float32 on the CPU."""
    return torch.randn(like.shape, generator=generator).to(like.device)


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
    timesteps = skewed_timesteps(len(latents), skew, schedule.num_train_timesteps, generator)
    noise = normal(latents, generator)
    noisy = schedule.add_noise(latents, noise, timesteps)
    prediction = unet(noisy.to(unet.dtype), timesteps.to(unet.device), text, motion=motion)
    return prediction, schedule.target(latents, noise, timesteps)


def train_adapter(
    base: Base,
    name: str,
    kind: str,
    losses: Losses,
    settings: Any,
    folder: RunFolder,
    inputs: Mapping[str, Path],
    trigger: str = "",
) -> Path:
    """Train one fresh adapter of `kind`, write its LoRA file, and leave the network as it was.

    Raises:
        UserError: layers that have no transformer of this kind, or what `run_stage` raises.
    """
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "start", name))
    add_adapter(
        base.unet,
        name,
        kind,
        settings.layers,
        settings.rank,
        targets=settings.targets,
        dropout=settings.dropout,
        generator=generator,
    )
    try:
        return run_stage(base, {name: (settings.prompt, trigger)}, losses, settings, folder, inputs)
    finally:
        remove_adapter(base.unet, name)


def run_stage(
    base: Base,
    words: Mapping[str, tuple[str, str]],
    losses: Losses,
    settings: TrainSettings,
    folder: RunFolder,
    inputs: Mapping[str, Path],
    measure: Callable[[], Mapping[str, Any]] | None = None,
) -> Path:
    """Train the adapters that `words` names (with their prompt and trigger) to the end, and write their LoRA file.

    What `measure` finds at the end goes into `report.json`.

    Raises:
        UserError: an --out of another run, or one that another process is at work in, or a loss that is not finite.
    """
    loop = settings.loop()
    with locked(folder.path):
        folder.begin(settings, inputs, base)
        base.unet.gradient_checkpointing(settings.gradient_checkpointing)
        with set_aside(base):
            train(base.unet, list(words), losses, loop, folder, previewer(base, settings, folder))
            if measure is not None:
                write_json(folder.path / "report.json", measure())
        folder.finish(base, words, settings)
    return folder.lora


def previewer(base: Base, settings: TrainSettings, folder: RunFolder) -> Callable[[int], None]:
    """A function that writes the clip which `generate` would give with the run's seed after `done` steps."""

    def preview(done: int) -> None:
        moving = base.unet.config.motion is not None
        prompt = settings.preview_prompt or settings.prompt
        sizes: dict[str, Any] = {"height": settings.height, "width": settings.width}
        sizes["num_frames"] = settings.num_frames if moving else 1
        file = folder.path / "previews" / f"step-{done:05d}.{'mp4' if moving else 'png'}"
        try:
            video = sample_videos(base, [prompt], [settings.seed], progress="preview", **sizes)
            write_media(file, video[0], fps=base.recipe.fps)
        except UserError as error:  # a picture that fails is no reason to lose the run
            warnings.warn(f"no preview after step {done}: {error}", stacklevel=2)

    return preview
