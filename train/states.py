"""States of training on disk: written whole, told from damaged ones, the one before kept beside the last; and logs."""

import copy
import csv
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import UserError
from weights import atomic_write
from weights.files import container_of, torch_bytes
from weights.unpickle import load_torch

# What a damaged state makes of reading it, and of taking it up.
DAMAGE = (KeyError, ValueError, TypeError, RuntimeError, AttributeError, UserError)


def state_before(file: Path) -> Path:
    """Where the state is kept that was saved before that in `file`."""
    return file.with_suffix(f".before{file.suffix}")


def states(file: Path) -> list[Path]:
    """The states that are there, the last one first."""
    return [each for each in (file, state_before(file)) if each.is_file()]


def save_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write a state with its checksum, atomically; the one in `file` is kept as the one before.

    Raises:
        UserError: the system refuses; what was there is there still.
    """
    contents = torch_bytes({**state, "checksum": checksum(state)})
    try:
        with atomic_write(file) as temporary:
            temporary.write_bytes(contents)
            if file.is_file():
                os.replace(file, state_before(file))
    except UserError as error:
        kept = states(file)
        later = f"goes on from {kept[0]}" if kept else "starts anew"
        raise UserError(f"{error}. Once that is mended, the same command {later}") from error


def read_state(file: Path) -> dict[str, Any]:
    """The state in `file`, on the CPU.

    Raises:
        UserError: it is damaged.
    """
    try:
        state = copy.deepcopy(load_torch(file, container_of(file), "cpu"))  # off the mapped file
        if state["checksum"] != checksum(state):
            raise ValueError("its contents are not those that were saved")
    except DAMAGE as error:
        raise UserError(f"{file} is damaged ({error})") from error
    return state


def restore_state(file: Path, take_up: Callable[[dict[str, Any]], None]) -> int:
    """Hand the last saved state that is whole to `take_up`, and return how many steps it has behind it; 0 without one.

    Args:
        file: the last state; where it is damaged, the one before takes its place.
        take_up: may raise what reading a damaged state raises.

    Raises:
        UserError: states are there, and all of them are damaged.
    """
    found, broken = states(file), []
    for each in found:
        try:
            state = read_state(each)
            done = int(state["done"])
            take_up(state)
        except DAMAGE as error:
            broken.append(str(error) if isinstance(error, UserError) else f"{each} is damaged ({error})")
            continue
        if broken:
            warnings.warn(f"{broken[0]}: going on from the state before it, of step {done}", stacklevel=3)
            os.replace(each, file)  # else the next state would push this one out for the damaged one
        return done
    if broken:
        raise UserError(f"{broken[0]}: delete {' and '.join(map(str, found))}, and the run starts anew")
    return 0


def checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a state but the checksum itself: numbers, names and every tensor's bytes."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in value:
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)}".encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add({key: value for key, value in state.items() if key != "checksum"})
    return digest.hexdigest()


def add_row(log: Path, step: int, values: Mapping[str, str]) -> None:
    """Add a row to a log, a CSV file that begins with a row of names; its first column is the step.

    Raises:
        UserError: the system refuses.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not file.tell():
                writer.writerow(["step", *values])
            writer.writerow([step, *values.values()])
    except OSError as error:
        raise UserError(f"{log} could not be written: {error}") from error


def cut_log(log: Path, last: int) -> None:
    """Keep the rows up to step `last`: what a killed run logged beyond its state happens again."""
    if not log.is_file():
        return
    head, *rows = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    whole = [row for row in rows if row.count(",") == head.count(",") and re.match(r"[0-9]{1,15},", row)]
    kept = [row for row in whole if int(row.partition(",")[0]) <= last]
    if not kept:
        log.unlink()
    elif len(kept) < len(rows):
        with atomic_write(log) as temporary:
            temporary.write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
