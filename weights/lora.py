"""LoRA files. Those of our own are safetensors with one or several adapters and all it takes to put them back in place.

Keys are `<adapter>.<diffusers module name>.lora_A.weight` and `.lora_B.weight`; the header's entry `customttt` is JSON:
version, base, settings, and for each adapter kind, layers, rank, alpha, targets, prompt and trigger.
"""

import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora import AdapterSpec, adapter_modules, adapter_names, adapter_spec, add_adapter, place_adapter, remove_adapter
from model import UNet3D, UserError
from weights.detect import LORA_FILES, detect, has_word_alone, refuse
from weights.files import atomic_write, read_checkpoint, read_header
from weights.foreign import read_foreign_lora
from weights.keymaps import UNET_DIFFUSERS

VERSION = 1
FILE_NAME = "lora.safetensors"  # in a run folder
OWN = "customttt LoRA"  # what `detect` calls a file of ours


@dataclass(frozen=True)
class LoRAEntry:
    """One adapter of a file: what it is, and the words it was trained with."""

    spec: AdapterSpec
    prompt: str = ""
    trigger: str = ""


@dataclass(frozen=True)
class LoRAFile:
    """What a file's header says, without its tensors."""

    path: Path
    adapters: dict[str, LoRAEntry]
    base: str
    fingerprints: dict[str, str]
    settings: dict[str, Any]


