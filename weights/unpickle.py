"""Pickled torch files (.ckpt, .pt, .bin) under weights-only rules, with inert stand-ins for a few known names."""

import io
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
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


# Of a pickle's operations, and of what comes of it. A checkpoint with 2,000 tensors has 80,000.
MOST_ENTRIES = 1_000_000
MOST_SHARED = 8  # times a file's length: what its tensors may add up to, where several show the same numbers
# torch lets pickles call `_codecs.encode`, as numpy's do with latin1; these take 70 s for 40,000 letters.
SLOW_CODECS = ("punycode", "idna")


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
            loaded = torch.load(path if mapped else file, map_location=device, weights_only=True, mmap=mapped)
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
    if _unfolded(loaded) > MOST_ENTRIES:
        raise UserError(
            f"{path} holds tables that hold each other, without end to speak of: it is not a file of weights."
        )
    return loaded


def _unfolded(loaded: Any) -> int:
    """How many entries one would meet who walked through all tables and lists: one that is named twice counts twice.

    A pickle of a few bytes can name one list ten times in a list that is named ten times, and so on. A table that holds
    itself is not followed.
    """
    counts: dict[int, int] = {}
    todo = [loaded]
    while todo:
        entry = todo[-1]
        inner = _inner(entry)
        fresh = [] if id(entry) in counts else [each for each in inner if id(each) not in counts]
        counts.setdefault(id(entry), 1)
        if fresh:
            todo += fresh
        else:
            counts[id(entry)] = min(1 + sum(counts.get(id(each), 1) for each in inner), MOST_ENTRIES + 1)
            todo.pop()
    return counts[id(loaded)]


def _inner(entry: Any) -> Collection[Any]:
    if isinstance(entry, StandIn):
        return entry.tensors.values()
    if isinstance(entry, dict):
        return entry.values()
    return entry if isinstance(entry, list | tuple | set) else ()


def check_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """See that a file's tensors are no more than what it holds: plain numbers, none of them shown too many times over.

    A pickle may lay a tensor of any shape over a single number (stride 0), which takes no memory until it is copied.

    Raises:
        UserError: they are not.
    """
    total, claimed = path.stat().st_size, 0
    for name, tensor in tensors.items():
        if (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.is_quantized
        ):
            raise UserError(f"{path}: {name[:200]} is no plain tensor (sparse, quantised or of a kind of its own).")
        size = tensor.numel() * tensor.element_size()
        claimed += size
        if size > total or claimed > MOST_SHARED * total:
            raise UserError(
                f"{path} is damaged: {name[:200]} would have {tuple(tensor.shape)} numbers, and the file has "
                f"{total:,} bytes. Download it again."
            )


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
            entries = archive.infolist()
            packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None:
                raise UserError(f"{path} was packed again by another program than torch: save it with torch.save again")
            if sum(entry.file_size for entry in entries) > total:
                raise UserError(f"{path} is a damaged torch file: its table of contents claims more than there is.")
            inside = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if inside:
                return set().union(*(_names(io.BytesIO(archive.read(entry)), path) for entry in inside))
    except UserError:
        raise
    except Exception as error:  # so does Python's reader of zip files
        raise UserError(f"{path} is a damaged torch file: {error}. Download it again.") from error
    raise UserError(f"{path} is a zip archive, but not one that torch wrote. Unpack it and give the file inside.")


def _names_in_pickles(path: Path) -> set[str]:
    with open(path, "rb") as file:
        # a magic number, the format's version, the writer's system, and then the data; raw storages follow
        return set().union(*(_names(file, path) for _ in range(4)))


def _names(stream: Any, path: Path) -> set[str]:
    names: set[str] = set()
    slow = False
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > MOST_ENTRIES:
                raise UserError(f"{path} holds far more than tensors and their names: it is not a file of weights.")
            if opcode.name == "GLOBAL":
                names.add(re.sub("^__builtin__ ", "builtins ", str(argument)).replace(" ", ".", 1))
            slow |= isinstance(argument, str) and re.sub(r"\W|_", "", argument.lower()) in SLOW_CODECS
    except (ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        # broken from here on: torch says so when it loads
    if slow and "_codecs.encode" in names:
        raise UserError(f"{path} asks for a conversion of text that takes hours: it is not a file of weights.")
    return names
