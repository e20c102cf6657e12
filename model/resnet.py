"""The convolutional parts: residual block, halving, doubling, and the embedding of the diffusion step."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import sinusoid
from model.motion import group_norm


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with the diffusion step added between them; `time_dim=None` leaves the step out (VAE)."""

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int | None, groups: int, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden: Tensor, time: Tensor | None = None, frames: int = 1, pooled: int = 1) -> Tensor:
        """hidden ((b f), c, h, w), time (b, d) -> ((b f), c', h, w); norms pool over `pooled` frames."""
        out = self.conv1(F.silu(group_norm(self.norm1, hidden, pooled)))
        if time is not None:
            out = out + self.time_emb_proj(F.silu(time)).repeat_interleave(frames, dim=0)[:, :, None, None]
        out = self.conv2(F.silu(group_norm(self.norm2, out, pooled)))
        return self.conv_shortcut(hidden) + out


class Downsample(nn.Module):
    """Halves height and width (rounded up) by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h / 2, w / 2)."""
        return self.conv(hidden)


class Upsample(nn.Module):
    """Repeats pixels up to `size`, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        """(n, c, h, w) -> (n, c, *size)."""
        return self.conv(F.interpolate(hidden, size=size, mode="nearest"))


class TimeEmbedding(nn.Module):
    """The diffusion step as `dim` cosines and sines, through two linear layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear_1 = nn.Linear(dim, 4 * dim)
        self.linear_2 = nn.Linear(4 * dim, 4 * dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """(b,) in [0, 1000) -> (b, 4 * dim)."""
        sine, cosine = sinusoid(timesteps, self.dim)
        waves = torch.cat([cosine, sine], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))
