"""The numbers that tell one checkpoint family from another: frozen dataclasses and the presets built from them."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MotionConfig:
    """The motion modules (temporal transformers) of AnimateDiff.

    Args:
        max_frames: longest clip the positional encoding was trained for (v1: 24, v2 and v3: 32).
        mid_block: a motion module in layer 4 (v2 only).
        pool_norms: the resnets' norms and the last norm take their statistics over frames and space together, as
            AnimateDiff v1 was trained (its `use_inflated_groupnorm: false`); off where motion is bypassed.
        pool_module_norm: each module's own group norm takes its statistics over frames and space together. AnimateDiff
            (and ComfyUI, A1111 with it) normalises every frame alone, in all three versions, and so do we; diffusers
            pools. The switch gives diffusers' numbers, which the parity tests compare with.
        num_attention_heads: heads of each temporal attention.
        norm_num_groups: groups of each module's own group norm.
    """

    max_frames: int = 32
    mid_block: bool = False
    pool_norms: bool = False
    pool_module_norm: bool = False
    num_attention_heads: int = 8
    norm_num_groups: int = 32


@dataclass(frozen=True)
class UNetConfig:
    """The denoising network of Stable Diffusion 1.5; `motion=None` is the image-only network."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, int, int, int] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    num_attention_heads: int = 8
    norm_num_groups: int = 32
    motion: MotionConfig | None = None


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pixels and latents; latents are scaled by `scaling_factor` on the way in."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent along one side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """The text tower of CLIP ViT-L/14, in transformers' names."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"


@dataclass(frozen=True)
class Recipe:
    """What a base is customised with unless a flag says otherwise (CustomTTT, section 4.1 and supplement, Table 2).

    The numbers here are the paper's for Stable Diffusion 1.5; another base brings its own.
    """

    appearance_layers: tuple[int, ...] = (2, 6)
    motion_layers: tuple[int, ...] = (2, 5)
    rank: int = 32
    dropout: float = 0.1
    weight_decay: float = 0.1
    timestep_skew: float = 1.0
    appearance_steps: int = 500
    appearance_learning_rate: float = 1e-5
    appearance_batch_size: int = 1
    motion_steps: int = 500
    motion_learning_rate: float = 5e-5
    motion_batch_size: int = 1
    ttt_steps: int = 30
    ttt_learning_rate: float = 1e-6
    reference_steps: int = 5
    sampling_steps: int = 25
    guidance_scale: float = 9.0
    num_frames: int = 16
    height: int = 256
    width: int = 256
    fps: int = 8


SD15 = UNetConfig()
SD15_V1 = replace(SD15, motion=MotionConfig(max_frames=24, pool_norms=True))
SD15_V2 = replace(SD15, motion=MotionConfig(mid_block=True))
SD15_V3 = replace(SD15, motion=MotionConfig())
TINY = UNetConfig(
    block_out_channels=(32, 64, 128, 128),
    cross_attention_dim=64,
    norm_num_groups=8,
    motion=MotionConfig(norm_num_groups=8),
)
