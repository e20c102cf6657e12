"""What other tools' LoRA files look like from the inside: the keys, what they can hold, where they go.

The updates that are written here have alpha folded in, so that B A is all there is to add: AnimateDiff and
ComfyUI-AnimateDiff-Evolved read no alpha in motion LoRAs, AnimateDiff none in kohya's files either, and diffusers takes
it from a header that not every release reads. An alpha of r, which kohya's files carry, changes nothing.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora import LowRank
from weights.keymaps import ANIMATEDIFF, UNET_DIFFUSERS

WHAT = {"spatial": "appearance", "temporal": "motion"}  # what an adapter of each kind is trained for


@dataclass(frozen=True)
class Format:
    """A kind of file that other tools load.

    Args:
        kinds: of adapters that it can hold.
        suffixes: of its files.
        keys: {our layer name: its update} -> the file's tensors.
        where: what to do with the file, for people.
        refusal: why it cannot hold the other kind, and what can.
    """

    kinds: tuple[str, ...]
    suffixes: tuple[str, ...]
    keys: Callable[[Mapping[str, LowRank]], dict[str, Tensor]]
    where: str
    refusal: str = ""


def fold(low: LowRank) -> LowRank:
    """The same update with alpha = r, in float32."""
    return LowRank(low.A.float(), low.B.float() * (low.alpha / low.rank), float(low.rank))


def own_keys(weights: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Those of `weights.save_lora`, behind the adapter's name and a dot."""
    names = {ours: UNET_DIFFUSERS.from_ours(ours) for ours in weights}
    halves = {f"{names[ours]}.lora_A.weight": low.A for ours, low in weights.items()}
    return halves | {f"{names[ours]}.lora_B.weight": low.B for ours, low in weights.items()}


def kohya_keys(weights: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """`lora_unet_`, diffusers' name with underscores for dots, and an alpha for every layer."""
    found = {}
    for name, low in _diffusers_names(weights).items():
        stem = "lora_unet_" + name.replace(".", "_")
        found[f"{stem}.lora_down.weight"] = low.A
        found[f"{stem}.lora_up.weight"] = low.B
        found[f"{stem}.alpha"] = torch.tensor(low.alpha)
    return found


def peft_keys(weights: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """`unet.`, diffusers' name, and PEFT's two suffixes."""
    found = {}
    for name, low in _diffusers_names(weights).items():
        found[f"unet.{name}.lora_A.weight"] = low.A
        found[f"unet.{name}.lora_B.weight"] = low.B
    return found


def motion_lora_keys(weights: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """AnimateDiff's name, with `processor.` in front of an attention's projections as in its v2 MotionLoRAs.

    Its readers delete `processor.` and `_lora`, and turn `to_out.` into `to_out.0.`: a name that has the 0 already
    would end up at `to_out.0.0`.
    """
    found = {}
    for ours, low in weights.items():
        name = ANIMATEDIFF.from_ours(ours)
        assert name is not None
        stem = re.sub(r"(attention_blocks\.\d)\.(to_q|to_k|to_v|to_out)(\.0)?$", r"\1.processor.\2", name)
        found[f"{stem}_lora.down.weight"] = low.A
        found[f"{stem}_lora.up.weight"] = low.B
    return found


BOTH = ("spatial", "temporal")
FORMATS = {
    "own": Format(BOTH, (".safetensors",), own_keys, "customttt: --lora, --appearance and --motion."),
    "kohya": Format(
        ("spatial",),
        (".safetensors",),
        kohya_keys,
        "ComfyUI: models/loras, node Load LoRA. A1111: models/Lora, <lora:NAME:1> in the prompt. AnimateDiff: "
        "lora_model_path, with lora_alpha: 1.",
        "kohya's names have no form for motion modules that a tool would load: take --format motion-lora or diffusers",
    ),
    "diffusers": Format(
        BOTH,
        (".safetensors",),
        peft_keys,
        "diffusers: pipe.load_lora_weights(FOLDER, weight_name=FILE)",
    ),
    "motion-lora": Format(
        ("temporal",),
        (".ckpt", ".safetensors"),
        motion_lora_keys,
        "ComfyUI-AnimateDiff-Evolved: models/animatediff_motion_lora, node Load AnimateDiff LoRA. AnimateDiff (.ckpt "
        "alone): motion_module_lora_configs, with alpha: 1.",
        "motion LoRAs are for motion modules, and their readers take nothing else: take --format kohya or diffusers",
    ),
}


def _diffusers_names(weights: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Under diffusers' names, the projections of spatial transformers as the 1x1 convolutions that they are there."""
    down = UNET_DIFFUSERS.write({f"{ours}.weight": low.A for ours, low in weights.items()})
    up = UNET_DIFFUSERS.write({f"{ours}.weight": low.B for ours, low in weights.items()})
    alphas = [low.alpha for low in weights.values()]
    names = [key.removesuffix(".weight") for key in down]
    return {
        name: LowRank(a, b, alpha) for name, a, b, alpha in zip(names, down.values(), up.values(), alphas, strict=True)
    }
