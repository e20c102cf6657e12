"""A run's folder: `settings.json`, `inputs.json`, `log.csv`, `previews/`, `state.pt` while it lasts, the LoRA."""

import copy
import csv
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import UserError
from weights import Base, atomic_write, read_json, save_lora, save_settings, sha256, write_json
from weights.files import container_of
from weights.lora import FILE_NAME
from weights.unpickle import load_torch

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

# Settings that change nothing about the result, and those whose files are told by their contents.
FREE = {"out", "device", "save_every", "preview_every", "preview_prompt", "gradient_checkpointing"} | {
    *("images", "video", "appearance", "motion"),
}
PARTS = {"unet", "motion_module", "vae", "text_encoder"}  # of a base, as `Base.fingerprints` names them


class RunFolder:
    """Where one run keeps what it needs to be stopped, resumed and understood."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lora = self.path / FILE_NAME
        self.state = self.path / "state.pt"
        self.before = self.path / "state.before.pt"  # the state that was saved before that one
        self.log_file = self.path / "log.csv"
        self.left_out: list[str] = []

    def is_done(self, settings: Any, inputs: Mapping[str, Path]) -> bool:
        """Whether this very run, as it was asked for, is over and its LoRA is written.

        Args:
            settings: as given, a dataclass; what was left to the base (None) must have been left to it before.
            inputs: files that the result depends on, by what they are called; their contents count.

        Raises:
            UserError: the folder belongs to a run with other settings or inputs, or to something else.
        """
        self.left_out = [key for key, value in dataclasses.asdict(settings).items() if value is None]
        self._check(settings, {name: sha256(path) for name, path in inputs.items()})
        if self.lora.is_file():
            self._clean(self.state, self.before)
        return self.lora.is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block the folder is this process's alone; the lock goes with the process, however that ends.

        Raises:
            UserError: another process has it.
        """
        if fcntl is None:  # Windows, where a folder cannot be locked
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise UserError(
                f"another process is at work in {self.path}: wait for it, stop it, or give --out a new name"
            ) from error
        except OSError as error:  # some network file systems have no locks
            warnings.warn(f"{self.path} could not be locked ({error}): start no second run in it", stacklevel=3)
        try:
            yield
        finally:
            with suppress(OSError):
                os.close(handle)

    def begin(self, settings: Any, inputs: Mapping[str, Path], base: Base) -> None:
        """Write down the settings, all filled in, and what tells inputs and base from others.

        Raises:
            UserError: as `is_done`, and where the run was begun on another base.
        """
        present = {name: sha256(path) for name, path in inputs.items()} | base.fingerprints
        self._check(settings, present)
        self._clean()
        if not self._is_run():
            write_json(self.path / "inputs.json", {"left to the base": self.left_out, "contents": present})
            save_settings(self.path / "settings.json", settings)

    def restore(
        self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> int:
        """Take up the last saved state that is whole, if there is one, and return how many steps it has behind it.

        Raises:
            UserError: states are there, and all of them are damaged.
        """
        broken = []
        for file in (self.state, self.before):
            if not file.is_file():
                continue
            try:
                done = self._take_up(file, parameters, optimizer, scaler)
            except UserError as error:
                broken.append(str(error))
                continue
            if broken:
                warnings.warn(f"{broken[0]}: going on from the state before it, of step {done}", stacklevel=2)
            self._cut_log(done)
            return done
        if broken:
            raise UserError(f"{broken[0]}: delete {' and '.join(self._states())}, and the run starts anew")
        self._cut_log(0)
        return 0

    def _take_up(
        self,
        file: Path,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> int:
        """Raises UserError for a damaged file; nothing is changed then."""
        try:
            state = copy.deepcopy(load_torch(file, container_of(file), "cpu"))  # off the mapped file
            if state["checksum"] != checksum(state):
                raise ValueError("its contents are not those that were saved")
            saved = [tensor.reshape(p.shape) for p, tensor in zip(parameters, state["parameters"], strict=True)]
            done = int(state["done"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, UserError) as error:
            raise UserError(f"{file} is damaged ({error})") from error
        for parameter, tensor in zip(parameters, saved, strict=True):
            parameter.data.copy_(tensor)
        return done

    def _states(self) -> list[str]:
        return [str(file) for file in (self.state, self.before) if file.is_file()]

    def save(
        self,
        done: int,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Write the state after `done` steps, atomically; the one before it is kept until the next."""
        state: dict[str, Any] = {
            "done": done,
            "parameters": [parameter.detach().cpu() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        state["checksum"] = checksum(state)
        with atomic_write(self.state) as temporary:
            torch.save(state, temporary)
            if self.state.is_file():
                os.replace(self.state, self.before)

    def log(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Add a row to `log.csv`: step, losses, seconds."""
        fields = {"step": step, **{name: f"{value:.6g}" for name, value in losses.items()}, "seconds": f"{seconds:.3f}"}
        new = not self.log_file.is_file() or not self.log_file.stat().st_size
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.log_file, "a", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(fields), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(fields)
        except OSError as error:
            raise UserError(f"{self.log_file} could not be written: {error}") from error

    def lost(self, what: str) -> str:
        """The message for a run that cannot go on: what happened, what is kept, and what helps."""
        kept = f"The last good state is kept in {self._states()[0]}" if self._states() else "No state was saved yet"
        return (
            f"{what[0].upper()}{what[1:]}: the run stopped. {kept}. A lower --learning_rate or --dtype float32 in a "
            "new --out may help; if the first step fails, the base's weights or the training data are damaged"
        )

    def finish(self, base: Base, words: Mapping[str, tuple[str, str]], settings: Any) -> None:
        """Write the LoRA (see `save_lora` for `words`) and remove the state."""
        record = dataclasses.asdict(settings)
        save_lora(self.lora, base.unet, words, base=base.name, fingerprints=base.fingerprints, settings=record)
        self._clean(self.state, self.before)

    def _check(self, settings: Any, present: Mapping[str, str]) -> None:
        if self.path.is_file():
            raise UserError(f"{self.path} is a file: give --out the name of a new folder")
        if not self._is_run():
            names = {path.name for path in self.path.glob("*") if not path.name.startswith(".writing-")}
            strangers = names - {"inputs.json"}
            if strangers:
                raise UserError(f"{self.path} is no run folder and holds {min(strangers)}: give --out a new name")
            return
        before, record = read_json(self.path / "settings.json"), read_json(self.path / "inputs.json")
        now, left_out = json.loads(json.dumps(dataclasses.asdict(settings))), record.get("left to the base", ())
        changed = [
            f"{key} ({before.get(key)} there, {'none given' if value is None else value} now)"
            for key, value in now.items()
            if key not in FREE and (value != before.get(key) if value is not None else key not in left_out)
        ]
        recorded = record.get("contents", {})
        names = present.keys() | recorded.keys() - PARTS
        changed += [f"the contents of {name}" for name in sorted(names) if recorded.get(name) != present.get(name)]
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings: {', '.join(changed)}. Give --out a new name, or delete "
                "that folder if the run in it is not wanted any more"
            )

    def _is_run(self) -> bool:
        return (self.path / "settings.json").is_file()

    def _clean(self, *files: Path) -> None:
        """Remove what a killed run left half written, and `files`."""
        for path in (*self.path.glob(".writing-*"), *files):
            path.unlink(missing_ok=True)

    def _cut_log(self, done: int) -> None:
        """Keep the rows of the first `done` steps: what a killed run logged beyond its state happens again."""
        if self.log_file.is_file() and self.log_file.stat().st_size:
            head, *rows = self.log_file.read_text(encoding="utf-8").splitlines()
            kept = [row for row in rows if row.count(",") == head.count(",") and int(row.partition(",")[0]) < done]
            with atomic_write(self.log_file) as temporary:
                temporary.write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")


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
