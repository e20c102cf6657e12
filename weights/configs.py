"""A network's config, told from its tensors and, where a folder has one, its config.json.

Sizes come from the tensors, which cannot be wrong about them; config.json adds what no shape tells (heads, groups,
scaling factor), and is held to what these networks can do.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import MotionConfig, TextConfig, UNetConfig, UserError, VAEConfig
from model.motion import frame_encoding
from weights.parts import Part

# Fields of a config.json that have only one value here: another one means a network that is built differently.
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
VAE_FIXED = {
    "act_fn": "silu",
    "latents_mean": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
TEXT_FIXED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
MOTION_FIXED = {
    "conv_in_channels": None,
    "motion_layers_per_block": 2,
    "motion_mid_block_layers_per_block": 1,
    "motion_transformer_layers_per_block": 1,
    "motion_transformer_layers_per_mid_block": 1,
}

V1_FRAMES = 24  # the positional encoding by which AnimateDiff v1 is told from v3


def unet_config(part: Part, motion: MotionConfig | None) -> UNetConfig:
    """The config of the UNet that `part` holds, with those motion modules.

    `attention_head_dim` is the number of heads, whatever it is called: an old mistake of diffusers that files keep.

    Raises:
        UserError: config.json asks for what this network does not have, or contradicts the tensors.
    """
    _check_fixed(part.config, UNET_FIXED, part.source)
    default = UNetConfig()
    heads = part.config.get("num_attention_heads") or part.config.get("attention_head_dim", default.num_attention_heads)
    if isinstance(heads, list) and heads and all(number == heads[0] for number in heads):
        heads = heads[0]
    widths = tuple(
        _size(part.tensors, f"layers.{i}.resnets.0.conv1.weight", 0, width)
        for i, width in enumerate(default.block_out_channels)
    )
    return UNetConfig(
        in_channels=_size(part.tensors, "conv_in.weight", 1, default.in_channels),
        out_channels=_size(part.tensors, "conv_out.weight", 0, default.out_channels),
        block_out_channels=(widths[0], widths[1], widths[2], widths[3]),
        cross_attention_dim=_size(
            part.tensors, "layers.0.spatial.0.transformer_blocks.0.attn2.to_k.weight", 1, default.cross_attention_dim
        ),
        num_attention_heads=_divisor(heads, "attention_head_dim", widths, part.source),
        norm_num_groups=_divisor(part.config.get("norm_num_groups", 32), "norm_num_groups", widths, part.source),
        motion=motion,
    )


def vae_config(part: Part) -> VAEConfig:
    """The config of the autoencoder that `part` holds; raises UserError as `unet_config` does."""
    _check_fixed(part.config, VAE_FIXED, part.source)
    default = VAEConfig()
    widths = tuple(
        _size(part.tensors, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0, width)
        for i, width in enumerate(default.block_out_channels)
    )
    scale = part.config.get("scaling_factor", default.scaling_factor)
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise UserError(f"{part.source}: config.json says scaling_factor = {scale!r}, and a positive number is needed")
    return VAEConfig(
        in_channels=_size(part.tensors, "encoder.conv_in.weight", 1, default.in_channels),
        out_channels=_size(part.tensors, "decoder.conv_out.weight", 0, default.out_channels),
        block_out_channels=widths,
        latent_channels=_size(part.tensors, "decoder.conv_in.weight", 1, default.latent_channels),
        norm_num_groups=_divisor(part.config.get("norm_num_groups", 32), "norm_num_groups", widths, part.source),
        scaling_factor=scale,
    )


def text_config(part: Part) -> TextConfig:
    """The config of the text encoder that `part` holds; without a config.json its heads are 64 wide, as in all of CLIP.

    Raises UserError as `unet_config` does.
    """
    _check_fixed(part.config, TEXT_FIXED, part.source)
    default = TextConfig()
    hidden = _size(part.tensors, "embeddings.token_embedding.weight", 1, default.hidden_size)
    layers = {name.split(".")[2] for name in part.tensors if name.startswith("encoder.layers.")}
    counted = default.num_hidden_layers if hidden == default.hidden_size else len(layers)  # or a lost one goes unseen
    depth = part.config.get("num_hidden_layers", counted)
    heads = part.config.get("num_attention_heads", max(hidden // 64, 1))
    return TextConfig(
        vocab_size=_size(part.tensors, "embeddings.token_embedding.weight", 0, default.vocab_size),
        hidden_size=hidden,
        intermediate_size=_size(part.tensors, "encoder.layers.0.mlp.fc1.weight", 0, default.intermediate_size),
        num_hidden_layers=_divisor(depth, "num_hidden_layers", [], part.source),
        num_attention_heads=_divisor(heads, "num_attention_heads", [hidden], part.source),
        max_position_embeddings=_size(
            part.tensors, "embeddings.position_embedding.weight", 0, default.max_position_embeddings
        ),
    )


def motion_config(part: Part) -> MotionConfig:
    """The config of the motion modules that `part` holds, which is to say AnimateDiff's version.

    A module in the middle block makes v2; without one, a positional encoding of 24 frames makes v1, whose norms pool
    over the frames. A file without encodings is taken for v3, with a warning.

    Raises:
        UserError: as `unet_config` does, or the encodings are not the sinusoid that the network computes.
    """
    _check_fixed(part.config, MOTION_FIXED, part.source)
    default = MotionConfig()
    mid_block = any(name.startswith("layers.4.") for name in part.tensors)
    encodings = {key: tensor for key, tensor in part.unused.items() if key.endswith(".pe")}
    _check_encodings(encodings, part.source)
    frames = part.config.get("motion_max_seq_length") or max((pe.shape[1] for pe in encodings.values()), default=0)
    if not frames and not mid_block:
        warnings.warn(
            f"{part.source} has no positional encodings, by which AnimateDiff v1 (24 frames) and v3 (32 frames) are "
            "told apart: it is taken for v3.",
            stacklevel=2,
        )
    heads = part.config.get("motion_num_attention_heads", default.num_attention_heads)
    groups = part.config.get("motion_norm_num_groups", default.norm_num_groups)
    widths = [tensor.shape[0] for name, tensor in part.tensors.items() if name.endswith(".norm.weight") and tensor.ndim]
    return MotionConfig(
        max_frames=_divisor(frames or default.max_frames, "motion_max_seq_length", [], part.source),
        mid_block=mid_block,
        pool_norms=frames == V1_FRAMES and not mid_block,
        num_attention_heads=_divisor(heads, "motion_num_attention_heads", widths, part.source),
        norm_num_groups=_divisor(groups, "motion_norm_num_groups", widths, part.source),
    )


def _size(tensors: Mapping[str, Tensor], name: str, axis: int, default: int) -> int:
    """The length of one tensor along one axis; the default if it is not there, which the check of names will report."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[axis] if axis < len(shape) else default


