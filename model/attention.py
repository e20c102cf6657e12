"""Attention, the GEGLU feed-forward, and the spatial transformer made of them (Stable Diffusion 1.5)."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of `dim` channels over `context_dim` ones (its own, if not given)."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))  # a list of one, so that the name `to_out.0` is the files'

    def forward(self, hidden: Tensor, context: Tensor | None = None) -> Tensor:
        """hidden (b, n, dim), context (b, m, context_dim) -> (b, n, dim)."""
        context = hidden if context is None else context
        q, k, v = self.to_q(hidden), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=self.heads) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b heads n d -> b n (heads d)"))


class GEGLU(nn.Module):
    """A linear layer whose second half of outputs gates the first (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> (..., inner)."""
        value, gate = self.proj(hidden).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The files number these parts 0 and 2; what was 1 there is a dropout of 0.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.net(hidden)


class TransformerBlock(nn.Module):
    """The parts that the blocks of spatial transformers and motion modules share: two attentions, a feed-forward.

    In a spatial transformer `attn2` looks at the text (`context_dim`); in a motion module it is a second
    self-attention.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)


class SpatialBlock(TransformerBlock):
    """Attention within each frame, then from the whole clip to the text."""

    def forward(self, hidden: Tensor, text: Tensor, frames: int) -> Tensor:
        """hidden ((b f), n, c), text (b, m, d) -> ((b f), n, c).

        Keys and values of the text are the same for all frames: they are computed once, and the frames are folded
        into the axis of queries.
        """
        hidden = hidden + self.attn1(self.norm1(hidden))
        queries = rearrange(self.norm2(hidden), "(b f) n c -> b (f n) c", f=frames)
        hidden = hidden + rearrange(self.attn2(queries, text), "b (f n) c -> (b f) n c", f=frames)
        return hidden + self.ff(self.norm3(hidden))


class SpatialTransformer(nn.Module):
    """A spatial block between two linear maps, around a residual; its group norm is per frame."""

    def __init__(self, dim: int, heads: int, context_dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([SpatialBlock(dim, heads, context_dim)])
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, text: Tensor, frames: int) -> Tensor:
        """hidden ((b f), c, h, w), text (b, n, d) -> ((b f), c, h, w)."""
        height, width = hidden.shape[-2:]
        tokens = self.proj_in(rearrange(self.norm(hidden), "bf c h w -> bf (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, text, frames)
        return hidden + rearrange(self.proj_out(tokens), "bf (h w) c -> bf c h w", h=height, w=width)


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines, (2, n, dim / 2), of `positions` (n,) at frequencies from 1 down to 1/10000."""
    exponents = torch.arange(dim // 2, device=positions.device, dtype=torch.float32) * (-2 * math.log(10000) / dim)
    angles = positions.float()[:, None] * exponents.exp()
    return torch.stack([angles.sin(), angles.cos()])
