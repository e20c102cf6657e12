"""How far test-time training went: in the weights, and in what the network predicts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora import Adapter, adapter_modules, adapters
from sampling import draw_noise, evaluating
from weights import Base

TIMESTEP = 500  # where predictions are compared


@torch.no_grad()
def movement(
    base: Base, reference_of: Mapping[str, str], reference: Callable[[], Tensor], text: Tensor, seed: int
) -> dict[str, Any]:
    """How far the student's adapters went from those they started as.

    Args:
        base: the network, with the student's adapters and the references beside them.
        reference_of: the adapter that each of the student's started as.
        reference: gives clean latents (1, c, f, h, w) to compare predictions on.
        text: the student's prompt, (1, n, d).
        seed: of the noise on those latents.

    Returns:
        For each adapter the largest change of an element of A and of B, and the change of all B A relative to their
        size; for the prediction at t = 500, in float32, the relative change by test-time training, and by both LoRAs
        for scale.
    """
    report: dict[str, Any] = {
        student: _distance(adapter_modules(base.unet, student), adapter_modules(base.unet, started))
        for student, started in reference_of.items()
    }
    latents = reference()
    noise = draw_noise(seed, tuple(latents.shape[1:])).to(latents)
    noisy = base.schedule.add_noise(latents, noise, torch.tensor([TIMESTEP]))
    dtype, predictions = base.unet.dtype, []
    base.unet.float()  # half precision rounds more than test-time training moves, and comes back from float32 unchanged
    try:
        for names in ((), reference_of.values(), reference_of):
            with evaluating(base.unet), adapters(base.unet, dict.fromkeys(names, 1.0)):
                predictions.append(base.unet(noisy, TIMESTEP, text.float()))
    finally:
        base.unet.to(dtype)
    plain, together, trained = predictions
    report["prediction"] = {
        "relative change by test-time training": ((trained - together).norm() / together.norm()).item(),
        "relative change by both LoRAs": ((together - plain).norm() / plain.norm()).item(),
    }
    return report


def _distance(student: dict[str, Adapter], started: dict[str, Adapter]) -> dict[str, float]:
    pairs = [(module, started[path]) for path, module in student.items()]
    changed = sum((new.delta() - old.delta()).square().sum().item() for new, old in pairs)
    size = sum(old.delta().square().sum().item() for _, old in pairs)
    return {
        "largest change of A": max((new.A - old.A).abs().max().item() for new, old in pairs),
        "largest change of B": max((new.B - old.B).abs().max().item() for new, old in pairs),
        "relative change of B A": (changed / size) ** 0.5 if size else 0.0,
    }
