"""A run's folder: `settings.json`, `inputs.json`, `log.csv`, `previews/`, `state.pt` while it lasts, the LoRA."""

import csv
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import UserError
from weights import Base, atomic_write, read_json, save_lora, save_settings, sha256, write_json
from weights.files import container_of
from weights.lora import FILE_NAME
from weights.unpickle import load_torch

# Settings that change nothing about the result.
FREE = ("out", "device", "save_every", "preview_every", "gradient_checkpointing")


class RunFolder:
    """Where one run keeps what it needs to be stopped, resumed and understood."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lora = self.path / FILE_NAME
        self.state = self.path / "state.pt"
        self.log_file = self.path / "log.csv"

    def is_done(self, settings: Any, inputs: Mapping[str, Path]) -> bool:
        """Whether this very run is over and its LoRA is written; see `check` for what is an error."""
        self.check(settings, inputs)
        return self.lora.is_file()

    def check(self, settings: Any, inputs: Mapping[str, Path], base: Base | None = None) -> dict[str, str]:
        """See that the folder is free, or that of this very run; a setting of None fits anything.

        Args:
            settings: the run's settings, a dataclass.
            inputs: files that the result depends on, by what they are called; their contents count.
            base: the base, once it is loaded.

        Returns:
            What tells the inputs and the base from others.

        Raises:
            UserError: the folder belongs to a run with other settings or inputs, or to something else.
        """
        present = {name: sha256(path) for name, path in inputs.items()}
        if base is not None:
            present["base"] = base.fingerprint
        if self.path.is_file():
            raise UserError(f"{self.path} is a file: give --out the name of a new folder")
        if not self._is_run():
            strangers = [path.name for path in self._files() if path.name != "inputs.json"]
            if strangers:
                raise UserError(f"{self.path} is no run folder and holds {strangers[0]}: give --out a new name")
            return present
        before, now = read_json(self.path / "settings.json"), json.loads(json.dumps(dataclasses.asdict(settings)))
        changed = [f"{key} ({before.get(key)} there, {now[key]} now)" for key in now if _differs(key, now, before)]
        recorded = read_json(self.path / "inputs.json")
        names = present.keys() | recorded.keys() - {"base"}
        changed += [f"the contents of {name}" for name in sorted(names) if recorded.get(name) != present.get(name)]
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings: {', '.join(changed)}. Give --out a new name, or delete "
                "that folder if the run in it is not wanted any more"
            )
        return present

    def begin(self, settings: Any, inputs: Mapping[str, Path], base: Base) -> None:
        """Write down the settings, all filled in, and what the inputs hold; checked first as in `check`."""
        present = self.check(settings, inputs, base)
        if self.path.is_dir():
            for leftover in self.path.glob(".writing-*"):  # of a run that was killed while it wrote
                leftover.unlink()
        if not self._is_run():
            write_json(self.path / "inputs.json", present)
            save_settings(self.path / "settings.json", settings)

    def restore(
        self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> int:
        """Take up the saved state, if there is one, and return how many steps it has behind it.

        Raises:
            UserError: the state is damaged.
        """
        if not self.state.is_file():
            self._cut_log(0)
            return 0
        try:
            state = load_torch(self.state, container_of(self.state), "cpu")
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.data.copy_(saved)
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            done = int(state["done"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.state} is damaged ({error}): delete it, and the run starts anew") from error
        self._cut_log(done)
        return done

    def save(
        self,
        done: int,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Write the state after `done` steps, atomically."""
        state = {
            "done": done,
            "parameters": [parameter.detach().cpu() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        with atomic_write(self.state) as temporary:
            torch.save(state, temporary)

    def log(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Add a row to `log.csv`: step, losses, seconds."""
        fields = {"step": step, **{name: f"{value:.6g}" for name, value in losses.items()}, "seconds": f"{seconds:.3f}"}
        new = not self.log_file.is_file()
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
        kept = f"The last good state is kept in {self.state}" if self.state.is_file() else "No state was saved yet"
        return (
            f"{what[0].upper()}{what[1:]}: the run stopped. {kept}. A lower --learning_rate or --dtype float32 in a "
            "new --out may help; if the first step fails, the base's weights or the training data are damaged"
        )

    def finish(self, base: Base, words: Mapping[str, tuple[str, str]], settings: Any) -> None:
        """Write the LoRA (see `save_lora` for `words`) and remove the state."""
        record = dataclasses.asdict(settings)
        save_lora(self.lora, base.unet, words, base=base.name, fingerprint=base.fingerprint, settings=record)
        self.state.unlink(missing_ok=True)

    def _is_run(self) -> bool:
        return (self.path / "settings.json").is_file()

    def _files(self) -> list[Path]:
        """What lies in the folder, without what a killed run left half written."""
        return [path for path in self.path.glob("*") if not path.name.startswith(".writing-")]

    def _cut_log(self, done: int) -> None:
        """Keep the rows of the first `done` steps: what a killed run logged beyond its state happens again."""
        if self.log_file.is_file():
            head, *rows = self.log_file.read_text(encoding="utf-8").splitlines()
            kept = [row for row in rows if row.count(",") == head.count(",") and int(row.partition(",")[0]) < done]
            with atomic_write(self.log_file) as temporary:
                temporary.write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")


def _differs(key: str, now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return key not in FREE and now[key] is not None and before.get(key) != now[key]
