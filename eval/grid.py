"""What a grid of ablations holds: subjects, motions, prompts, seeds and arms, and the runs that its cells need.

A cell is one arm of one group (a subject and a motion) with one prompt and one seed. Cells share the runs of stages 1
and 2 wherever those have the same settings: a run's folder is named by what it depends on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.checks import check_stages
from eval.custom import reference
from eval.demo_inputs import photos
from eval.grid_settings import STAGES, GridSettings, Motion, Subject, check_grid, entry_of, slug_of
from eval.reading import check_readable
from model import UserError
from sampling import derived_seed, write_media
from sampling.generate import GenerateSettings
from train.appearance import AppearanceSettings
from train.data import clip_files, subject_files
from train.joint import JointSettings
from train.motion import MotionSettings
from train.ttt import TTTSettings
from train.world import caption, render
from weights import Base, BaseSettings, settings_from, sha256

SIZES = ("num_frames", "height", "width")  # scores compare arms: all clips are of the base's own size
PERFORMER = "{performer}"  # in the prompt of a rendered motion: who was drawn to perform it


@dataclass(frozen=True)
class Cell:
    """One arm of one group with one prompt and one seed, and all that it takes.

    Args:
        arm: title.
        group: as in the settings, "house+patrolling".
        prompt: number, from 0.
        seed: of training, and of the noise of its clips.
        stages: settings of the runs it needs, by stage, in their order.
        clips: settings of its clips.
        images: folder of the subject's photos.
        reference: the motion's clip.
        frames: which of its frames are taken.
    """

    arm: str
    group: str
    prompt: int
    seed: int
    stages: Mapping[str, Any]
    clips: GenerateSettings
    images: Path
    reference: Path
    frames: Mapping[str, Any]


def cells(settings: GridSettings, base: Base) -> list[Cell]:
    """All cells, arms innermost, so that the first results compare arms; rendered inputs are drawn where missing.

    Raises:
        UserError: names that no table has, bad tables, numbers out of their range, or inputs that are not there.
    """
    check_grid(settings)
    subjects = {name: entry_of(Subject, table, f"subjects: {name}") for name, table in settings.subjects.items()}
    motions = {name: entry_of(Motion, table, f"motions: {name}") for name, table in settings.motions.items()}
    found = []
    for seed in settings.seeds:
        for group in settings.groups:
            who, what = group.split("+")
            subject, motion = subjects[who], motions[what]
            images = _photos(settings, subject, seed, base)
            reference, shown = _reference(settings, motion, seed, base)
            seen = {file.name: sha256(file) for file in subject_files(images).values()}
            filmed = {file.name: sha256(file) for file in clip_files(reference).values()}
            for number, template in enumerate(settings.prompts):
                prompt = template.replace("{subject}", subject.name).replace("{motion}", motion.name)
                pictured = {"images": str(images), "trigger": subject.trigger}
                words = subject.prompt or subject.name
                moving = {"video": str(reference), "prompt": shown, **motion.frames}
                known: dict[str, Stage] = {
                    "appearance": Stage(
                        AppearanceSettings, f"appearance-{who}-s{seed}", {**pictured, "prompt": words}, seen
                    ),
                    "motion": Stage(MotionSettings, f"motion-{what}-s{seed}", moving, filmed),
                    "ttt": Stage(TTTSettings, f"ttt-{group}-s{seed}", {"prompt": prompt}, {}),
                    "joint": Stage(
                        JointSettings,
                        f"joint-{group}-s{seed}",
                        {**pictured, "appearance_prompt": words, **moving},
                        {"images": seen, "video": filmed},
                    ),
                }
                for arm in settings.arms:
                    stages = dict(_stages(settings, arm, known, seed, base))
                    clips = _clips(settings, arm, f"{group}-p{number}-s{seed}", prompt, seed, stages, base)
                    found.append(Cell(arm, group, number, seed, stages, clips, images, reference, motion.frames))
    for cell in {cell.arm: cell for cell in found}.values():
        try:
            check_stages(cell.stages, cell.clips, base)
        except UserError as error:
            raise UserError(f"arms: {cell.arm}: {error}") from error
    return found


@dataclass(frozen=True)
class Stage:
    """What the grid itself decides of a stage.

    Args:
        settings: its class.
        label: how its run's folder begins.
        fixed: flags.
        contents: SHA-256 of what it trains on, by file name (of joint, by flag and file name).
    """

    settings: type
    label: str
    fixed: Mapping[str, Any]
    contents: Mapping[str, Any]


def _photos(settings: GridSettings, subject: Subject, seed: int, base: Base) -> Path:
    if subject.images is not None:
        return Path(subject.images)
    check_readable(base)
    side = base.recipe.height
    folder = Path(settings.out) / "inputs" / f"photos-{subject.rendered}-s{seed}-{side}px"
    if not folder.exists():
        assert subject.rendered is not None
        write_media(folder, photos(subject.rendered, side, seed)[0])
    return folder


def _reference(settings: GridSettings, motion: Motion, seed: int, base: Base) -> tuple[Path, str]:
    """The clip, and what it shows."""
    if motion.video is not None:
        return Path(motion.video), motion.prompt
    check_readable(base)
    assert motion.rendered is not None
    frames = base.recipe.num_frames
    scene = reference(motion.rendered, seed, frames)
    folder = Path(settings.out) / "inputs" / f"clip-{motion.rendered}-s{seed}-{frames}f"
    if not folder.exists():
        write_media(folder, render(scene)[0][0].transpose(0, 1))  # a folder of frames: nothing is lost in it
    return folder, motion.prompt.replace(PERFORMER, caption(scene, 0, motion=False, background=False))


def _stages(
    settings: GridSettings, arm: str, known: Mapping[str, Stage], seed: int, base: Base
) -> Iterator[tuple[str, Any]]:
    """Settings of the stages that an arm has. A run's folder is named by all that it depends on."""
    tables = settings.arms[arm]
    shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(BaseSettings)}
    outs: dict[str, str] = {}
    for stage in STAGES:
        if stage not in tables:
            continue
        its, built_on = known[stage], dict(outs) if stage == "ttt" else {}
        _refuse(arm, stage, tables[stage], {"out", "seed", *its.fixed, *built_on, *shared, *SIZES})
        words = {flag: value for flag, value in its.fixed.items() if flag not in ("images", "video")}
        told = [words, its.contents, [Path(run).name for run in built_on.values()], tables[stage], settings.dtype]
        out = str(Path(settings.out) / "runs" / f"{its.label}-{_digest(told, base)}")
        table = {**shared, **its.fixed, **built_on, "seed": seed, **tables[stage], "out": out}
        yield stage, settings_from(its.settings, table, f"arms: {arm}: {stage}")
        outs[stage] = out


