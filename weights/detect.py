"""What is this file? Told by its first bytes, then by the names and shapes of its tensors, never by its own name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from model.errors import UserError
from weights.files import read_header, read_json
from weights.kinds import FAMILY_OF_WIDTH, ROWS, Tensors
from weights.peft_config import ADAPTER_FILES

TOKEN_FILE = "embedding.safetensors"  # a learned word's, in the run folder of an absorber


@dataclass(frozen=True)
class FileKind:
    """What a file or folder is.

    Args:
        kind: "motion module", "one-file checkpoint", "kohya LoRA", "image", ... ("unknown": nothing known fits).
        family: of models, where it is certain: "sd15", "sd2", "sdxl" or "modelscope"; "" otherwise.
        version: within the kind: "v1" to "v3", "inpainting", "MotionDirector", "JPEG", ... or "".
        note: sentences for people: what it is, and where it belongs.
    """

    kind: str
    family: str = ""
    version: str = ""
    note: str = ""


NOTES = {
    "sd2": "It is for Stable Diffusion 2, whose text is 1024 wide; customttt works with Stable Diffusion 1.5 (768).",
    "sdxl": "It is for SDXL, a larger network of another shape; customttt works with Stable Diffusion 1.5.",
    "modelscope": "It is for ModelScope's video model; customttt works with Stable Diffusion 1.5 and AnimateDiff.",
    "inpainting": "It is the inpainting version (9 input channels): take the plain checkpoint instead.",
    "pix2pix": "It is InstructPix2Pix (8 input channels): take the plain checkpoint instead.",
}
WANTED = {
    "the base": "a Stable Diffusion 1.5 checkpoint is wanted: a .safetensors or .ckpt file, or a diffusers folder",
    "the motion module": "an AnimateDiff motion module is wanted, such as v3_sd15_mm.ckpt",
    "the VAE": "an autoencoder for Stable Diffusion 1.5 is wanted, such as vae-ft-mse-840000-ema-pruned.safetensors",
    "a LoRA": "a LoRA is wanted: a run folder of customttt, or a file as kohya, diffusers, PEFT or AnimateDiff have it",
    "an embedding": "a textual-inversion embedding is wanted: A1111's .pt, or diffusers' learned_embeds",
    "a LoRA of customttt": "a LoRA that customttt trained is wanted: a run folder, or the lora.safetensors in it",
}
MEDIA = (
    ("image", "JPEG", rb"\xff\xd8\xff"),
    ("image", "PNG", rb"\x89PNG\r\n"),
    ("image", "GIF", rb"GIF8"),
    ("image", "WebP", rb"RIFF.{4}WEBP"),
    ("image", "BMP", rb"BM.{4}\x00{4}"),
    ("image", "TIFF", rb"II\*\x00|MM\x00\*"),
    ("image", "AVIF or HEIC", rb".{4}ftyp(avi[fs]|hei[cx]|mif1|msf1)"),
    ("video", "AVI", rb"RIFF.{4}AVI "),
    ("video", "Matroska or WebM", rb"\x1a\x45\xdf\xa3"),
    ("video", "MP4 or MOV", rb".{4}(ftyp|moov|mdat|wide)"),
    ("video", "MPEG", rb"\x00\x00\x01[\xba\xb3]|G.{187}G"),
    ("video", "FLV", rb"FLV\x01"),
)
MEDIA_NOTES = {
    "image": "This is an image ({}). Photos of a subject belong together in one folder, which --images names.",
    "video": "This is a video ({}). A clip to learn a motion from belongs in --video.",
}
KIND_OF_CLASS = {
    "UNet2DConditionModel": "UNet",
    "UNet3DConditionModel": "UNet",
    "UNetMotionModel": "motion UNet",
    "MotionAdapter": "motion adapter",
    "AutoencoderKL": "VAE",
    "CLIPTextModel": "text encoder",
    "ControlNetModel": "controlnet",
    "SparseControlNetModel": "controlnet",
}


# The LoRA in a folder that PEFT, or diffusers' `save_lora_weights`, wrote.
LORA_FILES = (*ADAPTER_FILES, "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


def detect(path: str | Path) -> FileKind:
    """Say what a file or folder is, without loading it.

    Raises UserError for what is no file of any use: missing, empty, cut short, a git-LFS pointer, a web page, a pickle
    that wants to run code, or content of no known kind.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    if path.is_file() and (found := _detect_media(path)):
        return found
    header = read_header(path)
    if "customttt" in header.metadata:
        note = "This is a LoRA that customttt trained. It belongs in --lora, --appearance or --motion."
        return FileKind("customttt LoRA", "sd15", note=note)
    return detect_tensors(header.tensors)


