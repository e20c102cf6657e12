"""LoRA files as other tools write them, by those tools' rules; nothing here knows `weights/lora_keys.py`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from oracles import diffusers_name, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

from lora import LowRank, adapter_modules, adapter_names, merge_adapters, remove_adapter, unmerge_adapters
from model import SD15_V3, UNet3D, UNetConfig
from weights import load_lora

SPATIAL = r"layers\.\d\.spatial\.\d\."
TEMPORAL = r"layers\.\d\.temporal\.\d\."
ATTENTION = r"transformer_blocks\.0\.attn[12]\.to_(q|k|v|out\.0)"
BLOCK = r"transformer_blocks\.0\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
CLIP = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"


def targets(network: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The linear and convolutional layers whose names fit the pattern."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {n: m for n, m in layers.items() if re.fullmatch(pattern, n)}


def random_weights(network: nn.Module, pattern: str, seed: int = 0, alpha: float | None = None) -> dict[str, LowRank]:
    """Updates for the layers that fit, of ranks 2 to 4; alpha is the rank (as in files without one) if not given."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, (name, layer) in enumerate(targets(network, pattern).items()):
        rank, (out, *inner) = 2 + i % 3, layer.weight.shape
        down = torch.randn(rank, *inner, generator=generator) / layer.weight[0].numel() ** 0.5
        up = 0.5 * torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator)
        found[name] = LowRank(down, up, float(rank) if alpha is None else alpha)
    return found


def merged_by_hand(network: nn.Module, weights: dict[str, LowRank], strength: float) -> dict[str, Tensor]:
    """W + strength * (alpha / r) * up @ down, of each layer that has an update."""
    found = {}
    for name, low in weights.items():
        weight = network.get_submodule(name).weight
        update = torch.einsum("or,ri->oi", low.B.reshape(len(low.B), -1), low.A.reshape(len(low.A), -1))
        found[name] = weight + strength * low.alpha / low.A.shape[0] * update.reshape(weight.shape)
    return found


def as_file(name: str, tensor: Tensor) -> Tensor:
    """Projections of spatial transformers are 1x1 convolutions in Stable Diffusion 1.5's files."""
    return tensor[:, :, None, None] if re.fullmatch(SPATIAL + "proj_(in|out)", name) else tensor


def kohya(weights: dict[str, LowRank], prefix: str = "lora_unet_", spell=diffusers_name) -> dict[str, Tensor]:
    """sd-scripts: the module's name, dots turned to underscores; alpha beside it, in half precision."""
    found = {}
    for name, low in weights.items():
        stem = prefix + spell(name).replace(".", "_")
        found[f"{stem}.lora_down.weight"] = as_file(name, low.A)
        found[f"{stem}.lora_up.weight"] = as_file(name, low.B)
        found[f"{stem}.alpha"] = torch.tensor(low.alpha, dtype=torch.float16)
    return found


def kohya_text(weights: dict[str, LowRank]) -> dict[str, Tensor]:
    """The same for the text encoder, which is named as in transformers before 5.6."""
    return kohya(weights, "lora_te_text_model_", spell=str)


def dotted(weights: dict[str, LowRank], prefix: str = "", down=".lora_A.weight", up=".lora_B.weight", spell=None):
    """A dotted name (diffusers', or `spell`'s) and a suffix for either half."""
    found = {}
    for name, low in weights.items():
        found[prefix + (spell or diffusers_name)(name) + down] = as_file(name, low.A)
        found[prefix + (spell or diffusers_name)(name) + up] = as_file(name, low.B)
    return found


def attention_processors(weights: dict[str, LowRank], prefix: str = "") -> dict[str, Tensor]:
    """diffusers before 2024 and AnimateDiff's v3 adapter: `attn1.processor.to_q_lora.down.weight`, `to_out_lora`."""
    return {
        re.sub(r"(attn[12])\.to_(q|k|v|out)(\.0)?_lora", r"\1.processor.to_\2_lora", key): tensor
        for key, tensor in dotted(weights, prefix, "_lora.down.weight", "_lora.up.weight").items()
    }


def animatediff_name(name: str) -> str:
    """AnimateDiff's name of a motion module's layer."""
    name = re.sub(r"(motion_modules\.\d)\.", r"\1.temporal_transformer.", diffusers_name(name))
    return name.replace("attn1", "attention_blocks.0").replace("attn2", "attention_blocks.1")


def motion_lora(weights: dict[str, LowRank]) -> dict[str, Tensor]:
    """AnimateDiff v2's MotionLoRAs: `attention_blocks.0.processor.to_q_lora.down.weight`, `to_out_lora`."""
    return {
        re.sub(r"(attention_blocks\.\d)\.to_(q|k|v|out)(\.0)?_lora", r"\1.processor.to_\2_lora", key): tensor
        for key, tensor in dotted(weights, "", "_lora.down.weight", "_lora.up.weight", animatediff_name).items()
    }


def motion_director_temporal(weights: dict[str, LowRank]) -> dict[str, Tensor]:
    """MotionDirector puts `processor` before the last segment, whatever that is: `to_out.processor.0_lora`."""
    keys = dotted(weights, "", "_lora.down.weight", "_lora.up.weight", animatediff_name)
    return {re.sub(r"\.(\w+_lora\.)", r".processor.\1", key): tensor for key, tensor in keys.items()}


def motion_director_spatial(weights: dict[str, LowRank]) -> dict[str, Tensor]:
    """As attention processors, feed-forward and proj_in without `processor`; proj_out is trained and not saved."""
    return attention_processors({name: low for name, low in weights.items() if not name.endswith("proj_out")})


def small(config: UNetConfig = SD15_V3) -> UNet3D:
    """A random UNet, as narrow as it can be."""
    return (
        randomise(UNet3D(replace(config, block_out_channels=(32, 32, 32, 32), cross_attention_dim=16)))
        .eval()
        .requires_grad_(False)
    )


def loaded(network: UNet3D, path: Path, **options: Any) -> str:
    """The one adapter that a file gives."""
    [(name, entry)] = load_lora(network, path, **options).items()
    assert entry is None
    return name


def written(
    folder: Path, tensors: dict[str, Any], name: str = "theirs.safetensors", metadata: dict[str, str] | None = None
) -> Path:
    """The tensors as a file, .safetensors or pickled by the name."""
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    else:
        torch.save(tensors, path)
    return path


def assert_merges_as_by_hand(network: nn.Module, name: str, weights: dict[str, LowRank], strength: float = 0.8) -> None:
    """Each layer's weight, with the file merged, is W + s * alpha / r * up @ down; no other layer has an update."""
    assert adapter_modules(network, name).keys() == weights.keys()
    expected = merged_by_hand(network, weights, strength)
    before = {layer: network.get_submodule(layer).weight.clone() for layer in weights}
    merge_adapters(network, {name: strength})
    for layer, value in expected.items():
        assert torch.allclose(network.get_submodule(layer).weight, value, atol=1e-6), layer
        assert not torch.equal(value, before[layer]), layer
    unmerge_adapters(network)


def without_adapters(network: nn.Module) -> None:
    """Take all adapters out, merged ones too."""
    unmerge_adapters(network)
    for name in adapter_names(network):
        remove_adapter(network, name)
