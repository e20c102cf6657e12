"""The table of fingerprints: which names and shapes make a file what it is, and where that file belongs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Width of the text (or of its vectors) in each family; SDXL has a second, wider text encoder.
FAMILY_OF_WIDTH = {768: "sd15", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}


class Tensors:
    """The names and shapes of a file, with the few questions that rows below ask of them."""

    def __init__(self, shapes: Mapping[str, Any]) -> None:
        self.shapes = {name: tuple(getattr(entry, "shape", entry)) for name, entry in shapes.items()}
        self.text = "\n".join(self.shapes)

    def has(self, pattern: str) -> bool:
        """Is the pattern found in any name? `^` and `$` are a name's ends."""
        return re.search(pattern, self.text, re.MULTILINE) is not None

    def size(self, pattern: str, axis: int) -> int:
        """Length along an axis of the first tensor whose name holds the pattern; 0 if there is none."""
        found = (shape for name, shape in self.shapes.items() if re.search(pattern, name))
        shape = next(found, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else 0


def _family_of_text(tensors: Tensors) -> str:
    """By the width of the text that cross-attention takes, or that a text encoder or an embedding gives."""
    if tensors.has(r"^lora_te2_|^conditioner\.embedders\.1|add_embedding\.linear_1\.weight$|^clip_g$"):
        return "sdxl"
    if tensors.has(r"^cond_stage_model\.model\.|resblocks\."):
        return "sd2"
    for pattern in (r"attn2[._](processor\.)?to_[kv](\.weight|.*(down|lora_A).*weight)$", r"token_embedding\.weight$"):
        if width := tensors.size(pattern, -1):
            return FAMILY_OF_WIDTH.get(width, "")
    return ""


def _family_of_vectors(tensors: Tensors) -> str:
    width = tensors.size("^string_to_param", -1) or tensors.size("", -1)  # older files hold token numbers beside them
    return "sdxl" if tensors.has("^clip_g$") else FAMILY_OF_WIDTH.get(width, "")


def _family_of_motion(tensors: Tensors) -> str:
    """SDXL has three down blocks, Stable Diffusion 1.5 four."""
    return "sd15" if tensors.has(r"(down|up)_blocks\.3\.|^mid_block\.") else "sdxl"


def _version_of_motion(tensors: Tensors) -> str:
    if tensors.has(r"^mid_block\..*motion_modules"):
        return "v2"
    return {24: "v1", 32: "v3"}.get(tensors.size(r"\.pe$", 1), "")


def _version_of_motion_lora(tensors: Tensors) -> str:
    if tensors.has(r"\.processor\.0_lora\.|ff\.net\..*(processor\.|\.lora_(down|up)\.)"):
        return "MotionDirector"
    return "v2" if tensors.has(r"^mid_block\.") else ""


def _version_of_spatial_lora(tensors: Tensors) -> str:
    if tensors.has(r"proj_in_lora\."):
        return "MotionDirector"
    large = tensors.size(r"_lora\.down\.weight$", 0) >= 128
    return "v3 domain adapter" if large and len(tensors.shapes) == 256 and not tensors.has("^unet|^text") else ""


def _version_of_unet(tensors: Tensors) -> str:
    channels = tensors.size(r"(input_blocks\.0\.0|^conv_in)\.weight$", 1)
    return {9: "inpainting", 8: "pix2pix"}.get(channels, "")


def _is_one_embedding(tensors: Tensors) -> bool:
    """One entry, named by the word it stands for: (width) or (n, width)."""
    if len(tensors.shapes) != 1:
        return False
    name, shape = next(iter(tensors.shapes.items()))
    return len(shape) in (1, 2) and re.fullmatch(r"[^.]*|<.*>", name) is not None


def _has(*patterns: str, no: str = r"(?!)") -> Callable[[Tensors], bool]:
    """A test that all patterns are found, and `no` is not."""
    return lambda tensors: all(map(tensors.has, patterns)) and not tensors.has(no)


@dataclass(frozen=True)
class Row:
    """One fingerprint; the first row whose test holds names the file."""

    kind: str
    test: Callable[[Tensors], bool]
    note: str
    family: Callable[[Tensors], str] | str = ""
    version: Callable[[Tensors], str] | str = ""


_LDM = r"^model\.diffusion_model\.input_blocks\.0\.0\.weight$"
_FOREIGN_LORA = "It belongs in --lora."
_EMBEDDING = (
    "This is a textual-inversion embedding: vectors for a new word of the prompt, not weights of a network. It belongs "
    "in --embedding."
)
# How the kinds of adapters that are no plain LoRA name their tensors.
_LYCORIS = {
    "LoHa": r"\.hada_w\d",
    "LoKr": r"\.lokr_w\d",
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
    "OFT": r"\.b?oft_",
    "LoCon with a Tucker core": r"\.lora_mid\.",
    "full difference": r"\.diff(_b)?$",
}
_NOT_SD15 = "customttt works with Stable Diffusion 1.5 and AnimateDiff, and has no place for it."

# fmt: off
ROWS: tuple[Row, ...] = (
    Row("nameless LoRA", _has(r"^\[0\]$|^unet:\d+:"),
        "This is a LoRA whose tensors have no names (written by early scripts of cloneofsimo and showlab): nothing "
        "says which layer each belongs to, so it cannot be used."),
    Row("textual inversion", _has(r"^string_to_param|^emb_params$|^clip_[lg]$"),
        _EMBEDDING,
        _family_of_vectors),
    Row("textual inversion", _is_one_embedding,
        _EMBEDDING,
        _family_of_vectors),
    *(Row("LyCORIS", _has(pattern),
          f"This is a {name} file (LyCORIS's or PEFT's), which is not a plain LoRA; customttt does not read it.",
          _family_of_text, name)
      for name, pattern in _LYCORIS.items()),
    Row("kohya LoRA", _has(r"^lora_(unet|te\d?)_"),
        f"This is an image LoRA as kohya's scripts write it. {_FOREIGN_LORA}",
        _family_of_text),
    Row("motion LoRA", _has("lora", r"motion_modules\."),
        "This is a motion LoRA (camera moves of AnimateDiff v2, or MotionDirector's): a small change to a motion "
        "module. It belongs in --lora; --motion_module wants a base motion module such as v3_sd15_mm.ckpt.",
        "sd15", _version_of_motion_lora),
    Row("spatial LoRA", _has("lora", r"\.attentions\."),
        "This is a LoRA for the image layers (diffusers' or PEFT's form, AnimateDiff's v3 domain adapter, or "
        f"MotionDirector's spatial part). {_FOREIGN_LORA}",
        _family_of_text, _version_of_spatial_lora),
    Row("other LoRA", _has(r"lora_A|lora_B|[._]lora[._]"),
        "This is a LoRA, but no transformer of Stable Diffusion 1.5's UNet is in it: it is for the text encoder, or "
        "for another model. It belongs in --lora, if it is for the text encoder."),
    Row("controlnet", _has("controlnet_cond_embedding|input_hint_block", "motion_modules"),
        f"This is AnimateDiff's SparseCtrl encoder (sketches and key frames as conditions). {_NOT_SD15}",
        "sd15", "SparseCtrl"),
    Row("controlnet", _has("controlnet_cond_embedding|input_hint_block"),
        f"This is a ControlNet. {_NOT_SD15}",
        _family_of_text),
    Row("another model", _has(r"(double_blocks|joint_blocks|single_transformer_blocks)\.\d|time_stack\.|time_mixer\."),
        f"This is a newer image or video model (Stable Diffusion 3, Flux, Stable Video Diffusion ...). {_NOT_SD15}"),
    Row("one-file checkpoint", _has(r"^conditioner\.embedders\."),
        "This is a one-file SDXL checkpoint.",
        "sdxl"),
    Row("one-file checkpoint", _has(_LDM, r"^(cond_stage_model|first_stage_model)\."),
        "This is a one-file Stable Diffusion checkpoint. It belongs in --base.",
        _family_of_text, _version_of_unet),
    Row("UNet", _has(r"^(model\.diffusion_model\.)?input_blocks\.0\.0\.weight$", no="temopral_conv"),
        "This is the UNet of a Stable Diffusion checkpoint alone, without VAE and text encoder; --base "
        "wants all three.",
        _family_of_text, _version_of_unet),
    Row("image-to-video module", _has(r"motion_modules\.", r"^img_encoder\."),
        f"This is AnimateLCM-I2V, a motion module that is led by an image encoder. {_NOT_SD15}",
        "sd15", "AnimateLCM-I2V"),
    Row("image-to-video module", lambda t: t.has(r"motion_modules\.") and t.size(r"^conv_in\.weight$", 1) > 4,
        f"This is a motion module that is led by an image (PIA, FancyVideo). {_NOT_SD15}",
        "sd15", "PIA"),
    Row("motion module", _has(r"temporal_attentions\.\d", r"positional_encoding"),
        "This is HotshotXL's motion module.",
        "sdxl", "HotshotXL"),
    Row("motion module", _has(r"motion_modules\.", "temporal_transformer", r"^conv_in\.weight$"),
        "This is a training snapshot of AnimateDiff: a motion module together with its whole UNet, which is left "
        "aside. It belongs in --motion_module.",
        _family_of_motion, _version_of_motion),
    Row("motion module", _has(r"motion_modules\.", "temporal_transformer"),
        "This is an AnimateDiff motion module. It belongs in --motion_module.",
        _family_of_motion, _version_of_motion),
    Row("motion UNet", _has(r"motion_modules\.", r"^conv_in\.weight$"),
        "This is a whole UNet with motion modules, as diffusers saves it. --base wants a Stable Diffusion 1.5 "
        "checkpoint, --motion_module the motion module alone.",
        _family_of_motion, _version_of_motion),
    Row("motion adapter", _has(r"motion_modules\."),
        "This is an AnimateDiff motion module in diffusers' form (MotionAdapter). It belongs in --motion_module.",
        _family_of_motion, _version_of_motion),
    Row("UNet", _has(r"^transformer_in\.|\.temp_convs\.|temopral_conv"),
        "This is the video UNet of ModelScope's text-to-video model.",
        "modelscope"),
    Row("UNet", _has(r"^conv_in\.weight$", r"^down_blocks\.0\."),
        "This is the UNet of a diffusers folder alone. --base wants the folder that holds it, with the VAE, the text "
        "encoder and the tokenizer.",
        _family_of_text, _version_of_unet),
    Row("another model", lambda t: t.has(r"decoder\.conv_in\.weight$") and t.size(r"decoder\.conv_in\.weight$", 1) != 4,
        f"This is the autoencoder of a newer model, whose latents do not have 4 channels. {_NOT_SD15}"),
    Row("VAE", _has(r"decoder\.conv_in\.weight$", r"quant_conv\.weight$"),
        "This is an autoencoder (VAE). It belongs in --vae, if it was made for Stable Diffusion 1.x or 2.x."),
    Row("text encoder", _has(r"token_embedding\.weight$|transformer\.resblocks\."),
        "This is a CLIP text encoder alone. --base wants the folder or the checkpoint that holds it.",
        _family_of_text),
)
# fmt: on
