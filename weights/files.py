"""Files in and out: atomic writes, and reads that trust nothing a file says about itself."""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import UserError
from weights.folders import workplace
from weights.safetensors_header import LONGEST_HEADER, SAFETENSORS_DTYPES, read_safetensors_header
from weights.unpickle import StandIn, check_tensors, load_torch

WRAPPERS = ("state_dict", "controlnet")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype ("float16") of a tensor that was not loaded."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a checkpoint file holds: its container, its tensors by name (unwrapped), and its other small entries."""

    container: str
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path of the same name to write to; it becomes `path` only when the block ends well.

    On any failure, Ctrl-C included, it is removed and whatever was at `path` before is untouched; what a killed process
    leaves, the next write into that folder removes. The file may be read by whom new files may be read by. Missing
    parent folders are created. Raises UserError where the system refuses (no permission, disk full).
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a file of that name was to be written there.")
    try:
        with workplace(path.parent) as place:
            temporary = place / path.name
            yield temporary
            temporary.chmod(place.stat().st_mode & 0o666)  # safetensors makes files that their owner alone can read
            _flush_to_disk(temporary)
            os.replace(temporary, path)
            with suppress(OSError):  # the rename should survive a power cut too; not every file system can promise it
                _flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be written: {error}") from error


def torch_bytes(value: Any) -> memoryview:
    """What `torch.save` writes; of a full disk it would itself say no more than that positions are not as expected."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """`value` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises UserError if it is missing, is not JSON, or is longer than any that is of use here."""
    try:
        return json.loads(read_text(path, LONGEST_HEADER))
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error


def printable(text: str, longest: int | None = None) -> str:
    """The text on one line, without what could move a terminal's cursor or turn its writing about, in its place a
    blank: files come from strangers.
    """
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if longest is None or len(line) <= longest else line[:longest] + " ..."


def read_text(path: str | Path, longest: int) -> str:
    """A text file in UTF-8 of at most `longest` bytes.

    Raises:
        UserError: it is longer.
        OSError, UnicodeDecodeError: as of `open` and `read`.
    """
    with open(path, "rb") as file:
        content = file.read(longest + 1)
    if len(content) > longest:
        raise UserError(f"{path} is longer than {longest:,} bytes, which no such file has a need of: it was not read.")
    return content.decode("utf-8")


def sha256(path: str | Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def container_of(path: str | Path) -> str:
    """Tell by its first bytes what `path` is wrapped in: "safetensors", "torch zip" or "torch pickle".

    Raises UserError for a missing file, a folder, an empty file, a git-LFS pointer, a web page, and anything else.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; a file was expected here.")
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        raise UserError(f"{path} is empty (0 bytes): the download or the copy failed. Get it again.")
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return "torch pickle"
    if head.startswith(b"version ") and b"git-lfs" in head:
        claims = dict(line.split(" ", 1) for line in head.decode("utf-8", "replace").splitlines() if " " in line)
        raise UserError(
            f"{path} is a git-LFS pointer, not the file itself ({claims.get('size', 'unknown')} bytes, "
            f"{claims.get('oid', 'no oid')}). Run `git lfs pull` in its folder."
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise UserError(
            f"{path} is a web page (HTML or XML) saved under a model's name, most likely a login or an error page. "
            "Open the link in a browser and download the file itself."
        )
    raise UserError(f"{path} is not a model file: neither safetensors nor torch (it starts with {head[:8]!r}).")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a .safetensors, .ckpt, .pt or .bin file by name, on the CPU, without running its code.

    The container is told by content. Wrappers (`state_dict`, `controlnet`) and a leading `module.` are taken off;
    entries that are not tensors are dropped; tables of tensors inside get dotted names. Tensors may be backed by the
    mapped file: copy before writing to them. Raises UserError for every kind of bad file, with what to do.
    """
    path = Path(path)
    container = container_of(path)
    if container != "safetensors":
        loaded = load_torch(path, container, "cpu")
        if isinstance(loaded, list):
            raise UserError(
                f"{path} is a bare list of {len(loaded)} tensors without names (an early LoRA of cloneofsimo's or "
                "showlab's scripts): nothing says which layer each belongs to, so it cannot be used. Convert it with "
                "the tool that wrote it."
            )
        tensors = _named(loaded, path)
        check_tensors(tensors, path)
        return {name: tensor.detach() for name, tensor in tensors.items()}
    read_safetensors_header(path)
    try:
        with safe_open(path, "pt") as file:
            return _without_module({name: file.get_tensor(name) for name in file.keys()}, path)  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is a damaged safetensors file: {error}. Download it again.") from error


def read_header(path: str | Path) -> Header:
    """Read names, shapes, dtypes and small entries as read_checkpoint would, without the tensors' data.

    The tensors of a nameless list are named "[0]", "[1]" ... Raises UserError for every kind of bad file.
    """
    path = Path(path)
    container = container_of(path)
    if container == "safetensors":
        metadata, entries = read_safetensors_header(path)
        infos = {n: TensorInfo(tuple(e["shape"]), SAFETENSORS_DTYPES[e["dtype"]][0]) for n, e in entries.items()}
        return Header(container, _without_module(infos, path), metadata)
    loaded = load_torch(path, container, "meta" if container == "torch zip" else "cpu")
    if isinstance(loaded, list):
        loaded = {f"[{index}]": entry for index, entry in enumerate(loaded)}
    tensors = _named(loaded, path)
    check_tensors(tensors, path)
    infos = {n: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()}
    small = loaded if isinstance(loaded, dict) else {}
    return Header(container, infos, {str(k): str(v) for k, v in small.items() if isinstance(v, str | int | float)})


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The tensors in what torch loaded: wrappers off, inner tables under dotted names, the rest dropped."""
    for _ in range(8):  # a hostile file may hold itself
        inner = [loaded[key] for key in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)]
        if not inner:
            break
        loaded = inner[0]
    tensors = dict(_walk(loaded, "", depth=3))
    if not tensors:
        raise UserError(f"{path} holds no named tensors: it is not a file of weights.")
    return _without_module(tensors, path)


def _walk(entry: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(entry, StandIn):
        entry = entry.tensors
    if isinstance(entry, Tensor):
        yield name or "tensor", entry
    elif isinstance(entry, dict) and depth:
        for key, value in entry.items():
            if isinstance(key, str):
                yield from _walk(value, f"{name}.{key}" if name else key, depth - 1)


def _without_module(tensors: dict[str, Any], path: Path) -> dict[str, Any]:
    stripped = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):
        raise UserError(f"{path} holds some tensors twice, with and without `module.`: it is unclear which counts.")
    return stripped
