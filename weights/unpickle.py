"""Pickled torch files (.ckpt, .pt, .bin) under weights-only rules, with inert stand-ins for a few known names."""

import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from model.errors import UserError


class StandIn:
    """Takes the place of a harmless class named in a pickle. It runs nothing and keeps nothing but named tensors."""

    tensors: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        """Make an empty stand-in, whatever the pickle says to call the class with."""
        stand_in = object.__new__(cls)
        stand_in.tensors = {}
        return stand_in

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        kept = state.get("_parameters") if isinstance(state, dict) else None
        self.tensors = kept if isinstance(kept, dict) else {}


# The only names a pickle may hold beside those torch itself allows. The named module is never imported: what the
# pickle gets is the class on the right.
HARMLESS = (
    # hyper-parameters of a training run (torch fills only true dictionaries)
    (r"(pytorch_lightning|lightning|lightning_fabric)\.[\w.]*AttributeDict", OrderedDict),
    # state of callbacks (ModelCheckpoint, EarlyStopping ...) that old Stable Diffusion checkpoints drag along
    (r"(pytorch_lightning|lightning|lightning_fabric)\.[\w.]+", StandIn),
    # single numbers (a best score) inside that state
    (r"numpy\.(_?core\.multiarray\.scalar|dtype)", StandIn),
    # the table of vectors in textual-inversion files of the A1111 web UI
    (r"torch\.nn\.modules\.container\.ParameterDict", StandIn),
)


def load_torch(path: Path, container: str, device: str) -> Any:
    """Load what `torch.save` wrote: plain data and tensors on `device` ("cpu", or "meta" for shapes only).

    `container` is "torch zip" (mapped into memory, not read) or "torch pickle" (before torch 1.6). No module named in
    the file is imported and nothing in it runs; raises UserError naming what the file wanted, or what is broken.
    """
    names = _names_in_zip(path) if container == "torch zip" else _names_in_pickles(path)
    stand_ins = [(base, name) for name in sorted(names) if (base := _stand_in(name))]
    mapped = container == "torch zip" and path.suffix != ".safetensors"  # torch goes by that name, not by content
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path if mapped else file, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # torch's reader raises nearly anything on bytes that make no sense
        refused = re.search(r"GLOBAL ([^\s,]+)", str(error))
        if refused is None:
            reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
            raise UserError(
                f"{path} is damaged, cut short, or not a file of weights ({reason or type(error).__name__}). "
                "Download it again."
            ) from error
        name = next((name for name in names if name in (refused[1], f"builtins.{refused[1]}")), refused[1])
        raise UserError(
            f"{path} wants to run code: it names {name}, which a file of weights has no need of. Nothing of it was "
            "loaded or run. If you trust its maker, ask for the same weights as .safetensors."
        ) from error


def _stand_in(name: str) -> type | None:
    for pattern, base in HARMLESS:
        if re.fullmatch(pattern, name):
            # one class for each name, since classes may be keys of a dictionary
            return type(name.rpartition(".")[2], (base,), {}) if base is StandIn else base
    return None


def _names_in_zip(path: Path) -> set[str]:
    """Every module.name that the pickle inside would import, read without running it."""
    total = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, total - 66_000))  # the table's last record is within 64 KiB of the end
        if b"PK\x05\x06" not in file.read():
            raise UserError(
                f"{path} is cut short: {total:,} bytes are there, and the table of contents that ends every torch "
                "file is missing. Download it again."
            )
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if inside and inside[0].file_size <= total:  # else it is packed far too well to be torch's
                with archive.open(inside[0]) as stream:
                    return _names(stream)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} is a damaged torch file: {error}. Download it again.") from error
    raise UserError(f"{path} is a zip archive, but not one that torch wrote. Unpack it and give the file inside.")


def _names_in_pickles(path: Path) -> set[str]:
    with open(path, "rb") as file:
        # a magic number, the format's version, the writer's system, and then the data; raw storages follow
        return set().union(*(_names(file) for _ in range(4)))


def _names(stream: Any) -> set[str]:
    names = set()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "GLOBAL":
                names.add(re.sub("^__builtin__ ", "builtins ", str(argument)).replace(" ", ".", 1))
    except (ValueError, OverflowError, MemoryError):
        pass  # broken from here on: torch says so when it loads
    return names
