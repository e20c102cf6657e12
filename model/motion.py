"""The motion module of AnimateDiff: a transformer along the frames, at every position alone."""

import torch
from einops import rearrange
from torch import Tensor, nn

from model.attention import TransformerBlock, sinusoid
from model.config import MotionConfig

# CUDA's attention kernels take no more than 65535 sequences at once; a batch of clips may have more positions.
MOST_POSITIONS = 32768


class TemporalBlock(TransformerBlock):
    """Two self-attentions over the frames; the position is added to what each of them sees."""

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        """hidden (n, f, c), position (f, c) -> (n, f, c)."""
        hidden = hidden + self.attn1(self.norm1(hidden) + position)
        hidden = hidden + self.attn2(self.norm2(hidden) + position)
        return hidden + self.ff(self.norm3(hidden))


class MotionModule(nn.Module):
    """A temporal block between two linear maps, around a residual (AnimateDiff, section 4.2)."""

    def __init__(self, dim: int, config: MotionConfig) -> None:
        super().__init__()
        self.pool_norm = config.pool_module_norm
        self.norm = nn.GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(dim, config.num_attention_heads)])
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, frames: int) -> Tensor:
        """((b f), c, h, w) -> ((b f), c, h, w)."""
        height, width = hidden.shape[-2:]
        normed = group_norm(self.norm, hidden, frames if self.pool_norm else 1)
        tokens = self.proj_in(rearrange(normed, "(b f) c h w -> (b h w) f c", f=frames))
        position = frame_encoding(frames, tokens)
        for block in self.transformer_blocks:
            parts = tokens.split(MOST_POSITIONS)
            tokens = block(tokens, position) if len(parts) == 1 else torch.cat([block(p, position) for p in parts])
        out = rearrange(self.proj_out(tokens), "(b h w) f c -> (b f) c h w", h=height, w=width)
        return hidden + out


def frame_encoding(frames: int, like: Tensor) -> Tensor:
    """The sinusoid that tells frames apart, (frames, c): sine in even channels, cosine in odd ones.

    It is fixed, so that it is no parameter here; the `pe` tensors of motion-module files hold the same numbers.
    """
    sine, cosine = sinusoid(torch.arange(frames, device=like.device), like.shape[-1])
    return torch.stack([sine, cosine], dim=-1).flatten(1).to(like.dtype)


def group_norm(norm: nn.GroupNorm, hidden: Tensor, pooled: int) -> Tensor:
    """`norm` of ((b f), c, h, w) with statistics over space and `pooled` consecutive frames (1: each frame alone)."""
    if pooled == 1:
        return norm(hidden)
    video = rearrange(hidden, "(b f) c h w -> b c f h w", f=pooled)
    return rearrange(norm(video), "b c f h w -> (b f) c h w")
