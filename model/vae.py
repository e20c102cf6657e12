"""The autoencoder of Stable Diffusion: pictures to latents of an eighth of the size, and back."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.config import VAEConfig
from model.errors import UserError
from model.resnet import ResnetBlock, Upsample

EPS = 1e-6  # of every norm here, against 1e-5 in the UNet


class LatentDistribution(NamedTuple):
    """The encoder's normal distribution over scaled latents: mean and standard deviation, each (b, c, f, h, w)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The latents that standard normal `noise` (b, c, f, h, w) picks."""
        return self.mean + self.std * noise


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the names and layout of diffusers."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.quant_conv.weight.dtype

    def encode(self, images: Tensor) -> Tensor:
        """images (b, 3, h, w) in [-1, 1] -> moments (b, 2 * c, h / 8, w / 8): means, then log variances; unscaled."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (b, c, h, w) -> images (b, 3, 8 * h, 8 * w), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    def encode_latents(self, videos: Tensor, chunk: int = 4) -> LatentDistribution:
        """The distribution of a clip's scaled latents, `chunk` frames at a time.

        Args:
            videos: (b, 3, f, h, w) in [-1, 1]; height and width divisible by 8.
            chunk: frames in memory at once.

        Returns:
            LatentDistribution of (b, c, f, h / 8, w / 8).

        Raises:
            UserError: height or width not divisible by 8.
        """
        factor = self.config.factor
        if videos.shape[-1] % factor or videos.shape[-2] % factor:
            raise UserError(
                f"frames of {videos.shape[-1]}x{videos.shape[-2]} pixels: both sides must divide by {factor}"
            )
        frames = rearrange(videos, "b c f h w -> (b f) c h w")
        moments = torch.cat([self.encode(part) for part in frames.split(chunk)])
        mean, log_variance = rearrange(moments, "(b f) c h w -> b c f h w", b=len(videos)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return LatentDistribution(mean * self.config.scaling_factor, std * self.config.scaling_factor)

    def decode_latents(self, latents: Tensor, chunk: int = 4) -> Tensor:
        """Scaled latents (b, c, f, h, w) -> videos (b, 3, f, 8 * h, 8 * w) in [-1, 1], `chunk` frames at a time."""
        frames = rearrange(latents, "b c f h w -> (b f) c h w") / self.config.scaling_factor
        images = torch.cat([self.decode(part) for part in frames.split(chunk)])
        return rearrange(images, "(b f) c h w -> b c f h w", b=len(latents)).clamp(-1, 1)


class Encoder(nn.Module):
    """Images to moments: a level for each width, halving between them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            halve = level < len(widths) - 1
            self.down_blocks.append(Level(before, width, config.layers_per_block, groups, "halve" if halve else None))
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, 2 * c, h / 8, w / 8)."""
        hidden = self.conv_in(images)
        for level in self.down_blocks:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(hidden))))


class Decoder(nn.Module):
    """Latents to images: the encoder's levels in reverse, with one more resnet each."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            double = level < len(widths) - 1
            self.up_blocks.append(
                Level(before, width, config.layers_per_block + 1, groups, "double" if double else None)
            )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 3, 8 * h, 8 * w)."""
        hidden = self.mid_block(self.conv_in(latents))
        for level in self.up_blocks:
            hidden = level(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class Level(nn.Module):
    """Some resnets at one width, then a change of size."""

    def __init__(self, channels: int, width: int, count: int, groups: int, then: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(channels if j == 0 else width, width, None, groups, EPS) for j in range(count)
        )
        if then == "halve":
            self.downsamplers = nn.ModuleList([PaddedDownsample(width)])
        if then == "double":
            self.upsamplers = nn.ModuleList([Upsample(width)])
        self.then = then

    def forward(self, hidden: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c', h', w')."""
        for resnet in self.resnets:
            hidden = resnet(hidden)
        if self.then == "halve":
            return self.downsamplers[0](hidden)
        if self.then == "double":
            return self.upsamplers[0](hidden, size=(2 * hidden.shape[-2], 2 * hidden.shape[-1]))
        return hidden


class PaddedDownsample(nn.Module):
    """Halves height and width with padding on the right and the bottom alone, unlike the UNet's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h / 2, w / 2)."""
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class Middle(nn.Module):
    """Resnet, attention among all positions, resnet."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, None, groups, EPS) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width, groups)])

    def forward(self, hidden: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](hidden)))


class PixelAttention(nn.Module):
    """One-head attention among all positions, with biases, around a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, hidden: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        tokens = rearrange(self.group_norm(hidden), "b c h w -> b 1 (h w) c")
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return hidden + rearrange(self.to_out[0](out), "b 1 (h w) c -> b c h w", h=hidden.shape[-2])
