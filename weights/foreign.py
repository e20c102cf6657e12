"""LoRA files of other tools: which layers they are for, and the numbers, every key accounted for.

The merge rule is the same for all: W += strength * (alpha / r) * up @ down, alpha being r where nothing says otherwise.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lora import LowRank
from model import UNet3D, UserError
from weights.detect import FileKind, detect, refuse
from weights.files import read_checkpoint, read_header
from weights.keymaps import why_ignored
from weights.lora_keys import FORMS, IGNORED, LoRAKey, read_key, spellings
from weights.peft_config import PeftConfig, read_configs

READ = ("kohya LoRA", "motion LoRA", "spatial LoRA", "other LoRA")  # of the kinds that `detect` knows
OTHER_FAMILIES = ("sd2", "sdxl", "modelscope")

# Why a layer's name is none of this network's: the first that is found in it counts.
STRANGERS = (
    (r"(single_transformer|double|single|joint)_blocks|^(lora_)?transformer[._]", "of a newer model (Flux, SD 3 ...)"),
    (r"^lora_te2_|text_encoder_2\.|label_emb|add_embedding|transformer_blocks[._][1-9]", "of SDXL"),
    (r"temporal_transformer_blocks|temp_attentions|temp_convs|temopral|transformer_in", "of another video model"),
    (r"motion_modules", "of motion modules: {motion}"),
    (r"^lora_te|text_model\.|encoder[._]layers", "of a text encoder: {text}"),
)
NO_MOTION = "this base has none, name them with --motion_module"
OTHER_MOTION = "this base's do not have this one"
NO_TEXT = "it was loaded for the UNet alone"
OTHER_TEXT = "this base's does not have this layer"
NO_LAYER = "no layer of Stable Diffusion 1.5 has this name"
NO_LORA = "no part of a LoRA"


@dataclass
class ForeignLoRA:
    """A LoRA of another tool, matched with the networks of a base.

    Args:
        path: the file.
        what: of which kind ("v3 domain adapter", "kohya LoRA", "v2 motion LoRA").
        weights: for "unet" and "text" the update of each layer, under our names.
        unmatched: pairs that no layer was found for: {one of the pair's keys: why}.
        strangers: tensors that are no part of a LoRA, so that nothing is done with them.
        skipped: pairs for the middle block's motion module, which only AnimateDiff v2 has.
        forms: how its keys are named, several in mixed files.
    """

    path: Path
    what: str
    weights: dict[str, dict[str, LowRank]] = field(default_factory=lambda: {"unet": {}, "text": {}})
    unmatched: dict[str, str] = field(default_factory=dict)
    strangers: list[str] = field(default_factory=list)
    skipped: int = 0
    forms: list[str] = field(default_factory=list)

    @property
    def matched(self) -> int:
        """Pairs that a layer was found for."""
        return sum(map(len, self.weights.values()))

    @property
    def total(self) -> int:
        """Pairs in the file."""
        return self.matched + len(self.unmatched) + self.skipped

    def __str__(self) -> str:
        parts = [self.what if len(self.forms) < 2 else f"LoRA (keys of {' and '.join(self.forms)})"]
        parts.append(f"{self.matched} of {self.total} pairs")
        if self.skipped:
            parts.append(f"{self.skipped} of AnimateDiff v2's middle block skipped")
        return f"{self.path.name}: {', '.join([*parts, *_places(self.weights)])}"

    def check(self, allow_partial: bool) -> None:
        """See that everything in the file has its layer.

        Raises:
            UserError: it has not, and `allow_partial` does not put up with that.
        """
        lost = {**self.unmatched, **dict.fromkeys(self.strangers, NO_LORA)}
        if self.matched and not lost:
            return
        shown = "; ".join(f"{key} ({why})" for key, why in list(lost.items())[:3])
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        shown = f"Not used: {shown}{more}." if lost else f"All {self.skipped} are of AnimateDiff v2's middle block."
        message = f"{self.path}: {self.matched} of {self.total} pairs of this {self.what} fit the base. {shown}"
        if not allow_partial:
            raise UserError(f"{message} --allow_partial takes what fits and leaves the rest.")
        warnings.warn(message, stacklevel=2)


def read_foreign_lora(path: Path, unet: UNet3D, text: nn.Module | None = None) -> ForeignLoRA:
    """Read another tool's LoRA and find the layers of its tensors.

    Args:
        path: the file.
        unet: the network.
        text: transformers' CLIPTextModel; None if the file's part for it is not wanted.

    Raises:
        UserError: the file is no LoRA that can be read (the message says what it is), or is for another family of
            models; a pair lacks a half, is of another shape than its layer, or holds numbers that are not finite.
    """
    found = detect(path)
    if found.kind not in READ or found.family in OTHER_FAMILIES:
        refuse(path, found, "a LoRA")
    configs = read_configs(path, read_header(path).metadata)
    names = spellings(unet, text)
    lora = ForeignLoRA(path, _what(found))
    pairs: dict[tuple[str, str], dict[str, tuple[str, LoRAKey, Tensor]]] = {}
    lost: dict[str, str] = {}
    for key, tensor in read_checkpoint(path).items():
        if why_ignored(key, IGNORED):
            continue
        read = read_key(key)
        if read is None:
            lora.strangers.append(key)
        elif read.layer not in names:
            lost.setdefault(read.layer, key)
        else:
            halves = pairs.setdefault(names[read.layer], {})
            if read.role in halves:
                raise UserError(f"{path} has one layer twice: {halves[read.role][0]} and {key} mean the same")
            halves[read.role] = (key, read, tensor)
    for layer, key in lost.items():
        if _is_v2_middle(layer, unet):
            lora.skipped += 1
        else:
            lora.unmatched[key] = _why(layer, unet, text)
    if lora.skipped and pairs:
        warnings.warn(
            f"{path}: {lora.skipped} pairs are for the middle block's motion module, which only AnimateDiff v2 has; "
            "they are skipped",
            stacklevel=2,
        )
    networks = {"unet": unet, "text": text}
    for (part, ours), halves in pairs.items():
        network = networks[part]
        assert network is not None
        lora.weights[part][ours] = _low_rank(path, halves, network.get_submodule(ours), configs.get(part), found)
    used = {halves["down"][1].form.name for halves in pairs.values()}
    lora.forms = [name for name in dict.fromkeys(form.name for form in FORMS) if name in used]
    return lora


def _low_rank(
    path: Path,
    halves: Mapping[str, tuple[str, LoRAKey, Tensor]],
    layer: nn.Module,
    config: PeftConfig | None,
    found: FileKind,
) -> LowRank:
    """One layer's update from its tensors, in the shapes its layer has."""
    for role, other in (("down", "up"), ("up", "down")):
        if role not in halves:
            there = halves.get(other) or next(iter(halves.values()))
            raise UserError(f"{path}: {there[0]} is there without its {role!r} half: the file is damaged or cut short")
        key, _, tensor = halves[role]
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path} is damaged: {key} holds numbers that are not finite, or no fractions at all")
        if tensor.ndim < 2 or not tensor.numel():
            raise UserError(f"{path} is damaged: {key} is {tuple(tensor.shape)}, which is no matrix of any rank")
    (key, read, down), (_, _, up) = halves["down"], halves["up"]
    assert isinstance(layer.weight, Tensor)
    out, *inner = layer.weight.shape
    rank = len(down)
    shapes = ((rank, *inner), (out, rank, *[1] * (len(inner) - 1)))
    for role, wanted in zip(("down", "up"), shapes, strict=True):
        its_key, _, tensor = halves[role]
        if not _fits(tuple(tensor.shape), wanted):
            raise UserError(
                f"{path}: {its_key} is {tuple(tensor.shape)}, and this base's layer wants {wanted}: {_made_for(found)}"
            )
    alpha = float(rank)
    if "alpha" in halves:
        alpha = _alpha(path, *halves["alpha"][::2])
    elif config is not None and read.form.has_config:
        alpha = config.alpha_of(read.layer, rank)
    return LowRank(down.float().reshape(shapes[0]), up.float().reshape(shapes[1]), alpha)


