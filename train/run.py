"""All four steps from one file: `python -m train.run --config teddy.yaml`; steps already done are skipped."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from model import UserError
from sampling.generate import GenerateSettings, clip_files, generate_files, numbered
from sampling.origins import batches, origins
from train.appearance import AppearanceSettings, train_appearance
from train.data import clip_files as clip_files_of
from train.data import subject_files
from train.motion import MotionSettings, read_frames, train_motion
from train.settings import TrainSettings
from train.ttt import TTTSettings, train_ttt
from weights import (
    Base,
    BaseSettings,
    find_record,
    open_base,
    parse_lora,
    parse_settings,
    record_file,
    run_command,
    settings_from,
)
from weights.folders import locked
from weights.lora import FILE_NAME

Settings = TypeVar("Settings", bound=BaseSettings)


@dataclass(kw_only=True)
class RunSettings(BaseSettings):
    """All stages, and the clip.

    Args:
        out: folder for everything: appearance/, motion/, ttt/ and video.mp4.
        height: pixels, divisible by 8; not given: the base's (256).
        width: pixels, divisible by 8; not given: the base's (256).
        num_frames: frames of a clip; not given: the base's (16).
        gradient_checkpointing: less memory for about a third more time.
        appearance: in the file, a table of stage 1's settings: images, prompt, ...
        motion: in the file, a table of stage 2's settings: video, prompt, ...
        ttt: in the file, a table of stage 3's settings: prompt, ...
        generate: in the file, a table of the sampler's settings: seed, ...; its prompt is stage 3's unless given.
    """

    out: str
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    gradient_checkpointing: bool = False
    appearance: dict[str, Any] = field(default_factory=dict)
    motion: dict[str, Any] = field(default_factory=dict)
    ttt: dict[str, Any] = field(default_factory=dict)
    generate: dict[str, Any] = field(default_factory=dict)


def run(settings: RunSettings) -> list[Path]:
    """Train the appearance LoRA, the motion LoRA and both together, then generate; skip what is done.

    Args:
        settings: of all steps.

    Returns:
        The clips.

    Raises:
        UserError: bad settings or files in any step; all settings are read before the first step begins.
    """
    out = Path(settings.out)
    looks = section(AppearanceSettings, settings, "appearance", out=str(out / "appearance"))
    moves = section(MotionSettings, settings, "motion", out=str(out / "motion"))
    both = section(TTTSettings, settings, "ttt", out=str(out / "ttt"), appearance=looks.out, motion=moves.out)
    clip = section(
        GenerateSettings, settings, "generate", out=str(out / "video.mp4"), lora=[both.out], prompt=[both.prompt]
    )
    elsewhere = [lora for lora in clip.lora if parse_lora(lora).path not in (looks.out, moves.out, both.out)]
    clips = [file for _, _, file in clip_files(dataclasses.replace(clip, lora=elsewhere))]
    subject_files(looks.images)
    clip_files_of(moves.video)
    base: Base | None = None

    def base_for(needed: bool) -> Base | None:
        nonlocal base
        if needed and base is None:
            base = open_base(settings)
            read_frames(moves, base)  # a clip that is too short is said before the first stage, not after it
        return base

    stages: list[tuple[Callable[..., Path], TrainSettings]] = [
        (train_appearance, looks),
        (train_motion, moves),
        (train_ttt, both),
    ]
    with locked(out):
        for train, its in stages:
            done = (Path(its.out) / FILE_NAME).is_file()
            lora = train(its, base_for(not done))
            print(f"{lora}{' (was done)' if done else ''}")
        if not up_to_date(clip):
            generate_files(clip, base_for(True))
        else:
            print("\n".join(f"{clip} (was done)" for clip in clips))
    return clips


def section(cls: type[Settings], settings: RunSettings, name: str, **defaults: Any) -> Settings:
    """A step's settings: its own table over the defaults, and what all steps share.

    Raises:
        UserError: a key that the step does not know, or that belongs to all steps, or an `out` outside the run folder:
            files of settings come from strangers.
    """
    table: Mapping[str, Any] = getattr(settings, name)
    shared = {f.name for f in dataclasses.fields(BaseSettings)}
    misplaced = sorted(shared & set(table))
    if misplaced:
        raise UserError(
            f"{name}: {', '.join(misplaced)} must be the same for all steps: move it to the top of the file"
        )
    home, given = Path(settings.out), table.get("out")
    if isinstance(given, str) and not Path(given).resolve().is_relative_to(home.resolve()):
        raise UserError(f"{name}: out: {given} is not inside {home}, where all that this file makes belongs")
    known = {f.name for f in dataclasses.fields(cls)}
    sizes = {"height", "width", "num_frames", "gradient_checkpointing"} & known
    common = {key: getattr(settings, key) for key in shared | sizes}
    return settings_from(cls, {**common, **defaults, **table}, where=name)


def up_to_date(settings: GenerateSettings) -> bool:
    """Whether the clips are there, and their records tell of these settings and of the LoRAs as they are now.

    Raises:
        UserError: a LoRA that is not there.
    """
    clips = numbered(settings.prompt, settings.seed, settings.out)
    return all(is_from(file, origin) for file, origin in origins(settings, batches(clips, settings.batch_size)).items())


def is_from(clip: Path, origin: Mapping[str, Any]) -> bool:
    """Whether the clip is there and was made so, by the record in it and by the one beside it."""
    try:
        records = [find_record(clip), find_record(record_file(clip))] if clip.exists() else [None]
    except UserError:  # a damaged record tells nothing
        return False
    return all(
        record is not None and all(getattr(record, name) == value for name, value in origin.items())
        for record in records
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt run`."""
    about = "Train both LoRAs, train them together, and generate: all from one file. What is done is skipped."
    run(parse_settings(RunSettings, argv, prog="customttt run", description=about))


if __name__ == "__main__":
    run_command(main)
