"""A demonstration's own notes: whose folder this is, and how long each step took."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eval.demo_plan import DemoSettings
from model import Recipe, UserError
from weights import read_json, settings_from, write_json
from weights.folders import UNFINISHED

RECORD = "demo.json"
# A demo may be run again with other values of these: they change no result, or the steps themselves look at them.
FREE = {"out", "device", "clips", "gradient_checkpointing", "appearance", "motion", "ttt", "generate"}
STEPS = {
    "inputs": "photos of a subject and a clip of a motion",
    "appearance": "stage 1: the subject's looks, from the photos",
    "motion": "stage 2: the motion, from the clip",
    "ttt": "stage 3: test-time training of both together",
    "generate": "clips of the base alone, with both LoRAs, and after test-time training",
    "page": "scores, contact sheet and page",
}


class Record:
    """`demo.json`: whose folder this is, the base's recipe, and the seconds that each step took so far.

    Args:
        settings: of the demo; its `out` may be a new or an empty folder, or that of this very demo.

    Raises:
        UserError: the folder holds something else, or the record in it is damaged.
    """

    def __init__(self, settings: DemoSettings) -> None:
        self.path = Path(settings.out) / RECORD
        self.settings = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}
        self.recipe: Recipe | None = None
        self.seconds: dict[str, float] = {}
        if self.path.is_file():
            self._take_up(read_json(self.path))
        else:
            names = {path.name for path in self.path.parent.glob("*") if not path.name.startswith(UNFINISHED)}
            if names:
                raise UserError(f"{settings.out} is no demo's folder and holds {min(names)}: give --out a new name")

    def begin(self, recipe: Recipe) -> None:
        """Make the folder that of a demo on a base with this recipe."""
        self.recipe = recipe
        self._write()

    def headline(self, name: str, done: bool = False) -> str:
        """What is said when a step begins."""
        return f"\n[{list(STEPS).index(name) + 1}/{len(STEPS)}] {STEPS[name]}{' (was done)' if done else ''}"

    @contextmanager
    def step(self, name: str, done: bool) -> Iterator[bool]:
        """Announce a step and give whether it is still to be done; its seconds count even where it is broken off."""
        print(self.headline(name, done), flush=True)
        start = time.monotonic()
        try:
            yield not done
        finally:
            if not done:
                self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)
                self._write()

    def _take_up(self, kept: Any) -> None:
        names = ("settings", "recipe", "seconds")
        if not isinstance(kept, dict) or not all(isinstance(kept.get(name), dict) for name in names):
            raise UserError(f"{self.path} is no demo's record: give --out a new name")
        before, recipe, self.seconds = (kept[name] for name in names)
        changed = [f"{k} ({before.get(k)} there, {v} now)" for k, v in self.settings.items() if before.get(k) != v]
        if changed:
            raise UserError(
                f"{self.path.parent} holds a demo with other settings: {', '.join(changed)}. Give --out a new name, or "
                "delete that folder"
            )
        self.recipe = settings_from(Recipe, recipe, str(self.path))

    def _write(self) -> None:
        recipe = dataclasses.asdict(self.recipe or Recipe())
        write_json(self.path, {"settings": self.settings, "recipe": recipe, "seconds": self.seconds})