def save_lora(
    path: str | Path,
    unet: UNet3D,
    words: Mapping[str, tuple[str, str]],
    *,
    base: str = "",
    fingerprints: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters of `unet` to a file, atomically, in float32.

    Args:
        path: the file.
        unet: the network they sit in.
        words: for each adapter to write, the prompt it was trained with and its trigger word ("" for none).
        base: name of the base it was trained on.
        fingerprints: of that base (`Base.fingerprints`).
        settings: of the run, kept for the record.

    Raises:
        UserError: an unknown adapter, weights that are not finite, or a file that cannot be written.
    """
    tensors, entries = {}, {}
    for name, (prompt, trigger) in words.items():
        for module_name, module in adapter_modules(unet, name).items():
            key = f"{name}.{UNET_DIFFUSERS.from_ours(module_name)}"
            tensors[f"{key}.lora_A.weight"] = module.A.detach().cpu().contiguous()
            tensors[f"{key}.lora_B.weight"] = module.B.detach().cpu().contiguous()
        entries[name] = {**asdict(adapter_spec(unet, name)), "prompt": prompt, "trigger": trigger}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(f"{path}: not written, since the adapter's weights are not finite")
    header = {
        "version": VERSION,
        "base": {"name": base, "fingerprints": dict(fingerprints or {})},
        "adapters": entries,
        "settings": dict(settings or {}),
    }
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"customttt": json.dumps(header)})


def lora_path(path: str | Path) -> Path:
    """The LoRA file that a path means: itself, or the one inside a run folder (or one of PEFT's, or diffusers').

    Raises:
        UserError: nothing is there, or the run is not finished.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: a LoRA file or run folder was expected (a strength is :0.8 behind it)")
    if not path.is_dir():
        return path
    found = next((path / name for name in (FILE_NAME, *LORA_FILES) if (path / name).is_file()), None)
    if found is None:
        if has_word_alone(path):
            raise UserError(f"{path} has no {FILE_NAME}: it learned a word alone, which belongs in --embedding")
        unfinished = (path / "settings.json").is_file()
        why = "the run in it is not finished: start it again and it goes on" if unfinished else "it is no run folder"
        raise UserError(f"{path} has no {FILE_NAME}: {why}")
    return found


def read_lora_header(path: str | Path) -> LoRAFile:
    """What adapters a file of ours holds.

    Raises:
        UserError: not a LoRA file of ours (the message says what it is), or one that a newer version wrote.
    """
    path = lora_path(path)
    found = detect(path)
    if found.kind != OWN:
        refuse(path, found, "a LoRA of customttt")
    text = read_header(path).metadata["customttt"]
    try:
        header = json.loads(text)
        if header["version"] > VERSION:
            raise UserError(f"{path} was written by a newer customttt (file version {header['version']}): upgrade")
        entries = {
            name: LoRAEntry(
                AdapterSpec(
                    kind=str(entry["kind"]),
                    layers=tuple(int(i) for i in entry["layers"]),
                    rank=int(entry["rank"]),
                    alpha=_finite(entry["alpha"]),
                    targets=str(entry["targets"]),
                ),
                str(entry["prompt"]),
                str(entry["trigger"]),
            )
            for name, entry in header["adapters"].items()
        }
        base = header["base"]
        return LoRAFile(path, entries, str(base["name"]), dict(base["fingerprints"]), dict(header["settings"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its customttt header is damaged ({error}): make or fetch the file again") from error


def load_lora(
    unet: UNet3D,
    path: str | Path,
    names: Mapping[str, str] | None = None,
    *,
    fingerprints: Mapping[str, str] | None = None,
    text: nn.Module | None = None,
    allow_partial: bool = False,
    only: str | None = None,
) -> dict[str, LoRAEntry | None]:
    """Add a file's adapters to the network, switched off; for one of another tool, print what was matched.

    Args:
        unet: the network.
        path: a LoRA file, or a run folder.
        names: which of the file's adapters to load, and what to call them, for files of ours alone; None loads all
            under their own names, with a number behind where one is taken.
        fingerprints: of the base in use (`Base.fingerprints`); a note is given where an adapter was trained on another
            network.
        text: the base's text encoder (`Base.text.clip`), which other tools' files may have a part for: an adapter of
            the same name as in the UNet.
        allow_partial: of other tools' files, whatever fits will do; otherwise every pair in the file has to.
        only: the one adapter to load, of a file of ours.

    Returns:
        What was added, by the names the adapters now have; None for other tools' LoRAs, of which no more is known.

    Raises:
        UserError: not a LoRA, one for another architecture, or a damaged one; the networks are left as they were.
    """
    if names is None and (found := detect(lora_path(path))).kind != OWN:
        if only is not None:
            raise UserError(f"{path} has no adapters with names ({found.kind}): leave #{only} away")
        return _load_foreign(unet, text, lora_path(path), allow_partial)
    file = read_lora_header(path)
    wanted: Collection[str] = names if names is not None else file.adapters if only is None else [only]
    missing = [name for name in wanted if name not in file.adapters]
    if missing:
        raise UserError(f"{file.path} has no adapter {missing[0]!r}: it has {', '.join(file.adapters)}")
    entries = {name: entry for name, entry in file.adapters.items() if name in wanted}
    for name, entry in entries.items():
        part = "unet" if entry.spec.kind == "spatial" else "motion_module"
        before, now = file.fingerprints.get(part), (fingerprints or {}).get(part)
        if before and now and before != now:
            what = "checkpoint" if part == "unet" else "motion module"
            warnings.warn(
                f"{file.path}: {name} was trained on another {what}; it will work, less exactly", stacklevel=2
            )
    tensors = read_checkpoint(file.path)
    added: dict[str, LoRAEntry | None] = {}
    try:
        for name, entry in entries.items():
            new, spec = names[name] if names else _free_name(unet, name, text), entry.spec
            ranks = {
                t.shape[0] for key, t in tensors.items() if re.fullmatch(rf"{re.escape(name)}\..*lora_A\.weight", key)
            }
            if ranks != {spec.rank}:
                raise UserError(
                    f"its header says rank {spec.rank} for {name!r}, and its tensors say {ranks or 'nothing'}"
                )
            add_adapter(unet, new, spec.kind, spec.layers, spec.rank, alpha=spec.alpha, targets=spec.targets)
            added[new] = entry
            _fill(unet, new, name, tensors)
        if tensors and wanted is file.adapters:
            raise UserError(f"{len(tensors)} tensors belong to no adapter of its header, such as {next(iter(tensors))}")
    except UserError as error:
        for name in added:
            remove_adapter(unet, name)
        raise UserError(f"{file.path} does not fit this base: {error}") from error
    return added


def say_what_adds(networks: Sequence[nn.Module], loras: Mapping[str, Iterable[str]]) -> None:
    """Print which LoRAs sit on the same layers, where their changes add up.

    Args:
        networks: the UNet and the text encoder.
        loras: the adapters of each, by the name it was given by.
    """
    places = {
        name: {
            (i, layer)
            for i, network in enumerate(networks)
            for adapter in set(its) & set(adapter_names(network))
            for layer in adapter_modules(network, adapter)
        }
        for name, its in loras.items()
    }
    for (one, here), (other, there) in combinations(places.items(), 2):
        if here & there:
            print(f"{one} and {other} sit on {len(here & there)} of the same layers: they add")


def _finite(value: Any) -> float:
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} is not finite")
    return float(value)


def _load_foreign(unet: UNet3D, text: nn.Module | None, path: Path, allow_partial: bool) -> dict[str, LoRAEntry | None]:
    lora = read_foreign_lora(path, unet, text)
    lora.check(allow_partial)
    print(lora)
    parts = [(n, w) for n, w in ((unet, lora.weights["unet"]), (text, lora.weights["text"])) if n is not None and w]
    name = _free_name(unet, "lora_" + re.sub(r"\W", "_", path.stem), text)
    for network, weights in parts:
        place_adapter(network, name, weights)
    return {name: None} if parts else {}


def _free_name(unet: UNet3D, name: str, text: nn.Module | None = None) -> str:
    taken = adapter_names(unet) + (adapter_names(text) if text is not None else [])
    candidates = [name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _fill(unet: UNet3D, adapter: str, name: str, tensors: dict[str, Tensor]) -> None:
    """Move the tensors of `name` out of `tensors` and into the adapter."""
    for module_name, module in adapter_modules(unet, adapter).items():
        key = f"{name}.{UNET_DIFFUSERS.from_ours(module_name)}"
        for parameter, suffix in ((module.A, "lora_A.weight"), (module.B, "lora_B.weight")):
            tensor = tensors.pop(f"{key}.{suffix}", None)
            if tensor is None:
                raise UserError(f"it has no {key}.{suffix}")
            if tensor.shape != parameter.shape:
                shapes = f"{tuple(tensor.shape)}, and this network wants {tuple(parameter.shape)}"
                raise UserError(f"{key}.{suffix} is {shapes}: it was made for another architecture")
            if not torch.isfinite(tensor).all():
                raise UserError(f"{key}.{suffix} holds numbers that are not finite")
            parameter.data.copy_(tensor)
