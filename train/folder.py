"""A run's folder: `settings.json`, `inputs.json`, `log.csv`, `previews/`, `state.pt` while it lasts, the LoRA."""

import copy
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
            self._clean(self.state)
        return self.lora.is_file()

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
        """Take up the saved state, if there is one, and return how many steps it has behind it.

        Raises:
            UserError: the state is damaged.
        """
        if not self.state.is_file():
            self._cut_log(0)
            return 0
        try:
            state = copy.deepcopy(load_torch(self.state, container_of(self.state), "cpu"))  # off the mapped file
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
        kept = f"The last good state is kept in {self.state}" if self.state.is_file() else "No state was saved yet"
        return (
            f"{what[0].upper()}{what[1:]}: the run stopped. {kept}. A lower --learning_rate or --dtype float32 in a "
            "new --out may help; if the first step fails, the base's weights or the training data are damaged"
        )

    def finish(self, base: Base, words: Mapping[str, tuple[str, str]], settings: Any) -> None:
        """Write the LoRA (see `save_lora` for `words`) and remove the state."""
        record = dataclasses.asdict(settings)
        save_lora(self.lora, base.unet, words, base=base.name, fingerprints=base.fingerprints, settings=record)
        self.state.unlink(missing_ok=True)

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