def detect_tensors(shapes: Mapping[str, Any]) -> FileKind:
    """Say what a file is by its tensors' names and shapes (or objects with a `.shape`), wrappers already taken off."""
    tensors = Tensors(shapes)
    for row in ROWS:
        if row.test(tensors):
            family = row.family if isinstance(row.family, str) else row.family(tensors)
            version = row.version if isinstance(row.version, str) else row.version(tensors)
            return _kind(row.kind, family, version, row.note)
    some = ", ".join(list(tensors.shapes)[:3])
    return FileKind("unknown", note=f"Its {len(tensors.shapes)} tensors fit nothing known here; the first are {some}.")


def refuse(path: str | Path, found: FileKind, role: str) -> NoReturn:
    """Raise the UserError for a file in the wrong place; `role` is what it was given as: "the motion module"."""
    wanted = f" Here {WANTED[role]}." if role in WANTED else ""
    raise UserError(f"{path} was given as {role}. {found.note}{wanted}")


def _kind(kind: str, family: str, version: str, note: str) -> FileKind:
    more = [NOTES[word] for word in (family, version) if word in NOTES]
    # a place among this program's flags would mislead where the family does not fit
    note = re.sub(r" It belongs in --\w+\.", "", note) if more else note
    return FileKind(kind, family, version, " ".join([note, *more]))


def _detect_media(path: Path) -> FileKind | None:
    with open(path, "rb") as file:
        head = file.read(256)
    if head[8:9] == b"{":  # safetensors: its first bytes are a length, and may look like anything
        return None
    for kind, version, pattern in MEDIA:
        if re.match(pattern, head, re.DOTALL):
            return FileKind(kind, "", version, MEDIA_NOTES[kind].format(version))
    return None


def _detect_folder(path: Path) -> FileKind:
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        return _detect_pipeline(path)
    config = _table(path / "config.json")
    kind = KIND_OF_CLASS.get(_class_of(config))
    if kind is None and any(key.startswith("motion_") for key in config):
        kind = "motion adapter"
    if kind == "motion adapter":
        length = {24: "v1", 32: "v3"}.get(config.get("motion_max_seq_length", 32), "")
        return _kind(kind, "sd15", "v2" if config.get("use_motion_mid_block", True) else length, _note_of(kind))
    if kind:
        return _kind(kind, *_family_and_version(config), _note_of(kind))
    if has_word_alone(path):
        note = "This is a run folder of customttt with a learned word. It belongs in --absorbers or --embedding."
        return FileKind("run folder", "sd15", "", note)
    if (path / "lora.safetensors").is_file() or (path / "settings.json").is_file():
        state = "finished" if (path / "lora.safetensors").is_file() else "unfinished: start it again and it goes on"
        return FileKind("run folder", "sd15", "", f"This is a run folder of customttt ({state}). It belongs in --lora.")
    for name in LORA_FILES:
        if (path / name).is_file():
            return detect(path / name)
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return FileKind("tokenizer", note="This is CLIP's tokenizer. It belongs in --tokenizer.")
    media = [found.kind for file in sorted(path.iterdir()) if file.is_file() and (found := _detect_media(file))]
    if "image" in media:
        note = f"This is a folder of images ({media.count('image')}). It belongs in --images."
        return FileKind("image folder", note=note)
    note = "This is a folder in which nothing says what it is: it has neither a model_index.json nor a config.json."
    return FileKind("folder", note=note)


def has_word_alone(folder: Path) -> bool:
    """Whether an absorber's run in a folder learned a word and no LoRA, and is finished (dual ones write it first)."""
    return (folder / TOKEN_FILE).is_file() and _table(folder / "settings.json").get("kind") == "token"


def _detect_pipeline(path: Path) -> FileKind:
    config = _table(path / "unet" / "config.json")
    if not config:
        note = "This is a diffusers folder without a UNet: a newer model, or a download that is not complete."
        return FileKind("diffusers folder", note=note)
    note = "This is a Stable Diffusion checkpoint as a diffusers folder. It belongs in --base."
    return _kind("diffusers folder", *_family_and_version(config), note)


def _family_and_version(config: dict[str, Any]) -> tuple[str, str]:
    """By a network's config.json: the width of its text, and its input channels."""
    version = {9: "inpainting", 8: "pix2pix"}.get(config.get("in_channels", 4), "")
    if _class_of(config) == "UNet3DConditionModel":
        return "modelscope", version
    width = config.get("cross_attention_dim", config.get("hidden_size"))
    return FAMILY_OF_WIDTH.get(width, "") if isinstance(width, int) else "", version


def _class_of(config: dict[str, Any]) -> str:
    listed = config.get("architectures")
    return str(config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else ""))


def _table(path: Path) -> dict[str, Any]:
    table = read_json(path) if path.is_file() else {}
    return table if isinstance(table, dict) else {}


def _note_of(kind: str) -> str:
    return next(row.note for row in ROWS if row.kind == kind)