def _clips(
    settings: GridSettings,
    arm: str,
    name: str,
    prompt: str,
    seed: int,
    stages: Mapping[str, Any],
    base: Base,
) -> GenerateSettings:
    """Clips start from the same noise in all arms."""
    shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(BaseSettings)}
    loras = [stages["ttt"].out] if "ttt" in stages else [its.out for its in stages.values()]
    table = settings.arms[arm].get("generate", {})
    known = {
        "prompt": [prompt],
        "seed": [derived_seed(seed, "cell", name, i) for i in range(settings.clips)],
        "lora": loras,
    }
    _refuse(arm, "generate", table, {"out", *known, *shared, *SIZES})
    digest = _digest([prompt, [Path(run).name for run in loras], table, settings.dtype], base)
    out = Path(settings.out) / "cells" / slug_of(arm) / f"{name}-{digest}" / "clip.mp4"
    return settings_from(GenerateSettings, {**shared, **table, **known, "out": str(out)}, f"arms: {arm}: generate")


def _refuse(arm: str, stage: str, table: Mapping[Any, Any], taken: set[str]) -> None:
    if decided := sorted(taken & set(table)):
        raise UserError(f"arms: {arm}: {stage}: {decided[0]} is what the grid decides, alike for all arms")


def _digest(told: Any, base: Base) -> str:
    """Of all that a run or a clip depends on: with something else it gets another folder, and nothing stale is used."""
    return hashlib.sha256(json.dumps([told, base.fingerprints], sort_keys=True).encode()).hexdigest()[:8]