def _divisor(value: Any, field: str, widths: Sequence[int], source: Path) -> int:
    if not isinstance(value, int) or value < 1 or any(width < 1 or width % value for width in widths):
        detail = f" that divides {', '.join(map(str, sorted(set(widths))))}" if widths else ""
        raise UserError(
            f"{source} does not fit this network: {field} = {value!r}, where it needs a positive whole number{detail}"
        )
    return value


def _check_encodings(encodings: Mapping[str, Tensor], source: Path) -> None:
    """The file's positional encodings are left aside because they are computed: they had better be the same."""
    for key, pe in encodings.items():
        ours = frame_encoding(pe.shape[1], torch.zeros(pe.shape[2]))[None] if pe.ndim == 3 else torch.zeros(0)
        if pe.shape != ours.shape or not torch.allclose(pe.float(), ours, atol=0.02):  # 0.02: bfloat16, and more
            raise UserError(
                f"{source}: {key} is not the fixed sinusoid of AnimateDiff v1 to v3, so this is another kind of module"
            )


def _check_fixed(stored: Mapping[str, Any], fixed: Mapping[str, Any], source: Path) -> None:
    other = [f"{key} = {stored[key]!r}" for key, value in fixed.items() if key in stored and stored[key] != value]
    if other:
        raise UserError(
            f"{source} is another network than Stable Diffusion 1.5's: its config.json says {', '.join(other)} "
            f"(here: {', '.join(repr(fixed[line.split(' = ')[0]]) for line in other)})"
        )
