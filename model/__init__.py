"""The network as pure modules, and its noise schedule."""

from model.config import SD15, SD15_V1, SD15_V2, SD15_V3, TINY, MotionConfig, Recipe, TextConfig, UNetConfig, VAEConfig
from model.errors import UserError
from model.schedule import NoiseSchedule
from model.text import TextEncoder
from model.unet import UNet3D
from model.vae import AutoencoderKL, LatentDistribution

__all__ = [
    "SD15",
    "SD15_V1",
    "SD15_V2",
    "SD15_V3",
    "TINY",
    "AutoencoderKL",
    "LatentDistribution",
    "MotionConfig",
    "NoiseSchedule",
    "Recipe",
    "TextConfig",
    "TextEncoder",
    "UNet3D",
    "UNetConfig",
    "UserError",
    "VAEConfig",
]
