"""What an argument of `--lora` says: which file, which of its adapters, and how strongly, where and when."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model import UserError

LAYERS = 9
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
LIKE_STRENGTH = rf"(?i)\s*({NUMBER}|[-+]?(nan|inf))"  # how a text begins that can hardly be meant as part of a name
EXPECTED = "a number (:0.8), or one a layer (:2=0.5,6=1), and behind either a range of denoising if wanted (:0.8@0-0.6)"


@dataclass(frozen=True)
class LoRAArgument:
    """One LoRA as `--lora` names it: PATH, PATH:0.8, PATH:2=0.5,6=1, PATH:0.8@0-0.6, PATH#adapter:0.8.

    Args:
        text: all of it, for messages.
        path: a file or folder.
        adapter: the only one to take, of a file of ours; None takes all.
        strength: in all layers; where layers have their own, the strongest of them.
        layers: strengths by layer of the nine, the others being off; None: one strength for all.
        start: where in denoising it comes on: from 0, pure noise, ...
        stop: ... and where it goes off: up to 1, the end.
    """

    text: str
    path: str
    adapter: str | None = None
    strength: float = 1.0
    layers: Mapping[int, float] | None = None
    start: float = 0.0
    stop: float = 1.0

    @property
    def scale(self) -> float | Mapping[int, float]:
        """The strength while it is on, as `lora.switch_adapters` takes it."""
        return self.strength if self.layers is None else self.layers

    @property
    def scheduled(self) -> bool:
        """Whether it is off for a part of denoising."""
        return (self.start, self.stop) != (0.0, 1.0)

    def on(self, step: int, steps: int) -> bool:
        """Whether it is on in a step, counted from 0, of so many: where start <= step / steps < stop."""
        return self.start <= step / steps < self.stop


def parse_lora(argument: str) -> LoRAArgument:
    """Read an argument of `--lora`; where the whole is a path that exists, or all before a colon is one, it is meant.

    Raises:
        UserError: what stands behind a path's colon is no strength.
    """
    path, adapter = _split_adapter(argument)
    if Path(path).exists():
        return LoRAArgument(argument, path, adapter)
    head, _, text = argument.rpartition(":")
    named = re.split(r"[/\\]", text)[0]  # C:\loras, and no strength
    if not head or not named:
        return LoRAArgument(argument, path, adapter)
    path, its = _split_adapter(head)
    if not Path(path).exists() and not re.match(LIKE_STRENGTH, text):
        return LoRAArgument(argument, *_split_adapter(argument))

    def wrong(reason: str) -> UserError:
        return UserError(
            f"{argument} does not exist, and cannot be {head} with a strength: {reason}; expected is {EXPECTED}"
        )

    amount, at, span = text.partition("@")
    start, stop = _range(span, wrong) if at else (0.0, 1.0)
    if "=" not in amount:
        return LoRAArgument(argument, path, its, _number(amount, wrong), None, start, stop)
    layers = _layers(amount, wrong)
    return LoRAArgument(argument, path, its, max(layers.values(), key=abs), layers, start, stop)


def parse_constant(argument: str) -> LoRAArgument:
    """The same where a strength is one number: in weights that change once and for all, and in training.

    Raises:
        UserError: as `parse_lora`; a strength by layer, or one that changes with time.
    """
    its = parse_lora(argument)
    if its.scheduled:
        raise UserError(
            f"{argument}: here a LoRA is on all the way; a range of denoising (@{argument.rpartition('@')[2]}) is for "
            "`customttt generate` and `edit`: leave it away"
        )
    if its.layers is not None:
        raise UserError(
            f"{argument}: strengths by layer are for `customttt generate` and `edit`: give one for all (:0.8)"
        )
    return its


def split_strength(argument: str) -> tuple[str, float]:
    """ "runs/teddy:0.8" -> ("runs/teddy", 0.8), for where nothing but a path and one strength is taken.

    Raises:
        UserError: as `parse_constant`, or one adapter of a file.
    """
    its = parse_constant(argument)
    if its.adapter is not None and Path(its.path).exists():
        raise UserError(f"{argument}: a file is taken whole here: leave #{its.adapter} away")
    return (its.path if its.adapter is None else f"{its.path}#{its.adapter}"), its.strength


def _split_adapter(text: str) -> tuple[str, str | None]:
    path, _, adapter = text.rpartition("#")
    if not path or Path(text).exists() or not re.fullmatch(r"[^:/\\]+", adapter):
        return text, None
    return path, adapter


def _number(text: str, wrong: Callable[[str], UserError]) -> float:
    text = text.strip()
    if not re.fullmatch(NUMBER, text) or not math.isfinite(float(text)):
        raise wrong(f"{text!r} is not a finite number")
    return float(text)


def _layers(text: str, wrong: Callable[[str], UserError]) -> dict[int, float]:
    found: dict[int, float] = {}
    for part in text.split(","):
        index, equals, strength = part.partition("=")
        index = index.strip()
        if not equals or not re.fullmatch(r"\d", index, re.ASCII) or int(index) >= LAYERS:
            raise wrong(f"{part!r} names none of the layers 0 to {LAYERS - 1}")
        if int(index) in found:
            raise wrong(f"layer {index} is there twice")
        found[int(index)] = _number(strength, wrong)
    return found


def _range(text: str, wrong: Callable[[str], UserError]) -> tuple[float, float]:
    ends = re.fullmatch(rf"\s*({NUMBER})\s*-\s*({NUMBER})\s*", text)
    if not ends:
        raise wrong(f"{text!r} is not a range such as 0-0.6")
    start, stop = float(ends[1]), float(ends[2])
    if not (0 <= start <= 1 and 0 <= stop <= 1):
        raise wrong(f"the range {text} leaves 0 (pure noise) to 1 (the end)")
    if start >= stop:
        raise wrong(f"the range {text} is {'empty' if start == stop else 'reversed'}")
    return start, stop
