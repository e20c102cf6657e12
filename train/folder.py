"""A run's folder: `settings.json`, `inputs.json`, `log.csv`, `previews/`, `state.pt` while it lasts, the LoRA."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model import UserError
from train.states import add_row, cut_log, restore_state, save_state, states
from weights import Base, read_json, save_lora, save_settings, sha256, write_json
from weights.detect import TOKEN_FILE
from weights.embeddings import Embedding, save_embedding
from weights.folders import UNFINISHED, check_folder, remove_leftovers
from weights.lora import FILE_NAME

# Settings that change nothing about the result, and those whose files are told by their contents.
FREE = {"out", "device", "save_every", "preview_every", "preview_prompt", "gradient_checkpointing"} | {
    *("images", "video", "more_videos", "appearance", "motion"),
}
PARTS = {"unet", "motion_module", "vae", "text_encoder"}  # of a base, as `Base.fingerprints` names them


class RunFolder:
    """Where one run keeps what it needs to be stopped, resumed and understood."""

    def __init__(self, path: str | Path, results: Sequence[str] = (FILE_NAME,)) -> None:
        self.path = Path(path)
        self.lora = self.path / FILE_NAME
        self.results = [self.path / name for name in results]  # what a finished run has written, in this order
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
        if self._done():
            self._clean()
        return self._done()

    def begin(self, settings: Any, inputs: Mapping[str, Path], base: Base) -> None:
        """Write down the settings, all filled in, and what tells inputs and base from others.

        Raises:
            UserError: as `is_done`, and where the run was begun on another base.
        """
        present = {name: sha256(path) for name, path in inputs.items()} | base.fingerprints
        self._check(settings, present)
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

        def take_up(state: dict[str, Any]) -> None:
            saved = [tensor.reshape(p.shape) for p, tensor in zip(parameters, state["parameters"], strict=True)]
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            for parameter, tensor in zip(parameters, saved, strict=True):
                parameter.data.copy_(tensor)

        done = restore_state(self.state, take_up)
        cut_log(self.log_file, done - 1)
        return done

    def save(
        self,
        done: int,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Write the state after `done` steps, atomically; the one before it is kept until the next."""
        state = {
            "done": done,
            "parameters": [parameter.detach().cpu() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        save_state(self.state, state)

    def log(self, step: int, losses: Mapping[str, float], seconds: float) -> None:
        """Add a row to `log.csv`: step, losses, seconds."""
        values = {name: f"{value:.6g}" for name, value in losses.items()}
        add_row(self.log_file, step, {**values, "seconds": f"{seconds:.3f}"})

    def lost(self, what: str) -> str:
        """The message for a run that cannot go on: what happened, what is kept, and what helps."""
        kept = (
            f"The last good state is kept in {there[0]}" if (there := states(self.state)) else "No state was saved yet"
        )
        return (
            f"{what[0].upper()}{what[1:]}: the run stopped. {kept}. A lower --learning_rate or --dtype float32 in a "
            "new --out may help; if the first step fails, the base's weights or the training data are damaged"
        )

    def finish(
        self, base: Base, words: Mapping[str, tuple[str, str]], settings: Any, token: Embedding | None = None
    ) -> None:
        """Write the token, if one was learned, the LoRA (see `save_lora` for `words`), and remove the state."""
        record = dataclasses.asdict(settings)
        if token is not None:
            save_embedding(self.path / TOKEN_FILE, token, {"prompt": settings.prompt, "base": base.name})
        if words:
            save_lora(self.lora, base.unet, words, base=base.name, fingerprints=base.fingerprints, settings=record)
        self._clean()

    def _check(self, settings: Any, present: Mapping[str, str]) -> None:
        if self.path.is_file():
            raise UserError(f"{self.path} is a file: give --out the name of a new folder")
        if not self._done():
            check_folder(self.path)
        if not self._is_run():
            names = {path.name for path in self.path.glob("*") if not path.name.startswith(UNFINISHED)}
            strangers = names - {"inputs.json"}
            if strangers:
                raise UserError(f"{self.path} is no run folder and holds {min(strangers)}: give --out a new name")
            return
        before, record = read_json(self.path / "settings.json"), read_json(self.path / "inputs.json")
        if not _is_record(before, record):
            raise UserError(f"{self.path} is no run folder: its settings.json or inputs.json is damaged")
        now, left_out = json.loads(json.dumps(dataclasses.asdict(settings))), record.get("left to the base", ())
        changed = [
            f"{key} ({before.get(key)} there, {'none given' if value is None else value} now)"
            for key, value in now.items()
            if key not in FREE
            and (key in before or value)  # a flag that a run of an older version did not have yet
            and (value != before.get(key) if value is not None else key not in left_out)
        ]
        recorded = record.get("contents", {})
        names = present.keys() | recorded.keys() - PARTS
        changed += [f"the contents of {name}" for name in sorted(names) if recorded.get(name) != present.get(name)]
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings: {', '.join(changed)}. Give --out a new name, or delete "
                "that folder if the run in it is not wanted any more"
            )

    def _done(self) -> bool:
        return all(file.is_file() for file in self.results)

    def _is_run(self) -> bool:
        return (self.path / "settings.json").is_file()

    def _clean(self) -> None:
        """Remove the states, and what a killed run left half written."""
        for file in states(self.state):
            with suppress(OSError):  # of a folder that was made read-only since
                file.unlink()
        remove_leftovers(self.path)


def _is_record(before: Any, record: Any) -> bool:
    """Whether the run's two tables are tables at all."""
    if not isinstance(before, dict) or not isinstance(record, dict):
        return False
    return isinstance(record.get("left to the base", []), list) and isinstance(record.get("contents", {}), dict)
