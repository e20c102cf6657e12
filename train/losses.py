"""The losses of both papers, as functions of predictions and targets (b, c, f, h, w)."""

import torch
from torch import Tensor

from model import NoiseSchedule

SNR_CAP = 5.0


def noise_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """|| eps - eps_theta ||^2, averaged over all elements, in float32 (CustomTTT, equation 1)."""
    return (prediction.float() - target.float()).square().mean()


def debias(values: Tensor, anchor: int, beta: float = 1.0) -> Tensor:
    """phi(e)_i = sqrt(beta^2 + 1) e_i - beta e_anchor for every frame i, the anchor's own included.

    What all frames share (the looks of the clip) shrinks to (sqrt(beta^2 + 1) - beta), and what tells them apart (its
    motion) grows by sqrt(beta^2 + 1) (MotionDirector, arXiv 2310.08465, section 4.2).
    """
    return (beta**2 + 1) ** 0.5 * values - beta * values[:, :, anchor : anchor + 1]


def debiased_loss(prediction: Tensor, target: Tensor, anchor: int, beta: float = 1.0) -> Tensor:
    """|| phi(eps) - phi(eps_theta) ||^2, averaged, with anchor frame `anchor` of the clip (MotionDirector, 4.2)."""
    return noise_loss(debias(prediction.float(), anchor, beta), debias(target.float(), anchor, beta))


def motion_loss(prediction: Tensor, target: Tensor, generator: torch.Generator, debiased: bool = True) -> Tensor:
    """Plain noise loss, and with `debiased` the debiased one added, its anchor frame drawn at random.

    Adding it is our reading of CustomTTT's stage 2: what the codebase behind its baseline does. `generator` is the
    step's, on the CPU.
    """
    loss = noise_loss(prediction, target)
    if not debiased:
        return loss
    anchor = int(torch.randint(prediction.shape[2], (), generator=generator))
    return loss + debiased_loss(prediction, target, anchor)


def skewed_timesteps(batch: int, skew: float, count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (batch,) from 0 to count - 1: count * u ** skew, u even in [0, 1). Below 1 they favour noise."""
    evenly = torch.randint(count, (batch,), generator=generator)
    return (count * ((evenly + 0.5) / count) ** skew).long()


def noise_weights(schedule: NoiseSchedule, timesteps: Tensor, power: float) -> Tensor:
    """Weights (b,) of the noise's error at `timesteps`: min(SNR, 5) / SNR / alpha ** power, alpha being alphas_cumprod.

    The first part is Hang et al. 2023, section 3.4: left alone, the many steps with little noise, where only details
    are at stake, would have most of the say. The second raises the noisiest, whose loss is small since nearly all of
    their input is the noise that is asked for, and which decide on places and ways: a power of 0.5 brings all losses to
    like size (measured on a half-trained tiny base: 0.047 and 0.0027 at timesteps 300 and 900 come to 0.07 and 0.04), 1
    is the weight of v-prediction.
    """
    alpha = schedule.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=SNR_CAP) / snr / alpha**power
