"""What the tensors of other tools' LoRA files are called: tables, and how one key is read.

A key is the name of a layer between wrappers and a suffix. Every key is read by itself, since there are files that mix
the forms (diffusers' own conversion renames attention projections and leaves `proj_in.lora_A` behind). The layouts are
those of kohya's sd-scripts, of diffusers in its three generations, of PEFT, AnimateDiff and AnimateDiff-MotionDirector.
"""

import re
from dataclasses import dataclass, replace

from torch import nn

from model import UNet3D
from weights.keymaps import ANIMATEDIFF, UNET_DIFFUSERS, UNET_LDM


@dataclass(frozen=True)
class Form:
    """One way of naming the two halves of a layer's update.

    Args:
        name: whose it is.
        down: what stands behind the layer's name for A (r, in), a regular expression.
        up: the same for B (out, r).
        has_config: whether a header or an adapter_config.json may say alpha (kohya's files bring it as a tensor).
    """

    name: str
    down: str
    up: str
    has_config: bool = False


FORMS = (
    Form("kohya", r"\.lora_down\.weight", r"\.lora_up\.weight"),
    Form("attention processors", r"_lora\.down\.weight", r"_lora\.up\.weight"),
    Form("diffusers", r"\.lora\.down\.weight", r"\.lora\.up\.weight", has_config=True),
    Form("diffusers", r"\.lora_linear_layer\.down\.weight", r"\.lora_linear_layer\.up\.weight", has_config=True),
    Form("PEFT", r"\.lora_A(\.\w+)?\.weight", r"\.lora_B(\.\w+)?\.weight", has_config=True),
)
ALPHA = Form("", r"(?!)", r"(?!)")
ALPHA_SUFFIX = r"(_lora|\.lora|\.lora_linear_layer)?\.alpha"

# Before the layer's name, in any order and number; after them it tells by itself which network it is of.
WRAPPERS = ("module.", "base_model.model.", "unet.", "text_encoder.", "model.diffusion_model.", "diffusion_model.")
IGNORED = {r"animatediff_config(\..*)?": "a note to AnimateDiff's own loader"}

# kohya's names are those of diffusers (or LDM) with underscores for dots, behind the name of the network; `te1` is what
# its scripts call the same text encoder where there are two.
KOHYA = {"unet": ("lora_unet_",), "text": ("lora_te_", "lora_te1_")}
TEXT_HEADS = ("", "text_model.")  # transformers since 5.6, and before
UNET_NAMES = (UNET_DIFFUSERS, replace(UNET_LDM, prefix=""), ANIMATEDIFF)

# Other spellings of a layer's end: attention processors count `to_out` as one layer, and call CLIP's like the UNet's.
ENDS = (
    (r"\.to_out\.0$", ".to_out"),
    (r"(self_attn)\.(q|k|v|out)_proj$", r"\1.to_\2"),
)


@dataclass(frozen=True)
class LoRAKey:
    """A key of a LoRA file, taken apart.

    Args:
        form: how it is named.
        layer: the layer it belongs to, in the file's spelling without wrappers.
        role: "down" (A), "up" (B) or "alpha".
    """

    form: Form
    layer: str
    role: str


def read_key(key: str) -> LoRAKey | None:
    """Take a key apart; None where it is none of a LoRA's."""
    name = re.sub(r"(?<![^.])processor\.", "", key)
    while found := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(found)
    for form in FORMS:
        for role, suffix in (("down", form.down), ("up", form.up)):
            if match := re.fullmatch(rf"(.+?){suffix}", name):
                return LoRAKey(form, match[1], role)
    match = re.fullmatch(rf"(.+?){ALPHA_SUFFIX}", name)
    return LoRAKey(ALPHA, match[1], "alpha") if match else None


def spellings(unet: UNet3D, text: nn.Module | None = None) -> dict[str, tuple[str, str]]:
    """Every name that a file may have for a layer that can carry a LoRA.

    Looking a name up is the only safe way for kohya's: underscores stand for dots in it, and for themselves.

    Args:
        unet: the network.
        text: transformers' CLIPTextModel; None leaves the text encoder's layers out.

    Returns:
        {name in a file, as `LoRAKey.layer`: ("unet" or "text", our name in that network)}
    """
    found: dict[str, tuple[str, str]] = {}
    for ours in _layers(unet):
        dotted = [theirs for layout in UNET_NAMES if (theirs := layout.from_ours(ours)) is not None]
        found |= dict.fromkeys(_spelled("unet", dotted), ("unet", ours))
    for ours in _layers(text) if text is not None else ():
        dotted = [head + ours for head in TEXT_HEADS]
        found |= dict.fromkeys(_spelled("text", dotted), ("text", ours))
    return found


def _layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _spelled(part: str, dotted: list[str]) -> list[str]:
    names = list(dict.fromkeys([*dotted, *(re.sub(end, other, name) for name in dotted for end, other in ENDS)]))
    return [*names, *(prefix + name.replace(".", "_") for name in names for prefix in KOHYA[part])]
