"""`customttt export`: our LoRAs as files that ComfyUI, A1111, diffusers and AnimateDiff load."""

import json
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora import KINDS, TARGETS, LowRank, adapter_linears, layers_with
from model import SD15_V2, UNet3D, UserError
from weights.command import run_command
from weights.detect import detect
from weights.files import atomic_write, read_checkpoint, read_header
from weights.foreign import READ
from weights.formats import FORMATS, WHAT, Format, fold
from weights.keymaps import UNET_DIFFUSERS
from weights.lora import FILE_NAME, OWN, LoRAEntry, LoRAFile, read_lora_header
from weights.settings import parse_settings

# diffusers calls these by keyword, which PEFT's layers do not take
FUSED_ALONE = re.compile(r"\.temporal\.\d\.proj_(in|out)$")
FUSE = (
    "it has the motion modules' proj_in and proj_out, which diffusers cannot run with a LoRA beside them (TypeError): "
    "after load_lora_weights call pipe.fuse_lora() and pipe.unload_lora_weights(), which leaves it in the weights"
)
LOST = 0.01  # of a tensor's norm; half precision rounds by less than half of that where it does not run out of range

Weights = Mapping[str, Mapping[str, LowRank]]  # of each adapter, by our layer names


@dataclass(kw_only=True)
class ExportSettings:
    """What to export, and as what.

    Args:
        run: a run folder, or a LoRA file of our own.
        format: kohya (appearance, for ComfyUI and A1111), motion-lora (motion, for AnimateDiff and ComfyUI's
            AnimateDiff-Evolved), diffusers (both), or own (a copy for customttt).
        out: the file; of two parts, -appearance and -motion are put behind its name. .safetensors, or .ckpt for motion
            LoRAs.
        dtype: of the weights; half precision rounds by more than a step of test-time training moves them.
        adapter: export this one of the file's adapters; not given: all.
    """

    run: str
    format: Literal["own", "kohya", "diffusers", "motion-lora"]
    out: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    adapter: str | None = None


def export(settings: ExportSettings) -> list[Path]:
    """Write a LoRA of ours in another format, and print what went where; no base is needed.

    Args:
        settings: what to export, and as what.

    Returns:
        The files written: one for each adapter, or one of all for format "own". Alpha is folded into B, except there.

    Raises:
        UserError: no LoRA of ours, a damaged one, an adapter that the format cannot hold (a warning where it can hold
            another), weights that the dtype cannot hold, or an output that must not be overwritten. Nothing is written
            then.
    """
    file, form, network = read_lora_header(settings.run), FORMATS[settings.format], _network()
    entries = _fitting(file, _chosen(file, settings.adapter, network), form)
    files = _files(settings, file, entries, form)
    tensors = read_checkpoint(file.path)
    weights = {name: _read(file, name, tensors, network) for name in entries}
    _warn(settings, file, weights, network)
    contents = {path: _contents(settings, file, {n: weights[n] for n in names}, path) for path, names in files.items()}
    for path, (made, metadata) in contents.items():
        _write(path, made, metadata)
        for name in files[path]:
            spec, pairs = file.adapters[name].spec, len(weights[name])
            where = f"{spec.kind} layers {' '.join(map(str, spec.layers))}"
            print(f"wrote {path}: {name}, {pairs} pairs of rank {spec.rank} in {where}, {settings.dtype}")
        print(f"  {form.where}")
    return list(files)


def _chosen(file: LoRAFile, adapter: str | None, network: UNet3D) -> dict[str, LoRAEntry]:
    if adapter is not None and adapter not in file.adapters:
        raise UserError(f"{file.path} has no adapter {adapter!r}: it has {', '.join(file.adapters) or 'none'}")
    chosen = {name: entry for name, entry in file.adapters.items() if adapter in (None, name)}
    if not chosen:
        raise UserError(f"{file.path} has no adapters: there is nothing to export")
    for name, spec in ((name, entry.spec) for name, entry in chosen.items()):
        known = spec.kind in KINDS and spec.targets in TARGETS and spec.rank > 0
        if not known or not spec.layers or not set(spec.layers) <= set(layers_with(network, spec.kind)):
            raise UserError(f"{file.path} is damaged: no adapter is as its header says {name!r} is: {spec}")
    return chosen


