"""The tensors of real checkpoint files, by name, shape and (random) value; `bases.py` puts them into files.

Names and their order come from `manifests/` (facts of the published files); which layout calls a tensor what, from
diffusers' own converters; shapes, from the manifests ("full") or from diffusers' models ("narrow"). Nothing here knows
`weights/keymaps.py`, so that it can serve as its test. One seed gives one set of weights, whatever the layout.
"""

import json
import math
import os
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel
from diffusers.loaders import single_file_utils as converters
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

MANIFESTS = Path(__file__).parent / "manifests"

WIDTHS = {
    "full": {"unet": [320, 640, 1280, 1280], "vae": [128, 256, 512, 512], "text": 768},
    "narrow": {"unet": [32, 64, 96, 96], "vae": [32, 64, 96, 96], "text": 128},
}
VOCAB_SIZES = {"full": 49408, "narrow": 1024}


class Entry(NamedTuple):
    """One tensor of a file: its key there, its name in diffusers behind that of its network, its shape."""

    key: str
    name: str
    shape: tuple[int, ...]


def tensors(file: str, width: str = "narrow", dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The contents of one file, named by its manifest ("sd15_ldm_single_file", "animatediff_v1_motion_module", ...)."""
    return {entry.key: value(entry, dtype, seed) for entry in entries(file, width)}


@cache
def entries(file: str, width: str = "narrow") -> tuple[Entry, ...]:
    """The tensors of the file that `manifests/<file>.json` describes, in its order, at a width."""
    shapes, names = manifest(file), _names(file)
    if width == "full":
        return tuple(Entry(key, names[key], shape) for key, shape in shapes.items())
    found = []
    for key, name in names.items():
        shape = shapes[key]
        if name.endswith(".pe"):
            shape = (1, shape[1], _narrow_shapes()[name][2])
        elif not name.startswith("constant."):
            if name not in _narrow_shapes():
                continue  # a layer of the text encoder that the narrow one does not have
            narrow = _narrow_shapes()[name]
            shape = narrow + (1,) * (len(shape) - len(narrow))
        found.append(Entry(key, name, shape))
    return tuple(found)


def manifest(file: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published file, in its order."""
    listed = json.loads((MANIFESTS / f"{file}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in listed.items()}


def hollow(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: Literal["F16", "F32"] = "F16", **metadata: str
) -> Path:
    """A safetensors file, by any name, of zeros in these shapes, which take no room on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * {"F16": 2, "F32": 4}[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def value(entry: Entry, dtype: torch.dtype, seed: int) -> Tensor:
    """Random weights of a size that keeps activations near 1, the same for one name and seed in every layout."""
    name, shape = entry.name, entry.shape
    if name.startswith("constant."):
        known = _constants()[name.removeprefix("constant.")]
        return known if not known.is_floating_point() else known.to(dtype)
    if name.endswith(".pe"):
        return _sinusoid(shape[1], shape[2]).to(dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    weights = torch.randn(shape, generator=generator)
    if "norm" in name:
        weights = 1 + 0.1 * weights if name.endswith("weight") else 0.1 * weights
    elif name.endswith("bias"):
        weights *= 0.1
    else:
        weights /= math.sqrt(math.prod(shape[1:]))
    return weights.to(dtype)


def unet_config(width: str) -> dict[str, Any]:
    """`unet/config.json`: what an old file says, newer fields left to their defaults."""
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
        "block_out_channels": WIDTHS[width]["unet"],
        "layers_per_block": 2,
        "cross_attention_dim": WIDTHS[width]["text"],
        "attention_head_dim": 8,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    }


def vae_config(width: str) -> dict[str, Any]:
    """`vae/config.json`; like the oldest, it does not tell the scaling factor."""
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "sample_size": 512,
        "block_out_channels": WIDTHS[width]["vae"],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def text_config(width: str) -> dict[str, Any]:
    """`text_encoder/config.json`."""
    full, hidden, vocab_size = width == "full", WIDTHS[width]["text"], VOCAB_SIZES[width]
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 12 if full else 2,
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": hidden,
    }


def motion_config(version: str, width: str) -> dict[str, Any]:
    """`config.json` of a MotionAdapter."""
    return {
        "_class_name": "MotionAdapter",
        "block_out_channels": WIDTHS[width]["unet"],
        "motion_layers_per_block": 2,
        "motion_max_seq_length": 24 if version == "v1" else 32,
        "motion_mid_block_layers_per_block": 1,
        "motion_norm_num_groups": 32,
        "motion_num_attention_heads": 8,
        "use_motion_mid_block": version == "v2",
    }


@cache
def _narrow_shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(unet_config("narrow")),
            "vae": AutoencoderKL.from_config(vae_config("narrow")),
            "text": CLIPTextModel(CLIPTextConfig.from_dict(text_config("narrow"))),
            "motion": MotionAdapter.from_config(motion_config("v2", "narrow")),
        }
    return {
        f"{part}.{name}": tuple(t.shape) for part, model in models.items() for name, t in model.state_dict().items()
    }


@cache
def _names(file: str) -> dict[str, str]:
    """{key in the file: "unet.", "vae.", "text." or "motion." + diffusers' name, or "constant." + what it holds}."""
    shapes = manifest(file)
    if file == "sd15_ldm_single_file":
        names = {
            **_traced(shapes, "unet", lambda t: converters.convert_ldm_unet_checkpoint(t, unet_config("full"))),
            **_traced(shapes, "vae", lambda t: converters.convert_ldm_vae_checkpoint(t, vae_config("full"))),
            **_traced(shapes, "text", converters.convert_ldm_clip_checkpoint),
        }
    elif file.startswith("animatediff_v"):
        names = _traced(shapes, "motion", converters.convert_animatediff_checkpoint_to_diffusers)
        pe = {key: key.split("attention_blocks")[0].replace("temporal_transformer.", "") for key in shapes}
        names |= {key: f"motion.{block}pos_embed.pe" for key, block in pe.items() if key.endswith(".pe")}
    else:
        part = "motion" if "motion" in file else file.removeprefix("sd15_diffusers_")
        names = {key: f"{part}.{key}" for key in shapes}
    names = {key: name.replace("text.text_model.", "text.") for key, name in names.items()}
    constant = {key: f"constant.{key.rpartition('.')[2]}" for key in shapes}
    return {key: constant[key] if _is_constant(key) else names[key] for key in shapes}


def _traced(
    shapes: dict[str, tuple[int, ...]], part: str, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, str]:
    """What `convert` renames each key to, found by sending numbered one-element tensors through it."""
    keys = list(shapes)
    numbered = {key: torch.full([1] * len(shapes[key]), float(number)) for number, key in enumerate(keys)}
    return {keys[int(tensor.item())]: f"{part}.{name}" for name, tensor in convert(numbered).items()}


def _is_constant(key: str) -> bool:
    return key.rpartition(".")[2] in _constants()


@cache
def _constants() -> dict[str, Tensor]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    return {
        "position_ids": torch.arange(77)[None],
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": torch.cat([torch.ones(1), alphas[:-1]]),
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
    }


def _sinusoid(length: int, channels: int) -> Tensor:
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, channels, 2) / channels)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(1, length, channels)
