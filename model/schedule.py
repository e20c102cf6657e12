"""The noise schedule: how much of the signal is left at each diffusion step, and which steps a sampler visits."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.errors import UserError

BETAS = ("linear", "scaled_linear")
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """Betas from `beta_start` to `beta_end` over `num_train_timesteps` steps (DDPM, section 2).

    Args:
        beta_schedule: "linear" (AnimateDiff v1 to v3) or "scaled_linear" (linear in the square root: Stable Diffusion
            on its own). A mix-up shows as washed-out video.
        steps_offset: added to the steps of leading spacing, so that they end at 1 and not at 0.
        final_alpha_one: the sample after the last step has no noise (alphas_cumprod 1, AnimateDiff's setting) rather
            than that of step 0.
        prediction: what the network predicts: "epsilon" (the noise) or "v_prediction".

    Raises:
        UserError: an unknown name.
    """

    beta_schedule: str = "linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    steps_offset: int = 1
    final_alpha_one: bool = True
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        _check("beta schedule", self.beta_schedule, BETAS)
        _check("prediction", self.prediction, PREDICTIONS)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The share of the signal's variance left at each step, (num_train_timesteps,) float32 on the CPU."""
        n = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, n)
        else:
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        return torch.cumprod(1.0 - betas, dim=0)

    def alpha(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """alphas_cumprod at `timesteps` (b,), shaped to multiply `like` (b, ...), on its device, in float32.

        A step below 0 is what follows the last one: 1, or step 0's (`final_alpha_one`).
        """
        table = self.alphas_cumprod
        after_last = torch.ones(1) if self.final_alpha_one else table[:1]
        padded = torch.cat([after_last, table])
        alpha = padded[timesteps.cpu().clamp(min=-1).long() + 1].to(like.device)
        return alpha.reshape(-1, *[1] * (like.ndim - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = sqrt(a_t) z + sqrt(1 - a_t) eps (DDPM, equation 4), for latents (b, ...) and timesteps (b,)."""
        alpha = self.alpha(timesteps, latents)
        return (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict: the noise, or v = sqrt(a_t) eps - sqrt(1 - a_t) z (Salimans & Ho 2022)."""
        if self.prediction == "epsilon":
            return noise
        alpha = self.alpha(timesteps, latents)
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents).to(latents.dtype)

    def split(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a prediction at `timesteps` stands for, both in float32."""
        alpha = self.alpha(timesteps, noisy)
        prediction, noisy = prediction.float(), noisy.float()
        if self.prediction == "epsilon":
            return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt(), prediction
        clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
        return clean, alpha.sqrt() * prediction + (1 - alpha).sqrt() * noisy

    def timesteps(self, steps: int, spacing: str = "leading") -> list[int]:
        """The steps a sampler visits, from most noise to least.

        "leading" counts multiples of 1000 // steps up from `steps_offset` (AnimateDiff's: 961 ... 41, 1 for 25),
        "linspace" spreads from 999 to 0, "trailing" counts down from 999 (Lin et al. 2024, Table 2). The one before t
        is t - 1000 // steps whatever the spacing, as in diffusers.

        Raises:
            UserError: `steps` not within 1 and `num_train_timesteps`, or an unknown spacing.
        """
        _check("spacing", spacing, SPACINGS)
        n = self.num_train_timesteps
        if not 1 <= steps <= n:
            raise UserError(f"{steps} sampling steps: give a number from 1 to {n}")
        if spacing == "leading":
            if (steps - 1) * (n // steps) + self.steps_offset >= n:
                raise UserError(
                    f"{steps} steps of leading spacing do not fit below {n}: use trailing or linspace spacing"
                )
            return [i * (n // steps) + self.steps_offset for i in reversed(range(steps))]
        if spacing == "linspace":
            visited = torch.linspace(0, n - 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1)
            return visited.round().flip(0).int().tolist()
        return [round(n - i * n / steps) - 1 for i in range(steps)]


def _check(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UserError(f"unknown {what} {name!r}: one of {', '.join(known)}")
