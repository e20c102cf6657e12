"""Classifier-free guidance: the network with and without the prompt, in one batched call (Ho & Salimans 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model import UNet3D
from sampling.ddim import Denoiser


def guided(
    unet: UNet3D,
    text: Tensor | Sequence[Tensor],
    negative: Tensor | None,
    guidance_scale: float,
    *,
    motion: bool = True,
) -> Denoiser:
    """A denoiser that follows the prompt: eps(negative) + guidance_scale * (eps(text) - eps(negative)).

    Args:
        unet: the network, its adapters switched as wanted.
        text: prompts' embeddings (b, n, d), or nine of them, one a layer (CustomTTT's prompt influence).
        negative: embeddings of what to keep away from (the empty prompt, as a rule), (b, n, d), the same in all
            layers; not used at scale 1.
        guidance_scale: 1 follows the prompt alone, in half the time; the paper's is 9.
        motion: False bypasses the motion modules.

    Returns:
        A function of latents (b, c, f, h, w) and a timestep.
    """
    if guidance_scale == 1 or negative is None:
        return lambda latents, timestep: unet(latents.to(unet.dtype), timestep, text, motion=motion)
    texts = [torch.cat([negative, words]) for words in ([text] if isinstance(text, Tensor) else text)]
    both = texts[0] if isinstance(text, Tensor) else texts

    def denoise(latents: Tensor, timestep: int) -> Tensor:
        doubled = torch.cat([latents, latents]).to(unet.dtype)
        without, with_text = unet(doubled, timestep, both, motion=motion).float().chunk(2)
        return without + guidance_scale * (with_text - without)

    return denoise
