"""From prompts and seeds to latents and frames: what the commands, previews and test-time training sample with."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model import LatentDistribution, UserError
from sampling.ddim import AtStep, ddim_sample
from sampling.guidance import guided
from sampling.media import check_size
from weights import Base, placed


@torch.no_grad()
def sample_latents(
    base: Base,
    text: Tensor | Sequence[Tensor],
    negative: Tensor,
    seeds: Sequence[int],
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float = 0.0,
    spacing: str = "leading",
    motion: bool = True,
    shared_noise: bool = False,
    only_first: int | None = None,
    inverted: Tensor | None = None,
    noise_prior: float = 1.0,
    only_last: int | None = None,
    at_step: AtStep | None = None,
    progress: str | None = None,
) -> Tensor:
    """Sample the scaled latents of a clip for each embedded prompt, with the adapters that are on.

    Args:
        base: the network and its companions.
        text: embeddings of the prompts (b, n, d), see `encode`; or nine of them, one a layer.
        negative: embeddings of what guidance keeps away from, (b, n, d).
        seeds: b of them; a seed gives the same noise on any device and in any batch.
        num_frames: frames of a clip; None, here and below, is the base's own number.
        height: pixels, divisible by 8.
        width: pixels, divisible by 8.
        steps: DDIM steps.
        guidance_scale: 1 is no guidance.
        eta: 0 is deterministic DDIM, 1 has the variance of DDPM.
        spacing: which steps are visited: "leading", "linspace" or "trailing".
        motion: False bypasses the motion modules.
        shared_noise: all frames of a clip start from the same noise.
        only_first: stop after so many of the steps.
        inverted: a clip's inverted latents (1, 4, f, h / 8, w / 8), from which all clips start; frames and sizes are
            theirs then.
        noise_prior: their share of the start's variance; the rest is the seed's noise, see `mixed_noise`.
        only_last: leave out all but so many of the steps; `inverted` is then of the level where they start.
        at_step: switches before each step what changes with time, see `loaded_loras`; called with the step's index and
            the number of steps.
        progress: label of a progress bar, None for none.

    Returns:
        (b, 4, f, h / 8, w / 8) float32 on the UNet's device.

    Raises:
        UserError: sizes, steps or frames out of range, or latents that are not finite.
    """
    recipe, unet = base.recipe, base.unet
    frames = recipe.num_frames if num_frames is None else num_frames
    height = recipe.height if height is None else height
    width = recipe.width if width is None else width
    steps = recipe.sampling_steps if steps is None else steps
    scale = recipe.guidance_scale if guidance_scale is None else guidance_scale
    check_size(height, width)
    if frames < 1:
        raise UserError(f"num_frames must be at least 1, and is {frames}")
    shape = (unet.config.in_channels, frames, height // base.vae.config.factor, width // base.vae.config.factor)
    if inverted is not None:
        shape = tuple(inverted.shape[1:])

    def noise(stream: int) -> Tensor:
        return torch.cat([draw_noise(seed, shape, stream, shared_noise) for seed in seeds]).to(unet.device)

    with evaluating(unet):
        return ddim_sample(
            guided(unet, text, negative, scale, motion=motion),
            noise(0) if inverted is None else mixed_noise(inverted.to(unet.device), noise(0), noise_prior),
            base.schedule,
            steps,
            spacing=spacing,
            eta=eta,
            step_noise=lambda step: noise(step + 1),
            only_first=only_first,
            only_last=only_last,
            at_step=at_step,
            progress=progress,
        )


def sample_videos(
    base: Base, prompts: Sequence[str], seeds: Sequence[int], negative_prompt: str = "", **options: Any
) -> Tensor:
    """Sample one clip for each prompt with the adapters that are on.

    Args:
        base: the network and its companions.
        prompts: one a clip.
        seeds: one a clip.
        negative_prompt: what guidance keeps away from.
        options: those of `sample_latents`.

    Returns:
        Frames (b, f, 3, h, w) float32 in [-1, 1] on the CPU.

    Raises:
        UserError: as `sample_latents`.
    """
    text, negative = encode(base, prompts), encode(base, [negative_prompt] * len(prompts))
    return decode(base, sample_latents(base, text, negative, seeds, **options))


@torch.no_grad()
def encode(base: Base, prompts: Sequence[str]) -> Tensor:
    """Embeddings (b, n, d) of the prompts, where and how the UNet wants them."""
    with placed(base.text, base.unet.device):
        return base.embed(prompts).to(base.unet.device, base.unet.dtype)


@torch.no_grad()
def encode_videos(base: Base, videos: Tensor) -> LatentDistribution:
    """Mean and spread of the scaled latents of videos (b, 3, f, h, w) in [-1, 1], float32 on the UNet's device."""
    with placed(base.vae, base.unet.device):
        latents = base.vae.encode_latents(videos.to(base.unet.device, base.vae.dtype))
    return LatentDistribution(latents.mean.float(), latents.std.float())


@torch.no_grad()
def decode(base: Base, latents: Tensor) -> Tensor:
    """Scaled latents (b, 4, f, h, w) -> frames (b, f, 3, 8 * h, 8 * w) float32 in [-1, 1] on the CPU."""
    with placed(base.vae, base.unet.device):
        videos = base.vae.decode_latents(latents.to(base.vae.dtype))
    return videos.transpose(1, 2).float().cpu()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block dropout is off; afterwards every part is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def draw_noise(seed: int, shape: tuple[int, ...], stream: int = 0, shared: bool = False) -> Tensor:
    """Standard normal noise (1, *shape), float32, drawn on the CPU: the same for a seed everywhere.

    Args:
        seed: from 0 to 2^32 - 1; the noise is the one that diffusers draws from it.
        shape: (c, f, h, w).
        stream: 0 is where sampling starts; the others serve the steps of DDIM with eta above 0.
        shared: all frames get the first one's noise.

    Raises:
        UserError: a seed out of range.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"a seed must be a whole number from 0 to {2**32 - 1}, and {seed} is not")
    number = derived_seed(seed, "sampling", stream) if stream else seed
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(number))
    return noise[:, :, :1].expand_as(noise).contiguous() if shared else noise


def mixed_noise(inverted: Tensor, noise: Tensor, share: float) -> Tensor:
    """MotionDirector's noise prior: sqrt(share) * inverted + sqrt(1 - share) * noise, of variance 1 if both are.

    A little of a clip's inverted latents keeps its layout and motion, and leaves the rest to the seed: MotionDirector
    takes 0.1 to 0.5 with a LoRA of one video, and 0 with one of several.

    Args:
        inverted: latents that `ddim_invert` gave, (1 or b, c, f, h, w).
        noise: standard normal, (b, c, f, h, w).
        share: from 0 (noise alone) to 1 (inverted latents alone).

    Raises:
        UserError: a share out of range.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the noise prior must be from 0 to 1, and is {share}")
    return share**0.5 * inverted + (1 - share) ** 0.5 * noise


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2^32) that depends on all the parts (a run's seed, what it is for, a step) and on nothing else.

    torch's generator on the CPU takes no more than 32 bits in.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
