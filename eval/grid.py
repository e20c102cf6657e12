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
from eval.grid_settings import STAGES, GridSettings, Motion, Subject, check_grid, entry_of, parts_of, slug_of
from eval.reading import check_readable
from eval.stages import BUILT_ON, PERFORMER, Stage, known_stages, loras_of, with_absorber
from model import UserError
from sampling import derived_seed, write_media
from sampling.generate import GenerateSettings
from train.world import caption, render
from weights import Base, BaseSettings, settings_from

SIZES = ("num_frames", "height", "width")  # scores compare arms: all clips are of the base's own size


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
        images: folder of the subject's photos; None: the group has no subject.
        reference: the motion's clip.
        frames: which of its frames are taken.
    """

    arm: str
    group: str
    prompt: int
    seed: int
    stages: Mapping[str, Any]
    clips: GenerateSettings
    images: Path | None
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
            who, what = parts_of(group)
            subject, motion = None if who is None else subjects[who], motions[what]
            images = None if subject is None else _photos(settings, subject, seed, base)
            reference, motion = _reference(settings, motion, seed, base)
            for number, template in enumerate(settings.prompts):
                named = template.replace("{subject}", "" if subject is None else subject.name)
                prompt = named.replace("{motion}", motion.name)
                known = known_stages(group, subject, images, motion, reference, prompt, seed)
                for arm in settings.arms:
                    stages = dict(_stages(settings, arm, known, motion, seed, base))
                    clips = _clips(settings, arm, f"{group}-p{number}-s{seed}", prompt, seed, stages, base)
                    found.append(Cell(arm, group, number, seed, stages, clips, images, reference, motion.frames))
    for cell in {cell.arm: cell for cell in found}.values():
        try:
            check_stages(cell.stages, cell.clips, base)
        except UserError as error:
            raise UserError(f"arms: {cell.arm}: {error}") from error
    return found


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


def _reference(settings: GridSettings, motion: Motion, seed: int, base: Base) -> tuple[Path, Motion]:
    """The clip, and the motion with the words of who performs it there."""
    if motion.video is not None:
        return Path(motion.video), motion
    check_readable(base)
    assert motion.rendered is not None
    frames = base.recipe.num_frames
    scene = reference(motion.rendered, seed, frames)
    folder = Path(settings.out) / "inputs" / f"clip-{motion.rendered}-s{seed}-{frames}f"
    if not folder.exists():
        write_media(folder, render(scene)[0][0].transpose(0, 1))  # a folder of frames: nothing is lost in it
    performer = caption(scene, 0, motion=False, background=False)
    prompt, looks = (text.replace(PERFORMER, performer) for text in (motion.prompt, motion.looks or PERFORMER))
    return folder, dataclasses.replace(motion, prompt=prompt, looks=looks)


def _stages(
    settings: GridSettings, arm: str, known: Mapping[str, Stage], motion: Motion, seed: int, base: Base
) -> Iterator[tuple[str, Any]]:
    """Settings of the stages that an arm has. A run's folder is named by all that it depends on."""
    tables = settings.arms[arm]
    if "absorber" in tables:
        try:
            known = with_absorber(known, motion.looks, tables["absorber"])
        except UserError as error:
            raise UserError(f"arms: {arm}: {error}") from error
    shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(BaseSettings)}
    outs: dict[str, str] = {}
    for stage in STAGES:
        if stage not in tables:
            continue
        its, runs = known[stage], {name: outs[name] for name in BUILT_ON.get(stage, ()) if name in outs}
        built_on = {"absorbers": list(runs.values())} if "absorber" in runs else runs
        _refuse(arm, stage, tables[stage], {"out", "seed", *its.fixed, *built_on, *shared, *SIZES})
        words = {flag: value for flag, value in its.fixed.items() if flag not in ("images", "video")}
        told = [words, its.contents, [Path(run).name for run in runs.values()], tables[stage], settings.dtype]
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
    loras = loras_of(stages)
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
