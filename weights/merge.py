"""`customttt merge`: a base with LoRAs inside, as a checkpoint for tools that know no LoRA."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora import LoRALayer, adapter_names, remove_adapter
from model import Recipe, UNetConfig, UserError
from weights.command import run_command
from weights.files import read_json, sha256, write_json
from weights.folders import check_folder, replacing
from weights.load import Base, load_base
from weights.lora import load_lora, lora_path
from weights.open import DTYPES, BaseSettings
from weights.save import save_base
from weights.save_ldm import save_ldm
from weights.settings import parse_settings
from weights.strengths import LoRAArgument, parse_constant
from weights.tokenizer import tokenizer_on_hub

RECORD = "customttt.json"  # in a folder that is written here: what went in, and which files came out
HEADER = "customttt_merge"  # the same in the headers of one-file checkpoints
WHERE = {
    "diffusers": "diffusers: AnimateDiffPipeline.from_pretrained(FOLDER); customttt: --base FOLDER",
    "ldm": "ComfyUI: models/checkpoints; A1111: models/Stable-diffusion; a motion module (_mm): models/"
    "animatediff_models (AnimateDiff-Evolved), or sd-webui-animatediff's model folder",
}


@dataclass(kw_only=True)
class MergeSettings(BaseSettings):
    """What to merge, and into what.

    Args:
        lora: run folders, or LoRA files of any tool, each with a strength behind a colon if not 1 (runs/teddy:0.8);
            behind a # one adapter of a run with several (runs/both#motion:0.8).
        out: the folder for the checkpoint; an earlier merge in it is replaced.
        layout: diffusers (a folder for AnimateDiffPipeline) or ldm (NAME.safetensors, and NAME_mm.safetensors for the
            motion module, as ComfyUI and A1111 load them; NAME is the folder's).
        dtype: of all weights in the files, the autoencoder's too; the sum is made in float32 before.
        allow_partial: use what fits of LoRA files that do not fit wholly.
    """

    lora: list[str]
    out: str
    layout: Literal["diffusers", "ldm"] = "diffusers"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    allow_partial: bool = False
    device: str | None = field(init=False, default="cpu")  # sums need no GPU, and most have less memory


def merge(settings: MergeSettings) -> Path:
    """Write a base with LoRAs added to its weights, whole or not at all, and print what went where.

    Args:
        settings: which base, which LoRAs, and what to write.

    Returns:
        The folder.

    Raises:
        UserError: no LoRA, a file that does not load or fit, an output that must not be replaced or cannot be written,
            numbers that the dtype cannot hold, or a base that the layout cannot hold. Nothing is written then.
    """
    if not settings.lora:
        raise UserError("there is nothing to merge: name one or more LoRAs with --lora")
    loras = [parse_constant(argument) for argument in settings.lora]
    paths = [lora_path(its.path) for its in loras]
    out = Path(settings.out).expanduser().resolve()
    base_files = (settings.motion_module, settings.vae, settings.tokenizer)
    inputs = [*paths, *(Path(name) for name in (*base_files, settings.base) if name not in (None, "tiny"))]
    _check_out(out, inputs)
    base = load_base(
        settings.base, settings.motion_module, settings.vae, settings.tokenizer, settings.device, torch.float32
    )
    networks: dict[str, nn.Module] = {"UNet": base.unet, "VAE": base.vae, "text encoder": base.text}
    if settings.layout == "diffusers" and base.unet.config.motion is None:
        raise UserError(
            f"{base.name} has no motion modules, and diffusers' AnimateDiffPipeline does not open a folder without: "
            "name some with --motion_module, or take --layout ldm"
        )
    triggers = _add(base, loras, settings.allow_partial)
    for what, network in networks.items():
        _cast(network, DTYPES[settings.dtype], what)
    record = {
        "layout": settings.layout,
        "dtype": settings.dtype,
        "base": {"name": base.name, "motion_module": _name(settings.motion_module), "fingerprints": base.fingerprints},
        "loras": [
            {"name": _name(its.path), "sha256": sha256(file), "strength": its.strength, "trigger": trigger}
            | ({} if its.adapter is None else {"adapter": its.adapter})
            for its, file, trigger in zip(loras, paths, triggers, strict=True)
        ],
    }
    with replacing([out]) as fresh:
        _write(fresh[out], out.name, base, settings.layout, record)
    print(f"wrote {settings.out}: {base.name} with {', '.join(settings.lora)}, {settings.dtype}")
    if any(triggers):
        print(f"  for the prompt: {', '.join(filter(None, triggers))}")
    print(f"  {WHERE[settings.layout]}")
    return out


def _check_out(out: Path, inputs: Sequence[Path]) -> None:
    """A merge may replace a merge, and nothing that is dearer."""
    check_folder(out.parent, out)
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: --out names a folder, which is made")
    for path in inputs:
        if out in (path.expanduser().resolve(), *path.expanduser().resolve().parents):
            raise UserError(f"{path} is to be read, and would be replaced with {out}: give --out another name")
    if not any(out.iterdir()):
        return
    record = read_json(out / RECORD) if (out / RECORD).is_file() else None
    if not isinstance(record, dict) or not isinstance(record.get("files"), list):
        raise UserError(f"{out} has files in it, and no merge wrote them: give --out another name")
    found = {file.relative_to(out).as_posix() for file in out.rglob("*") if not file.is_dir()}
    strange = sorted(found.difference(record["files"], [RECORD]))
    if strange:
        raise UserError(f"{out} would be replaced, and {strange[0]} in it is no file of the merge: move it first")


def _add(base: Base, loras: Sequence[LoRAArgument], allow_partial: bool) -> list[str]:
    """Add LoRAs to the weights for good, in float32; returns the trigger word of each, "" for none."""
    unet, text, scales, triggers = base.unet, base.text.clip, dict[str, float](), []
    options: dict[str, Any] = {"fingerprints": base.fingerprints, "text": text, "allow_partial": allow_partial}
    for its in loras:
        added = load_lora(unet, its.path, only=its.adapter, **options)
        scales |= dict.fromkeys(added, its.strength)
        triggers.append(" ".join(dict.fromkeys(entry.trigger for entry in added.values() if entry and entry.trigger)))
    for network in (unet, text):
        for layer in network.modules():
            if isinstance(layer, LoRALayer):
                layer.merge(scales)
                layer.original = None  # no way back is needed, and a second copy of the weights would be large
        for name in adapter_names(network):
            remove_adapter(network, name)
    return triggers


def _cast(network: nn.Module, dtype: torch.dtype, what: str) -> None:
    for name, parameter in network.named_parameters():
        if not parameter.to(dtype).isfinite().all():
            raise UserError(
                f"nothing written, since {dtype} cannot hold the {what}'s {name}, whose numbers go up to "
                f"{parameter.abs().max().item():.3g}: take another --dtype, or lower strengths"
            )
    network.to(dtype)


def _write(folder: Path, name: str, base: Base, layout: str, record: Mapping[str, Any]) -> None:
    if layout == "ldm":
        files = folder / f"{name}.safetensors", folder / f"{name}_mm.safetensors"
        save_ldm(*files, base.unet, base.vae, base.text, {HEADER: json.dumps(record)})
        if replace(base.unet.config, motion=None) != UNetConfig():
            warnings.warn(
                f"{base.name} is not of Stable Diffusion 1.5's size: only tools that are told its size will load the "
                "files",
                stacklevel=3,
            )
    else:
        assert base.tokenizer  # reads it, and so checks that it belongs to the text encoder
        vocabulary = base.tokenizer_folder or tokenizer_on_hub()
        recipe = None if base.recipe == Recipe() else base.recipe
        dtype = base.dtype
        save_base(folder, base.unet, base.vae, base.text, vocabulary, recipe, dtype, shard_bytes=10_000_000_000)
    written = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    write_json(folder / RECORD, {**record, "files": written})


def _name(path: str | None) -> str | None:
    """The last part of a path: a record that travels tells nothing of the folders it was made in."""
    return None if path is None else Path(path).expanduser().resolve().name


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt merge`."""
    about = "Write a base with LoRAs inside, as a checkpoint for tools that know no LoRA."
    merge(parse_settings(MergeSettings, argv, prog="customttt merge", description=about))


if __name__ == "__main__":
    run_command(main)
