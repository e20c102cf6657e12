"""What a grid of ablations holds: subjects, motions, prompts, seeds and arms, and the runs that its cells need.

A cell is one arm of one group (a subject and a motion) with one prompt and one seed. Cells share the runs of stages 1
and 2 wherever those have the same settings: a run's folder is named by what it depends on.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.custom import reference
from eval.demo_inputs import photos
from eval.reading import check_readable
from model import UserError
from sampling import derived_seed, write_media
from sampling.generate import GenerateSettings
from train.appearance import AppearanceSettings
from train.data import clip_files, subject_files
from train.motion import MotionSettings
from train.ttt import TTTSettings
from train.world import HELD_OUT_MOTIONS, HELD_OUT_SUBJECTS, caption, render
from weights import Base, BaseSettings, settings_from

STAGES = ("appearance", "motion", "ttt")
PERFORMER = "{performer}"  # in the prompt of a rendered motion: who was drawn to perform it


@dataclass(kw_only=True)
class Subject:
    """Who is to move.

    Args:
        name: in the prompts ("a teddy bear").
        images: folder of photos.
        rendered: instead of photos, one of the rendered world's held-out subjects, from 0 to 4: its photos are drawn
            with each seed.
        prompt: what the photos show; not given: the name.
        trigger: word that the LoRA gives a meaning, if any.
    """

    name: str
    images: str | None = None
    rendered: int | None = None
    prompt: str | None = None
    trigger: str = ""


@dataclass(kw_only=True)
class Motion:
    """What it is to do.

    Args:
        name: in the prompts ("playing guitar").
        prompt: what the video shows ("a man is playing guitar"); of a rendered one, {performer} stands for the subject
            that was drawn to perform it.
        video: file of the reference clip.
        rendered: instead of a file, one of the rendered world's held-out motions, from 0 to 4, drawn with each seed.
    """

    name: str
    prompt: str
    video: str | None = None
    rendered: int | None = None


@dataclass(kw_only=True)
class GridSettings(BaseSettings):
    """A grid: every arm for every group, prompt and seed.

    Args:
        out: folder for runs, clips, scores, table and report. The same command again goes on where it was stopped.
        subjects: in the file, a table by short name: name, images or rendered, prompt, trigger.
        motions: in the file, a table by short name: name, prompt, video or rendered.
        groups: pairs of a subject and a motion, by short names (house+patrolling).
        prompts: what is generated; {subject} and {motion} stand for their names.
        seeds: of training and sampling; rendered photos and clips are drawn anew with each.
        arms: in the file, by title, tables of flags of the stages that an arm has: appearance, motion, ttt (an empty
            one: the base's own settings), and generate.
        compare: differences to report, "one arm - another".
        clips: of each cell, from different noise.
        scores: in the file, a table of the scorers' flags of `customttt score`: clip, tracker, lpips, ...
        paper: in the file, by arm, what the paper prints for it: a table of clip_t, clip_i, temporal_consistency,
            motion_fidelity.
    """

    out: str
    subjects: dict[str, Any]
    motions: dict[str, Any]
    groups: list[str]
    prompts: list[str]
    seeds: list[int]
    arms: dict[str, Any]
    compare: list[str] = field(default_factory=list)
    clips: int = 1
    scores: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)


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
    """

    arm: str
    group: str
    prompt: int
    seed: int
    stages: Mapping[str, Any]
    clips: GenerateSettings
    images: Path
    reference: Path


def cells(settings: GridSettings, base: Base) -> list[Cell]:
    """All cells, arms innermost, so that the first results compare arms; rendered inputs are drawn where missing.

    Raises:
        UserError: names that no table has, bad tables, or inputs that are not there.
    """
    subjects = {name: _entry(Subject, table, f"subjects: {name}") for name, table in settings.subjects.items()}
    motions = {name: _entry(Motion, table, f"motions: {name}") for name, table in settings.motions.items()}
    _check(settings, subjects, motions)
    found = []
    for seed in settings.seeds:
        for group in settings.groups:
            who, what = group.split("+")
            images = _photos(settings, who, subjects[who], seed, base)
            reference, shown = _reference(settings, what, motions[what], seed, base)
            for number, template in enumerate(settings.prompts):
                prompt = template.format(subject=subjects[who].name, motion=motions[what].name)
                for arm in settings.arms:
                    inputs = {"images": str(images), "video": str(reference), "shown": shown}
                    stages = dict(_stages(settings, arm, (who, subjects[who]), what, inputs, prompt, seed))
                    clips = _clips(settings, arm, f"{group}-p{number}-s{seed}", prompt, seed, stages)
                    found.append(Cell(arm, group, number, seed, stages, clips, images, reference))
    return found


def _entry(cls: type, table: Any, where: str) -> Any:
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: a table was expected, not {table!r}")
    entry: Any = settings_from(cls, table, where)
    given = entry.images if cls is Subject else entry.video
    if (given is None) == (entry.rendered is None):
        raise UserError(f"{where}: give {'images' if cls is Subject else 'video'} or rendered, one of them")
    names = HELD_OUT_SUBJECTS if cls is Subject else HELD_OUT_MOTIONS
    if entry.rendered is not None and not 0 <= entry.rendered < len(names):
        raise UserError(f"{where}: rendered must be from 0 to {len(names) - 1}, and is {entry.rendered}")
    return entry


def _check(settings: GridSettings, subjects: Mapping[str, Subject], motions: Mapping[str, Motion]) -> None:
    if not settings.groups or not settings.prompts or not settings.seeds or not settings.arms or settings.clips < 1:
        raise UserError("a grid needs groups, prompts, seeds and arms, and at least one clip a cell")
    for name in ("groups", "prompts", "seeds"):
        if len(set(getattr(settings, name))) < len(getattr(settings, name)):
            raise UserError(f"{name}: one is given twice")
    for group in settings.groups:
        who, plus, what = group.partition("+")
        if not plus or who not in subjects or what not in motions:
            raise UserError(
                f"groups: {group} is not SUBJECT+MOTION of the subjects {', '.join(subjects)} and the motions "
                f"{', '.join(motions)}"
            )
    for prompt in settings.prompts:
        try:
            prompt.format(subject="", motion="")
        except (KeyError, IndexError, ValueError) as error:
            raise UserError(
                f"prompts: {prompt!r} may hold {{subject}} and {{motion}}, and nothing else in braces"
            ) from (error)
    for arm, tables in settings.arms.items():
        if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
            raise UserError(f"arms: {arm}: tables of {', '.join(STAGES)}, generate were expected, not {tables!r}")
        unknown = set(tables) - {*STAGES, "generate"}
        if unknown or ("ttt" in tables and not {"appearance", "motion"} <= set(tables)):
            what = f"{min(unknown)} is no stage" if unknown else "ttt needs appearance and motion"
            raise UserError(f"arms: {arm}: {what}; the stages are {', '.join(STAGES)}, and generate")
    slugs = {_slug(arm) for arm in settings.arms}
    if len(slugs) < len(settings.arms):
        raise UserError("arms: two titles differ in signs alone: their folders would be the same")
    if unknown := set(settings.paper) - set(settings.arms):
        raise UserError(f"paper: {min(unknown)} is no arm; arms are {', '.join(settings.arms)}")
    for line in settings.compare:
        if any(arm not in settings.arms for arm in line.split(" - ")) or line.count(" - ") != 1:
            raise UserError(
                f"compare: {line!r} is not of the form ONE ARM - ANOTHER; arms are {', '.join(settings.arms)}"
            )


def _photos(settings: GridSettings, name: str, subject: Subject, seed: int, base: Base) -> Path:
    if subject.images is not None:
        subject_files(subject.images)
        return Path(subject.images)
    check_readable(base)
    folder = Path(settings.out) / "inputs" / f"photos-{name}-s{seed}"
    if not folder.exists():
        assert subject.rendered is not None
        write_media(folder, photos(subject.rendered, base.recipe.height, seed)[0])
    return folder


def _reference(settings: GridSettings, name: str, motion: Motion, seed: int, base: Base) -> tuple[Path, str]:
    """The clip, and what it shows."""
    if motion.video is not None:
        clip_files(motion.video)
        return Path(motion.video), motion.prompt
    check_readable(base)
    assert motion.rendered is not None
    scene = reference(motion.rendered, seed, base.recipe.num_frames)
    folder = Path(settings.out) / "inputs" / f"clip-{name}-s{seed}"
    if not folder.exists():
        write_media(folder, render(scene)[0][0].transpose(0, 1))  # a folder of frames: nothing is lost in it
    return folder, motion.prompt.replace(PERFORMER, caption(scene, 0, motion=False, background=False))


def _stages(
    settings: GridSettings,
    arm: str,
    who: tuple[str, Subject],
    what: str,
    inputs: Mapping[str, str],
    prompt: str,
    seed: int,
) -> Iterator[tuple[str, Any]]:
    """Settings of the stages that an arm has. Runs of equal settings get the same folder."""
    tables, runs = settings.arms[arm], Path(settings.out) / "runs"
    shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(BaseSettings)}
    name, subject = who
    outs: dict[str, str] = {}
    fixed: dict[str, tuple[type, str, dict[str, Any]]] = {
        "appearance": (
            AppearanceSettings,
            f"appearance-{name}",
            {"images": inputs["images"], "prompt": subject.prompt or subject.name, "trigger": subject.trigger},
        ),
        "motion": (MotionSettings, f"motion-{what}", {"video": inputs["video"], "prompt": inputs["shown"]}),
        "ttt": (TTTSettings, f"ttt-{name}+{what}", {"prompt": prompt}),
    }
    for stage in STAGES:
        if stage not in tables:
            continue
        cls, label, known = fixed[stage]
        taken = {"out", "seed", *known, *shared, *(("appearance", "motion") if stage == "ttt" else ())} & set(
            tables[stage]
        )
        if taken:
            raise UserError(f"arms: {arm}: {stage}: {min(taken)} is what the grid decides")
        built_on = outs if stage == "ttt" else {}
        told = [known["prompt"], *(Path(run).name for run in built_on.values()), tables[stage]]
        told += [value for flag, value in shared.items() if flag != "device"]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        out = str(runs / f"{label}-s{seed}-{digest}")
        table = {**shared, **known, **built_on, "seed": seed, **tables[stage], "out": out}
        yield stage, settings_from(cls, table, f"arms: {arm}: {stage}")
        outs[stage] = out


def _clips(
    settings: GridSettings, arm: str, name: str, prompt: str, seed: int, stages: Mapping[str, Any]
) -> GenerateSettings:
    """Clips start from the same noise in all arms."""
    shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(BaseSettings)}
    loras = [stages["ttt"].out] if "ttt" in stages else [its.out for its in stages.values()]
    known = {
        "prompt": [prompt],
        "seed": [derived_seed(seed, "cell", name, i) for i in range(settings.clips)],
        "lora": loras,
        "out": str(Path(settings.out) / "cells" / _slug(arm) / name / "clip.mp4"),
    }
    table = settings.arms[arm].get("generate", {})
    if taken := (known.keys() | shared.keys()) & set(table):
        raise UserError(f"arms: {arm}: generate: {min(taken)} is what the grid decides")
    return settings_from(GenerateSettings, {**shared, **table, **known}, f"arms: {arm}: generate")


def _slug(title: str) -> str:
    """A folder's name for a title of any signs."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "arm"
