"""The flags that every stage of training shares, and their defaults from the base."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from model import UserError
from train.loop import LoopSettings
from weights import Base, BaseSettings


@dataclass(kw_only=True)
class TrainSettings(BaseSettings):
    """A run of training.

    Args:
        prompt: what the training material shows, plainly.
        out: folder of the run: LoRA, settings, log, previews. The same command again goes on where it was stopped.
        height: pixels, divisible by 8; not given: the base's (256).
        width: pixels, divisible by 8; not given: the base's (256).
        num_frames: frames of a clip; not given: the base's (16).
        steps: training steps; not given: the base's (500; test-time training 30).
        learning_rate: of Lion; not given: the base's (appearance 1e-5, motion 5e-5, test-time training 1e-6).
        weight_decay: of Lion; not given: the base's (0.1).
        dropout: on the LoRAs' input while training; not given: the base's (0.1).
        timestep_skew: timesteps are 1000 u ** skew, u even in [0, 1): below 1 they favour noise, where colours and
            ways are decided; not given: the base's (1).
        seed: of everything random in the run.
        save_every: steps between states on disk, from which a killed run goes on.
        preview_every: steps between previews; 0 is none.
        preview_prompt: prompt of the previews; not given: the run's own.
        gradient_checkpointing: less memory for about a third more time.
    """

    prompt: str
    out: str
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    dropout: float | None = None
    timestep_skew: float | None = None
    seed: int = 0
    save_every: int = 50
    preview_every: int = 0
    preview_prompt: str | None = None
    gradient_checkpointing: bool = False

    def loop(self) -> LoopSettings:
        """What the loop needs of these, once they are filled in.

        Raises:
            UserError: a number out of its range.
        """
        if self.steps is None or self.learning_rate is None or self.weight_decay is None:
            raise UserError("steps, learning_rate and weight_decay must be filled in before training")
        if self.steps < 1 or not 0 < self.learning_rate <= 1 or not 0 <= self.weight_decay <= 1e3:
            raise UserError(
                "steps must be at least 1, learning_rate above 0 and at most 1, weight_decay from 0 to 1000: got "
                f"{self.steps}, {self.learning_rate} and {self.weight_decay}"
            )
        if self.timestep_skew is None or not 0 < self.timestep_skew <= 10:
            raise UserError(f"timestep_skew must be above 0 and at most 10, and is {self.timestep_skew}")
        if not 0 <= self.seed < 2**32 or (self.num_frames is not None and self.num_frames < 1):
            raise UserError(
                f"seed must be from 0 to {2**32 - 1} and num_frames at least 1: got {self.seed} and {self.num_frames}"
            )
        if self.save_every < 1 or self.preview_every < 0:
            raise UserError("save_every must be at least 1, and preview_every at least 0")
        return LoopSettings(
            self.steps, self.learning_rate, self.weight_decay, self.seed, self.save_every, self.preview_every
        )


@dataclass(kw_only=True)
class FreshSettings(TrainSettings):
    """A run that trains fresh LoRAs.

    Args:
        rank: of a LoRA; not given: the base's (32).
        batch_size: pictures, or noisy copies of the clip, in a step; not given: the base's (1).
    """

    rank: int | None = None
    batch_size: int | None = None

    def loop(self) -> LoopSettings:
        """As of every stage; raises UserError for a batch size out of its range too."""
        if self.batch_size is None or self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, and is {self.batch_size}")
        return super().loop()


@dataclass(kw_only=True)
class ClipSettings(FreshSettings):
    """A run that trains fresh LoRAs on a clip.

    Args:
        video: any video, or a folder of frames.
        fps: take frames at this rate; not given: every frame_step-th frame.
        frame_step: take every n-th frame.
        start: seconds into the video.
    """

    video: str
    fps: float | None = None
    frame_step: int = 1
    start: float = 0.0


@dataclass(kw_only=True)
class AdapterSettings(FreshSettings):
    """A run that trains one fresh LoRA.

    Args:
        layers: layers of the nine that are trained; not given: the base's (appearance 2 6, motion 2 5).
        targets: its linear layers: attention and feed-forward (blocks), attention alone, or all with the projections.
    """

    layers: list[int] | None = None
    targets: Literal["blocks", "attention", "all"] = "blocks"


def filled(settings: TrainSettings, base: Base, **defaults: Any) -> Any:
    """The settings with the base's own number, or the stage's (`defaults`), in place of every None that has one.

    What the base was loaded from is written down as well. Typed Any, since the numbers that may be None in what a
    person gives are none any more.
    """
    shared = (
        *("height", "width", "num_frames", "weight_decay", "dropout", "rank", "timestep_skew"),
        *("guidance_scale", "reference_steps"),
    )
    defaults |= {name: getattr(base.recipe, name) for name in shared if hasattr(settings, name)}
    missing = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    loaded: dict[str, Any] = {**base.source, "dtype": str(base.dtype).removeprefix("torch.")}
    return dataclasses.replace(settings, **missing, **loaded)
