"""The 3D UNet: Stable Diffusion 1.5's image network with AnimateDiff's motion modules between its parts.

`UNet3D.layers[i]` is layer i of the papers, and this table is all there is to know about it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import SpatialTransformer
from model.config import UNetConfig
from model.errors import UserError
from model.motion import MotionModule, group_norm
from model.resnet import Downsample, ResnetBlock, TimeEmbedding, Upsample

# layer  path   width  text   then        (CustomTTT, supplement, Table 2; motion modules are in all but layer 4,
LAYERS = (  #                              where only AnimateDiff v2 has one)
    (0, "down", 0, True, "halve"),
    (1, "down", 1, True, "halve"),
    (2, "down", 2, True, "halve"),
    (3, "down", 3, False, None),
    (4, "mid", 3, True, None),
    (5, "up", 3, False, "double"),
    (6, "up", 2, True, "double"),
    (7, "up", 1, True, "double"),
    (8, "up", 0, True, None),
)


class UNet3D(nn.Module):
    """Predicts the noise in video latents from the diffusion step and the text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.layers = nn.ModuleList()
        channels, skips = widths[0], [widths[0]]
        for index, path, level, text, then in LAYERS:
            layer = Layer(config, index, path, channels, widths[level], text, then, skips)
            self.layers.append(layer)
            channels = widths[level]
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | int,
        text: Tensor | Sequence[Tensor],
        *,
        motion: bool = True,
    ) -> Tensor:
        """The predicted noise (b, c, f, h, w).

        Args:
            latents: (b, c, f, h, w), any height and width of at least 1.
            timesteps: (b,) or one number, in [0, 1000).
            text: CLIP embeddings (b, n, d) for all layers, or a sequence of nine such tensors, one a layer (prompt
                influence, CustomTTT section 3.2). Layers 3 and 5 have no text and ignore theirs.
            motion: False bypasses every motion module: each frame is denoised alone (stage 1, CustomTTT section 3.1).

        Raises:
            UserError: the shapes do not fit the network, or the clip is longer than its positional encoding.
        """
        texts = [text] * len(self.layers) if isinstance(text, Tensor) else list(text)
        self._check(latents, texts, motion)
        batch, _, frames, _, _ = latents.shape
        modules = self.config.motion if motion else None
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(batch)

        time = self.time_embedding(timesteps)
        hidden = self.conv_in(rearrange(latents, "b c f h w -> (b f) c h w"))
        skips = [hidden]
        for layer, words in zip(self.layers, texts, strict=True):
            hidden = layer(hidden, skips, time, words, frames, modules is not None)
        pooled = frames if modules is not None and modules.pool_norms else 1
        hidden = self.conv_out(F.silu(group_norm(self.conv_norm_out, hidden, pooled)))
        return rearrange(hidden, "(b f) c h w -> b c f h w", f=frames)

    def gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute each layer's activations in the backward pass: less memory for about a third more time."""
        for layer in self.layers:
            layer.checkpointing = on

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv_in.weight.device

    def _check(self, latents: Tensor, texts: list[Tensor], motion: bool) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.config.in_channels:
            raise UserError(f"latents must be (b, {self.config.in_channels}, f, h, w), not {tuple(latents.shape)}")
        if len(texts) != len(self.layers):
            raise UserError(f"text must be one tensor or {len(self.layers)}, one a layer; got {len(texts)}")
        batch, width = latents.shape[0], self.config.cross_attention_dim
        for index, words in enumerate(texts):
            if words.ndim != 3 or words.shape[0] != batch or words.shape[2] != width:
                raise UserError(f"text of layer {index} must be ({batch}, n, {width}), not {tuple(words.shape)}")
        limit = self.config.motion.max_frames if self.config.motion else None
        if motion and limit is not None and latents.shape[2] > limit:
            raise UserError(
                f"{latents.shape[2]} frames are more than the motion modules' {limit}: ask for fewer frames"
            )


class Layer(nn.Module):
    """One of the nine: resnets, the spatial transformers and motion modules behind them, and a change of size.

    `.spatial` and `.temporal` are the layer's transformers and motion modules, empty where it has none.
    """

    def __init__(
        self,
        config: UNetConfig,
        index: int,
        path: str,
        channels: int,
        width: int,
        text: bool,
        then: str | None,
        skips: list[int],
    ) -> None:
        super().__init__()
        self.path = path
        self.pool_norms = config.motion is not None and config.motion.pool_norms
        self.checkpointing = False
        time_dim, groups = 4 * config.block_out_channels[0], config.norm_num_groups
        count = {"down": config.layers_per_block, "mid": 2, "up": config.layers_per_block + 1}[path]
        attended = 1 if path == "mid" else count

        self.resnets = nn.ModuleList()
        for _ in range(count):
            skip = skips.pop() if path == "up" else 0
            self.resnets.append(ResnetBlock(channels + skip, width, time_dim, groups))
            channels = width
            if path == "down":
                skips.append(width)
        heads, context_dim = config.num_attention_heads, config.cross_attention_dim
        self.spatial = nn.ModuleList(
            SpatialTransformer(width, heads, context_dim, groups) for _ in range(attended if text else 0)
        )
        self.temporal = nn.ModuleList()
        if config.motion is not None and (path != "mid" or config.motion.mid_block):
            self.temporal.extend(MotionModule(width, config.motion) for _ in range(attended))
        if then == "halve":
            self.downsampler = Downsample(width)
            skips.append(width)
        if then == "double":
            self.upsampler = Upsample(width)
        self.then = then

    def forward(
        self, hidden: Tensor, skips: list[Tensor], time: Tensor, text: Tensor, frames: int, motion: bool
    ) -> Tensor:
        """((b f), c, h, w) -> ((b f), c', h', w'); the way down leaves tensors in `skips`, the way up takes them."""
        for j in range(len(self.resnets)):
            if self.path == "up":
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(self._step, j, hidden, time, text, frames, motion, use_reentrant=False)
            else:
                hidden = self._step(j, hidden, time, text, frames, motion)
            if self.path == "down":
                skips.append(hidden)
        if self.then == "halve":
            hidden = self.downsampler(hidden)
            skips.append(hidden)
        if self.then == "double":
            hidden = self.upsampler(hidden, size=skips[-1].shape[-2:])
        return hidden

    def _step(self, j: int, hidden: Tensor, time: Tensor, text: Tensor, frames: int, motion: bool) -> Tensor:
        hidden = self.resnets[j](hidden, time, frames, pooled=frames if motion and self.pool_norms else 1)
        if j < len(self.spatial):
            hidden = self.spatial[j](hidden, text, frames)
        if motion and j < len(self.temporal):
            hidden = self.temporal[j](hidden, frames)
        return hidden
