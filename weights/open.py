"""The flags that every command with a base shares, and the base they name."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from weights.load import Base, load_base

Settings = TypeVar("Settings", bound="BaseSettings")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class BaseSettings:
    """Which network, where and how precise.

    Args:
        base: a diffusers folder, a one-file checkpoint (.safetensors, .ckpt), a cached name of the hub, or "tiny", the
            small one that comes along.
        motion_module: AnimateDiff motion module: the original file, or a diffusers MotionAdapter folder; not given:
            the base's own, if it has one.
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
    """Load the base that the settings name.

    Raises:
        UserError: a file that is missing, wrong or damaged, or a device that is not there.
    """
    dtype = None if settings.dtype is None else DTYPES[settings.dtype]
    return load_base(settings.base, settings.motion_module, settings.vae, settings.tokenizer, settings.device, dtype)


def with_source(settings: Settings, base: Base | None) -> Settings:
    """The settings, saying what `base` was loaded from where one was given ready-made."""
    return settings if base is None else dataclasses.replace(settings, **base.source)
