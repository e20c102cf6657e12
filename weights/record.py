"""A clip's record: all it takes to make it again, in the comment tag of an mp4 and in a JSON beside any clip.

Records come from outside as clips do: types are checked, text is short, and nothing that they name is written to.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import torch

from model.errors import UserError
from weights.files import read_json
from weights.settings import settings_from

SUFFIX = ".record.json"  # behind the name of the clip
LARGEST = 1_000_000  # bytes; records take a few thousand
PACKAGES = ("customttt", "torch", "transformers", "numpy", "av")


@dataclass(kw_only=True)
class Record:
    """What a clip was made with.

    Args:
        customttt: the version that made it.
        prompt: of the clip.
        seed: of the clip.
        prompts: of all clips that were sampled at once with it, itself included: their number changes the last bits.
        seeds: of the same clips.
        settings: those of `customttt generate` as they were given, without what differs from clip to clip.
        filled: what took the place of those that were not given: the base's own numbers, the device, the precision.
        files: by flag ("lora"), the SHA-256 of what it named.
        base: name of the base.
        fingerprints: of the base's networks, see `Base`.
        versions: of Python, the packages and the hardware.
        threads: of the CPU: their number, too, changes the last bits.
    """

    customttt: str
    prompt: str
    seed: int
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    filled: dict[str, Any]
    files: dict[str, dict[str, str]]
    base: str
    fingerprints: dict[str, str]
    versions: dict[str, str]
    threads: int


def record_file(clip: str | Path) -> Path:
    """Where the record of a clip is kept beside it: `clip.mp4.record.json`, for a folder `clip.record.json`."""
    return Path(clip).with_name(Path(clip).name + SUFFIX)


def find_record(path: str | Path) -> Record | None:
    """The record in a clip, or beside it, or in the JSON that `path` names; None: it has none.

    Raises:
        UserError: a record that makes no sense, or a file that cannot be read.
    """
    path = Path(path)
    if not path.name:  # "." and "/": nothing lies beside them
        return None
    beside = path if path.suffix == ".json" else record_file(path)
    if beside is not path and path.is_file() and (table := _from_tag(path)) is not None:
        return _checked(table, path)
    if not beside.is_file():
        return None
    if beside.stat().st_size > LARGEST:
        raise UserError(f"{beside} is no record of a clip: it has more than {LARGEST:,} bytes.")
    table = read_json(beside)
    if not isinstance(table, dict) or "customttt" not in table:
        raise UserError(f"{beside} is no record of a clip: its entry `customttt` is missing.")
    return _checked(table, beside)


def versions(device: torch.device) -> dict[str, str]:
    """What, beside a record's settings, may change the bits of a clip sampled on this device."""
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, "hardware": hardware}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a clone that was not installed
        return "unknown"


def _from_tag(path: Path) -> dict[str, Any] | None:
    """The table in a file's comment tag, if it is a record: any video may have a comment of some other kind."""
    try:
        # Opened by descriptor, the file has no name that FFmpeg could guess a format from, and may open no other.
        with (
            open(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb") as file,
            av.open(file, options={"protocol_whitelist": "none"}, metadata_errors="replace") as container,
        ):
            text = container.metadata.get("comment", "")
        table = json.loads(text) if len(text) <= LARGEST else None
    except (av.FFmpegError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror or error}.") from error
    return table if isinstance(table, dict) and "customttt" in table else None


def _checked(table: Mapping[str, Any], where: Path) -> Record:
    record = settings_from(Record, table, f"{where}: record")
    tables = [record.fingerprints, record.versions, *record.files.values()]
    if not all(isinstance(inner, dict) and all(isinstance(text, str) for text in inner.values()) for inner in tables):
        raise UserError(f"{where}: record: files, fingerprints and versions must be tables of texts.")
    if not 1 <= record.threads <= 1024:
        raise UserError(f"{where}: record: threads must be from 1 to 1024, and is {record.threads}.")
    together = list(zip(record.prompts, record.seeds, strict=False))
    if len(record.prompts) != len(record.seeds) or together.count((record.prompt, record.seed)) != 1:
        raise UserError(f"{where}: record: the clip is not among those that were sampled with it.")
    return record
