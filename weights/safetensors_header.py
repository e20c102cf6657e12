"""The header of a safetensors file, none of whose claims is believed."""

import json
import math
from pathlib import Path
from typing import Any

from model.errors import UserError

# Bytes per element of each dtype a safetensors header may name.
SAFETENSORS_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
# Bytes. Real headers have less than 1.5 MB, kohya's notes on a large data set included. Read as JSON, 10 MB of nothing
# but brackets take 400 MB; safetensors' own limit of 100 MB would take 4 GB.
LONGEST_HEADER = 10_000_000
MOST_AXES = 16


def read_safetensors_header(path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The header of a safetensors file: its metadata, and its entries by tensor.

    Everything it claims is compared with the file's length before a tensor is read.

    Raises:
        UserError: the file is cut short, or claims what cannot be.
    """
    total = path.stat().st_size
    cut_short = f"{path} is cut short: {total:,} bytes are there, and its header claims {{:,}}. Download it again."
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > total:
            raise UserError(cut_short.format(8 + length))
        if length > LONGEST_HEADER:
            raise UserError(
                f"{path} has a header of {length:,} bytes, where those of real files have less than "
                f"{LONGEST_HEADER:,}: it was not read."
            )
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_once_each)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is more than text")
        end = _checked_end(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is a damaged safetensors file: its header makes no sense ({_short(repr(error))})."
        ) from error
    if 8 + length + end > total:
        raise UserError(cut_short.format(8 + length + end))
    if 8 + length + end < total:
        raise UserError(
            f"{path} is a damaged safetensors file: {total - 8 - length - end:,} bytes belong to no tensor."
        )
    return metadata, entries


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose names stands there twice: readers differ in which of the two they take."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name is given twice")
    return table


def _checked_end(entries: dict[str, dict[str, Any]]) -> int:
    """Where the tensors end, which lie one behind the other from 0 on, each as long as its shape says.

    Raises ValueError, KeyError or TypeError for anything else.
    """
    places = []
    for entry in entries.values():
        begin, stop = entry["data_offsets"]
        numbers = [begin, stop, *entry["shape"]]
        if len(numbers) > 2 + MOST_AXES or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"no shape or no place in {entry}")
        if math.prod(entry["shape"]) * SAFETENSORS_DTYPES[entry["dtype"]][1] != stop - begin:
            raise ValueError(f"shape and length disagree in {entry}")
        places.append((begin, stop))
    end = 0
    for begin, stop in sorted(places):
        if begin != end:
            raise ValueError(f"tensors overlap or leave a gap at {min(begin, end)}")
        end = stop
    return end


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + " ..."
