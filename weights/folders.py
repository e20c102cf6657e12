"""Folders: locked for one process, places to write in that no kill leaves for good, and new ones in place of old."""

import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from model.errors import UserError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".writing-"  # how the names of places to write in begin


def check_folder(path: str | Path, wanted: str | Path | None = None) -> None:
    """Raise UserError where nothing can be written into the folder `path`, or where it cannot be made.

    `wanted` is what was to be written there, for the message; not given: the folder itself.
    """
    path = Path(path)
    home = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        what = "read-only" if home.is_dir() else "no folder"
        raise UserError(f"{wanted or path} cannot be written: {home} is {what}: give --out a name elsewhere")


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Within the block the folder is this process's alone; the lock goes with the process, however that ends.

    The folder is made if it is not there, and is gone again if nothing was written into it; what a killed process left
    half written is removed. What is in it is not locked with it: folders below it may be locked themselves.

    Raises:
        UserError: another process has it, or it cannot be made.
    """
    path = Path(path)
    check_folder(path)
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = _lock(path)
    except BlockingIOError as error:
        raise UserError(
            f"another process is at work in {path}: wait for it, stop it, or give --out a new name"
        ) from error
    except OSError as error:
        raise UserError(f"{path} could not be made a folder to work in: {error.strerror}") from error
    if handle is None and fcntl is not None:
        warnings.warn(f"{path} could not be locked: start no second run in it", stacklevel=3)
    try:
        remove_leftovers(path)
        yield
    finally:
        if made:
            with suppress(OSError):  # it holds something
                path.rmdir()
        _close(handle)


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """Give a fresh folder inside `folder` to write in, gone after the block; what dead processes left of theirs too.

    It is locked for as long as its process lives: that is how those of the living are told from those of the dead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    while True:
        path = folder / f"{UNFINISHED}{secrets.token_hex(6)}"
        path.mkdir()
        handle = None
        with suppress(FileNotFoundError, BlockingIOError):
            handle = _lock(path)
        if path.is_dir():
            break
        _close(handle)  # another process took it for a leftover before it was locked
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`; what another one is writing just now stays."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            handle = _lock(path)
            if handle is not None:  # where nothing can be locked, none is known to be dead
                shutil.rmtree(path, ignore_errors=True)
            _close(handle)


@contextmanager
def replacing(folders: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Give the path of a new folder for each of `folders`; when the block ends well, they take the folders' places.

    Where the block fails, the folders are as they were. A former folder is moved aside, and removed only once the new
    one is there; a kill in between leaves it as `.former-<name>`, and the next call puts it back.

    Raises:
        UserError: a system that refuses.
    """
    former = {folder: folder.with_name(f".former-{folder.name}") for folder in folders}

    def put_back() -> None:
        for folder, aside in former.items():
            if folder.exists():
                _remove(aside)
            elif aside.exists():
                aside.rename(folder)

    try:
        put_back()
        with ExitStack() as stack:
            stack.callback(put_back)
            fresh = {folder: stack.enter_context(workplace(folder.parent)) / folder.name for folder in folders}
            yield fresh
            for folder, new in fresh.items():
                if folder.exists():
                    folder.rename(former[folder])
                new.rename(folder)
    except OSError as error:
        named = " and ".join(map(str, folders))
        raise UserError(f"{named} could not be written: {error}") from error


def _lock(path: Path) -> int | None:
    """A handle that locks the folder until it is closed, or its process ends; None where folders cannot be locked.

    Raises BlockingIOError where another process has the lock, and other OSErrors for what is no folder, or is gone.
    """
    if fcntl is None:  # Windows
        return None
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # some network file systems have no locks
        os.close(handle)
        return None
    return handle


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Delete a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