def _fitting(file: LoRAFile, entries: Mapping[str, LoRAEntry], form: Format) -> dict[str, LoRAEntry]:
    """The adapters that the format can hold; nothing is left out in silence."""
    fitting = {name: entry for name, entry in entries.items() if entry.spec.kind in form.kinds}
    left = [name for name in entries if name not in fitting]
    if not fitting:
        raise UserError(f"{file.path}: {' and '.join(left)} cannot be exported so: {form.refusal}")
    if left:
        warnings.warn(f"{file.path}: {' and '.join(left)} is left out: {form.refusal}", stacklevel=3)
    return fitting


def _files(
    settings: ExportSettings, file: LoRAFile, entries: Mapping[str, LoRAEntry], form: Format
) -> dict[Path, list[str]]:
    """The files to write, and the adapters that go into each."""
    out, kinds = Path(settings.out), [entry.spec.kind for entry in entries.values()]
    if out.suffix not in form.suffixes:
        raise UserError(f"--out {out}: a file of format {settings.format} ends in {' or '.join(form.suffixes)}")
    if settings.format == "own" or len(entries) == 1:
        files = {out: list(entries)}
    elif len(set(kinds)) < len(kinds):
        raise UserError(
            f"{file.path} has several adapters of a kind, and each goes into a file of its own: choose one with "
            f"--adapter, of {', '.join(entries)}"
        )
    else:
        files = {out.with_name(f"{out.stem}-{WHAT[e.spec.kind]}{out.suffix}"): [n] for n, e in entries.items()}
    for path in files:
        _check_free(path, file.path)
    return files


def _check_free(path: Path, source: Path) -> None:
    """An export may replace an export, and nothing that is dearer."""
    if not path.exists():
        return
    if path.samefile(source):
        raise UserError(f"{path} is the LoRA that is to be exported: give --out another name")
    if path.name == FILE_NAME and (path.parent / "settings.json").is_file():
        raise UserError(f"{path} is what a run has trained: give --out another name")
    try:
        kind = detect(path).kind if path.is_file() else "folder"
    except UserError as error:
        raise UserError(f"{path} exists and is no LoRA: give --out another name ({error})") from error
    if kind not in (*READ, OWN):
        raise UserError(f"{path} exists and is no LoRA, but a {kind}: give --out another name")


@cache
def _network() -> UNet3D:
    """Stable Diffusion 1.5 with all motion modules there are, without numbers: names and shapes alone."""
    with torch.device("meta"):
        return UNet3D(SD15_V2)


def _read(file: LoRAFile, name: str, tensors: Mapping[str, Tensor], network: UNet3D) -> dict[str, LowRank]:
    """An adapter's updates by our layer names, every layer that its header tells of accounted for."""
    spec, found, used = file.adapters[name].spec, {}, set()
    for layer in adapter_linears(network, spec):
        stem = f"{name}.{UNET_DIFFUSERS.from_ours(layer)}"
        keys = [f"{stem}.lora_{half}.weight" for half in "AB"]
        for key, axis in zip(keys, (0, 1), strict=True):
            tensor = tensors.get(key)
            if tensor is None:
                raise UserError(f"{file.path} is damaged: it has no {key}")
            if tensor.ndim != 2 or tensor.shape[axis] != spec.rank:
                raise UserError(f"{file.path} is damaged: {key} is {tuple(tensor.shape)}, of rank {spec.rank}")
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise UserError(f"{file.path} is damaged: {key} holds numbers that are not finite, or no fractions")
        found[layer] = LowRank(tensors[keys[0]], tensors[keys[1]], spec.alpha)
        used.update(keys)
    others = set(file.adapters) - {name}
    spare = [key for key in tensors if key not in used and key.partition(".")[0] not in others]
    if spare:
        raise UserError(f"{file.path} is damaged: {spare[0]} is no part of what its header describes")
    return found


