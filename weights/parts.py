"""One network's tensors on their way from a file into a module: renamed, accounted for to the last one, cast."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import UserError
from weights.detect import detect, detect_tensors, refuse
from weights.files import read_checkpoint, read_json
from weights.keymaps import Layout, best_layout, why_ignored

# Names of a folder's weights, the first that exists counts; {} is what the kind of network is called there.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
FORMS = (
    "{}.safetensors",
    "{}.safetensors.index.json",
    "{}.fp16.safetensors",
    "{}.safetensors.index.fp16.json",
    "{}.bin",
    "{}.bin.index.json",
    "{}.fp16.bin",
    "{}.bin.index.fp16.json",
)


@dataclass
class Part:
    """What a file or folder holds of one network.

    Args:
        source: the file or folder.
        layout: how it names its tensors.
        tensors: those that `layout` knows, under our names.
        unused: the file's other tensors, under their own keys, each named by a rule that says why.
        unknown: keys that no rule names either.
        config: the contents of the config.json beside them, or {}.
    """

    source: Path
    layout: Layout
    tensors: dict[str, Tensor]
    unused: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)


def read_part(
    source: Path, role: str, kinds: Collection[str], layouts: Sequence[Layout], ignored: Mapping[str, str]
) -> Part:
    """Read one network from a file, or from a folder with its config.json.

    Args:
        source: the file or folder.
        role: what it was given as, for messages ("the motion module").
        kinds: what it may be, in the words of `detect`.
        layouts: how its tensors may be named.
        ignored: keys that may stay unused, and why.

    Raises:
        UserError: nothing there, damaged, or something else than `kinds`.
    """
    tensors = read_weights(source, role)
    found = detect_tensors(tensors)
    if found.kind not in kinds or found.family not in ("", "sd15"):
        refuse(source, found, role)
    part = take(source, tensors, layouts)
    part.config = read_config(source)
    account(part, tensors, ignored)
    return part


def account(part: Part, rest: Mapping[str, Tensor], ignored: Mapping[str, str]) -> None:
    """Put the tensors that no network of a file took down as unused or as unknown."""
    part.unused = {key: tensor for key, tensor in rest.items() if why_ignored(key, ignored) is not None}
    part.unknown = [key for key in rest if key not in part.unused]


def take(source: Path, tensors: dict[str, Tensor], layouts: Sequence[Layout]) -> Part:
    """Move the tensors of one network out of `tensors` (which keeps the others), under our names."""
    layout = best_layout(tensors, layouts)
    names = {key: name for key in tensors if (name := layout.to_ours(key)) is not None}
    return Part(source, layout, {name: tensors.pop(key) for key, name in names.items()})


def read_weights(source: Path, role: str) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder's one or several files; float32 and .safetensors before the rest."""
    if not source.is_dir():
        return read_checkpoint(source)
    for form in FORMS:
        for stem in STEMS:
            path = source / form.format(stem)
            if path.is_file():
                return _read_shards(path) if path.suffix == ".json" else read_checkpoint(path)
    return refuse(source, detect(source), role)


def read_config(source: Path) -> Mapping[str, Any]:
    """The contents of a folder's config.json; {} for a file, or where there is none."""
    path = source / "config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(config).__name__}")
    return config


def fill(
    module: nn.Module,
    part: Part,
    device: torch.device | str,
    dtype: torch.dtype,
    covers: Callable[[str], bool] = lambda name: True,
) -> None:
    """Give a module on the meta device the tensors of `part`, cast and frozen; `part` loses them.

    Args:
        covers: whether a parameter of the module is this part's to fill.

    Raises:
        UserError: tensors are missing, left over, of another shape, not numbers, or too large for the dtype.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if covers(name)}
    check(part, expected)
    cast = {name: _cast(part, name, expected[name], device, dtype) for name in expected}
    module.load_state_dict(cast, strict=False, assign=True)
    module.requires_grad_(False).eval()


def check(part: Part, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with those a module needs.

    Raises:
        UserError: they differ; the message lists how, in the file's own names.
    """

    def theirs(name: str) -> str:
        return part.layout.from_ours(name) or name

    missing = [theirs(name) for name in expected if name not in part.tensors]
    extra = [*part.unknown, *(theirs(name) for name in part.tensors if name not in expected)]
    reshaped = [
        f"{theirs(name)}: {tuple(tensor.shape)} for {expected[name]}"
        for name, tensor in part.tensors.items()
        if name in expected and not _fits(tuple(tensor.shape), expected[name])
    ]
    found = [_listed(missing, "missing"), _listed(extra, "left over"), _listed(reshaped, "of another shape")]
    if any(found):
        raise UserError(
            f"{part.source} does not fit its network: {'; '.join(filter(None, found))}. It looks like a "
            f"{part.layout.name} with {len(part.tensors)} tensors, and {len(expected)} are needed: it is damaged, cut "
            "down, or of another architecture than Stable Diffusion 1.5's."
        )


def _listed(names: Sequence[str], what: str) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what} ({shown})"


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """1x1 convolutions count as matrices, as they do in files of all ages."""
    return shape == wanted or (len(wanted) == 2 and shape in ((*wanted, 1), (*wanted, 1, 1)))


def _cast(part: Part, name: str, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    tensor = part.tensors.pop(name)
    cast = tensor.reshape(shape).to(device, dtype)
    if not all(bound.isfinite() for bound in cast.aminmax()):
        key, sound = part.layout.from_ours(name) or name, tensor.float().isfinite().all()
        raise UserError(
            f"{part.source}: {key} has numbers too large for {dtype}: load it in float32 or bfloat16"
            if sound
            else f"{part.source} is damaged: {key} holds numbers that are not finite (NaN or infinity)"
        )
    return cast


def _read_shards(index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index} does not say which tensor is in which file (no table `weight_map`)")
    names = sorted(set(where.values()))
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise UserError(f"{index} names files outside its folder ({strange[0]}): do not use it")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise UserError(f"{index} needs {len(names)} files, of which {', '.join(absent)} are not there: get them too")
    return {key: tensor for name in names for key, tensor in read_checkpoint(index.parent / name).items()}