def _alpha(path: Path, key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(tensor.item()):
        raise UserError(f"{path} is damaged: {key} should be one finite number")
    return float(tensor.item())


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Matrices and 1x1 convolutions are the same numbers: files have the one for the other."""
    return shape == wanted or (shape[:2] == wanted[:2] and math.prod(shape[2:]) == math.prod(wanted[2:]) == 1)


def _made_for(found: FileKind) -> str:
    if found.family == "sd15":
        return "the LoRA was made for Stable Diffusion 1.5 (text 768 wide), and this base is of another size"
    return "the LoRA was made for another architecture than this base's"


def _what(found: FileKind) -> str:
    if found.version == "v3 domain adapter":
        return found.version
    return " ".join(filter(None, (found.version, found.kind.removeprefix("other "))))


def _is_v2_middle(layer: str, unet: UNet3D) -> bool:
    """Is it the motion module that this base, of another version of AnimateDiff, does without?"""
    motion = unet.config.motion
    return motion is not None and not motion.mid_block and "mid_block" in layer and "motion_modules" in layer


def _why(layer: str, unet: UNet3D, text: nn.Module | None) -> str:
    motion = NO_MOTION if unet.config.motion is None else OTHER_MOTION
    reason = next((reason for pattern, reason in STRANGERS if re.search(pattern, layer)), NO_LAYER)
    return reason.format(motion=motion, text=NO_TEXT if text is None else OTHER_TEXT)


def _places(weights: Mapping[str, Mapping[str, LowRank]]) -> list[str]:
    """Where the updates sit: the layers of the nine by kind, and the rest."""
    layers: dict[str, set[str]] = {}
    for ours in weights["unet"]:
        match = re.match(r"layers\.(\d)\.(\w+)", ours)
        kind = match[2] if match else ""
        kind = kind if kind in ("spatial", "temporal") else "convolutional" if match else "stem"
        layers.setdefault(kind, set()).add(match[1] if match else "")
    kinds = ("spatial", "temporal", "convolutional")
    places = [f"{kind} layers {' '.join(sorted(layers[kind]))}" for kind in kinds if kind in layers]
    if "stem" in layers:
        places.append("what stands before and behind the layers")
    if weights["text"]:
        places.append(f"{len(weights['text'])} layers of the text encoder")
    return places