def _warn(settings: ExportSettings, file: LoRAFile, weights: Weights, network: UNet3D) -> None:
    """Say what is not wrong with the export, and will surprise."""
    pairs = [pair for found in weights.values() for pair in found.items()]
    if settings.format == "diffusers" and any(FUSED_ALONE.search(layer) for layer, _ in pairs):
        warnings.warn(f"{file.path}: {FUSE}", stacklevel=3)
    for layer, low in pairs:
        linear = network.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        # names are the same whatever a base's size
        if settings.format != "own" and (low.A.shape[1], low.B.shape[0]) != (linear.in_features, linear.out_features):
            warnings.warn(
                f"{file.path} was trained on {file.base or 'a base'}, which is not of Stable Diffusion 1.5's size: "
                "only a tool that has that base open will load the export",
                stacklevel=3,
            )
            return


def _contents(
    settings: ExportSettings, file: LoRAFile, weights: Weights, path: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file."""
    dtype, form = getattr(torch, settings.dtype), FORMATS[settings.format]
    made: dict[str, Tensor] = {}
    if settings.format == "own":
        for name, found in weights.items():
            exact = {layer: _cast(low, dtype, layer, file.path) for layer, low in found.items()}
            made |= {f"{name}.{key}": tensor for key, tensor in form.keys(exact).items()}
        return made, _own_metadata(file, weights)
    [(name, found)] = weights.items()
    folded = {layer: _cast(fold(low), dtype, layer, file.path) for layer, low in found.items()}
    return form.keys(folded), _metadata(file.adapters[name], settings.format, path)


def _cast(low: LowRank, dtype: torch.dtype, layer: str, source: Path) -> LowRank:
    """The same numbers in another dtype, and in memory of their own."""
    cast = LowRank(low.A.to(dtype, copy=True), low.B.to(dtype, copy=True), low.alpha)
    for before, after in ((low.A.float(), cast.A), (low.B.float(), cast.B)):
        if not torch.isfinite(after).all() or (after.float() - before).norm() > LOST * before.norm():
            raise UserError(
                f"{source}: nothing written, since {dtype} cannot hold the numbers of {layer}, which go up to "
                f"{before.abs().max().item():.3g}: they are too large or too small for it. Take another --dtype"
            )
    return cast


def _own_metadata(file: LoRAFile, names: Container[str]) -> dict[str, str]:
    header = json.loads(read_header(file.path).metadata["customttt"])
    header["adapters"] = {name: entry for name, entry in header["adapters"].items() if name in names}
    return {"customttt": json.dumps(header)}


def _metadata(entry: LoRAEntry, name: str, path: Path) -> dict[str, str]:
    """What tools show of a file. A1111 goes by kohya's entries to tell Stable Diffusion 1 from 2 and XL."""
    found = {
        "format": "pt",
        "modelspec.title": path.stem,
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": entry.trigger,
        "modelspec.usage_hint": f"trained with the prompt: {entry.prompt}" if entry.prompt else "",
    }
    if name == "kohya":
        found |= {
            "ss_base_model_version": "sd_v1",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(entry.spec.rank),
            "ss_network_alpha": str(entry.spec.rank),  # the tensors' own: what it was trained with is folded in
        }
    return {key: value for key, value in found.items() if value}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    with atomic_write(path) as temporary:
        if path.suffix == ".ckpt":
            torch.save({"state_dict": dict(tensors)}, temporary)
        else:
            save_file(dict(tensors), temporary, metadata=metadata)


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt export`."""
    export(
        parse_settings(
            ExportSettings, argv, prog="customttt export", description="Write our LoRAs as files of other tools."
        )
    )


if __name__ == "__main__":
    run_command(main)
