"""DDIM (Song et al. 2021): one step, and the whole way from noise to latents."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from model import NoiseSchedule, UserError

# latents (b, c, f, h, w) and timestep -> the network's prediction, same shape
Denoiser = Callable[[Tensor, int], Tensor]


def ddim_step(
    schedule: NoiseSchedule,
    prediction: Tensor,
    latents: Tensor,
    timestep: int,
    previous: int,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """From x_t to x_s, s < t (DDIM, equation 12; sigma of equation 16).

    Args:
        schedule: the noise schedule.
        prediction: the network's at `timestep`, shaped as `latents`.
        latents: x_t, (b, c, f, h, w).
        timestep: t.
        previous: s; below 0 is the end, without noise.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        noise: standard normal, shaped as `latents`; needed where eta > 0.

    Returns:
        x_s in the dtype of `latents`; computed in float32.
    """
    alpha, alpha_previous = (schedule.alpha(torch.tensor([t]), latents) for t in (timestep, previous))
    clean, eps = schedule.split(prediction, latents, torch.tensor([timestep]))
    sigma = eta * ((1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)).clamp(min=0).sqrt()
    out = alpha_previous.sqrt() * clean + (1 - alpha_previous - sigma**2).clamp(min=0).sqrt() * eps
    if eta > 0 and noise is not None:
        out = out + sigma * noise
    return out.to(latents.dtype)


@torch.no_grad()
def ddim_sample(
    denoise: Denoiser,
    latents: Tensor,
    schedule: NoiseSchedule,
    steps: int = 25,
    *,
    spacing: str = "leading",
    eta: float = 0.0,
    step_noise: Callable[[int], Tensor] | None = None,
    only_first: int | None = None,
    progress: str | None = None,
) -> Tensor:
    """From pure noise to clean latents in `steps` DDIM steps.

    Args:
        denoise: maps latents and a timestep to the network's prediction.
        latents: standard normal noise (b, c, f, h, w).
        schedule: the noise schedule.
        steps: how many steps the schedule is cut into, at least 1.
        spacing: which steps are visited, see `NoiseSchedule.timesteps`.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        step_noise: gives the i-th step's standard normal noise, on the CPU; needed where eta > 0.
        only_first: stop after so many of the steps, with latents that are still noisy (None: all).
        progress: label of a progress bar, None for none.

    Returns:
        Latents shaped as the noise.

    Raises:
        UserError: an unknown spacing, steps out of range, eta out of [0, 1] or without noise, or the network gave NaN.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta must be from 0 (deterministic) to 1 (the variance of DDPM), and is {eta}")
    if eta > 0 and step_noise is None:
        raise UserError("eta above 0 draws noise at every step: give step_noise")
    visited = schedule.timesteps(steps, spacing)[:only_first]
    for i, timestep in enumerate(tqdm(visited, desc=progress, disable=progress is None, leave=False)):
        noise = step_noise(i).to(latents) if eta > 0 and step_noise is not None else None
        previous = timestep - schedule.num_train_timesteps // steps
        latents = ddim_step(schedule, denoise(latents, timestep), latents, timestep, previous, eta, noise)
    if not torch.isfinite(latents).all():
        raise UserError(
            "sampling gave latents that are not finite: try --dtype float32 (half precision may overflow), a lower "
            "guidance scale or lower LoRA strengths; if that does not help, the weights themselves are damaged"
        )
    return latents
