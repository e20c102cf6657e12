"""The flags that every command with a base shares, and the base they name."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from model import UserError
from weights.load import Base, load_base

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class BaseSettings:
    """Which network, where and how precise.

    Args:
        base: a diffusers folder, a one-file checkpoint (.safetensors, .ckpt), a cached name of the hub, or "tiny".
        motion_module: AnimateDiff motion module: the original file, or a diffusers MotionAdapter folder.
        vae: another autoencoder than the base's own: a file, or a diffusers folder.
        tokenizer: folder with CLIP's vocab.json and merges.txt, where the base has none of its own.
        device: "cuda", "cuda:1", "cpu"; not given: CUDA if there is one.
        dtype: precision of the frozen weights; not given: bfloat16 on CUDA (float16 on cards without), float32 on
            the CPU. LoRAs are float32 always.
    """

    base: str = "tiny"
    motion_module: str | None = None
    vae: str | None = None
    tokenizer: str | None = None
    device: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None


def open_base(settings: BaseSettings) -> Base:
    """Load the base that the settings name, ready to run.

    Raises:
        UserError: a file that is missing, wrong or damaged, or a device that is not there.
    """
    device = choose_device(settings.device)
    dtype = DTYPES[settings.dtype or default_dtype(device)]
    return load_base(
        settings.base, settings.motion_module, settings.vae, settings.tokenizer, device=device, dtype=dtype
    )


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best one there is.

    Raises:
        UserError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name} is not to be had here ({reason}): leave it out, or say cpu or cuda"
        ) from error


def default_dtype(device: torch.device) -> Literal["float32", "float16", "bfloat16"]:
    """The dtype of frozen weights where none is asked for."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the module is on `device`; afterwards it is back where it was."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
