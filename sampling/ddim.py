"""DDIM (Song et al. 2021): one step, the whole way from noise to latents, and the way back."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from model import NoiseSchedule, UserError

# latents (b, c, f, h, w) and timestep -> the network's prediction, same shape
Denoiser = Callable[[Tensor, int], Tensor]
# a step's index, 0 being that of most noise, and the number of steps -> what changes with time is set for it
AtStep = Callable[[int, int], None]


def ddim_step(
    schedule: NoiseSchedule,
    prediction: Tensor,
    latents: Tensor,
    timestep: int,
    previous: int,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """From x_t to x_s, s < t (DDIM, equation 12; sigma of equation 16); without eta s may lie above t as well.

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
    sigma = torch.zeros_like(alpha)
    if eta > 0:
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
    only_last: int | None = None,
    at_step: AtStep | None = None,
    progress: str | None = None,
) -> Tensor:
    """From pure noise to clean latents in `steps` DDIM steps.

    Args:
        denoise: maps latents and a timestep to the network's prediction.
        latents: standard normal noise (b, c, f, h, w); with `only_last`, latents of the level where that starts.
        schedule: the noise schedule.
        steps: how many steps the schedule is cut into, at least 1.
        spacing: which steps are visited, see `NoiseSchedule.timesteps`.
        eta: 0 is deterministic, 1 has the variance of DDPM.
        step_noise: gives the i-th step's standard normal noise, on the CPU; needed where eta > 0.
        only_first: stop after so many of the steps, with latents that are still noisy (None: all).
        only_last: leave out all but so many of the steps, from 0 to `steps` (None: none is left out).
        at_step: called before each step with its index among all `steps`, those left out too, and their number.
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
    visited = _visited(schedule, steps, spacing, only_last)[:only_first]
    first = 0 if only_last is None else steps - only_last
    for i, timestep in enumerate(tqdm(visited, desc=progress, disable=progress is None, leave=False)):
        if at_step is not None:
            at_step(first + i, steps)
        noise = step_noise(i).to(latents) if eta > 0 and step_noise is not None else None
        previous = timestep - schedule.num_train_timesteps // steps
        latents = ddim_step(schedule, denoise(latents, timestep), latents, timestep, previous, eta, noise)
    return _finite(latents, "sampling")


@torch.no_grad()
def ddim_invert(
    denoise: Denoiser,
    latents: Tensor,
    schedule: NoiseSchedule,
    steps: int = 50,
    *,
    spacing: str = "leading",
    only_last: int | None = None,
    refine: int = 0,
    at_step: AtStep | None = None,
    progress: str | None = None,
) -> Tensor:
    """From clean latents to the noise that `ddim_sample` makes them of: its steps (s <- t) in reverse, each as s -> t.

    Sampling asks the network at x_t and t. Here x_t is what is sought, so it is asked at x_s and t, as diffusers'
    DDIMInverseScheduler and MotionDirector do: exact where the prediction of the noise does not depend on the latents,
    and of first order in the size of a step elsewhere.

    Args:
        denoise: maps latents and a timestep to the network's prediction; without guidance, as a rule: it drives
            inverted latents away from anything that sampling can start from.
        latents: clean latents (b, c, f, h, w).
        schedule: the noise schedule.
        steps: how many steps the schedule is cut into, at least 1; spacing too must be that of the sampling.
        spacing: which steps are visited, see `NoiseSchedule.timesteps`.
        only_last: invert only the last so many of the sampling's steps, those of little noise (None: all). The result
            goes to `ddim_sample` with the same `only_last`.
        refine: how often each step is taken anew with the network asked at the x_t found so far: a fixed-point
            iteration, whose limit `ddim_sample` gives back exactly.
        at_step: called before each step with the index of the sampling's step that it reverses, and their number.
        progress: label of a progress bar, None for none.

    Returns:
        Latents of the level of the first step inverted, shaped as the clean ones.

    Raises:
        UserError: an unknown spacing, steps out of range, or the network gave NaN.
    """
    visited = _visited(schedule, steps, spacing, only_last)[::-1]
    for i, timestep in enumerate(tqdm(visited, desc=progress, disable=progress is None, leave=False)):
        if at_step is not None:
            at_step(steps - 1 - i, steps)
        previous = timestep - schedule.num_train_timesteps // steps
        reached = ddim_step(schedule, denoise(latents, timestep), latents, previous, timestep)
        for _ in range(refine):
            _, eps = schedule.split(denoise(reached, timestep), reached, torch.tensor([timestep]))
            reached = ddim_step(replace(schedule, prediction="epsilon"), eps, latents, previous, timestep)
        latents = reached
    return _finite(latents, "inversion")


def _visited(schedule: NoiseSchedule, steps: int, spacing: str, only_last: int | None) -> list[int]:
    """The schedule's timesteps from most noise to least, or the last so many; raises UserError for too many."""
    visited = schedule.timesteps(steps, spacing)
    if only_last is not None and not 0 <= only_last <= steps:
        raise UserError(f"of {steps} steps the last 0 to {steps} can be taken, and not {only_last}")
    return visited if only_last is None else visited[steps - only_last :]


def _finite(latents: Tensor, what: str) -> Tensor:
    """The latents; raises UserError if they are broken."""
    if not torch.isfinite(latents).all():
        raise UserError(
            f"{what} gave latents that are not finite: try --dtype float32 (half precision may overflow), a lower "
            "guidance scale or lower LoRA strengths; if that does not help, the weights themselves are damaged"
        )
    return latents
