"""Where networks run, and how precise their frozen weights are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from model import UserError


def choose_device(name: str | torch.device | None) -> torch.device:
    """The named device, or the best one there is.

    Raises:
        UserError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        pass
    raise UserError(f"there is no device {str(name)!r} here: leave --device out, or say cpu, cuda or cuda:1")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float16 on cards without it, float32 on the CPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the module is on `device`; afterwards it is back where it was."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
