"""What a grid of ablations may hold, and what is wrong with one."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model import UserError
from train.world import HELD_OUT_MOTIONS, HELD_OUT_SUBJECTS
from weights import BaseSettings, settings_from

STAGES = ("absorber", "appearance", "motion", "ttt", "joint")
PAPER_SCORES = ("clip_t", "clip_i", "temporal_consistency", "motion_fidelity")


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
        looks: the same without the motion ("a man"), which absorbers learn; not given: {performer}.
        video: file of the reference clip.
        rendered: instead of a file, one of the rendered world's held-out motions, from 0 to 4, drawn with each seed.
        fps: as of `customttt motion`: which frames of the video are taken.
        frame_step: as of `customttt motion`.
        start: as of `customttt motion`.
    """

    name: str
    prompt: str
    looks: str | None = None
    video: str | None = None
    rendered: int | None = None
    fps: float | None = None
    frame_step: int = 1
    start: float = 0.0

    @property
    def frames(self) -> dict[str, Any]:
        """Which frames of the video are taken, as the flags of `customttt motion` say it."""
        return {"fps": self.fps, "frame_step": self.frame_step, "start": self.start}


@dataclass(kw_only=True)
class GridSettings(BaseSettings):
    """A grid: every arm for every group, prompt and seed.

    Args:
        out: folder for runs, clips, scores, table and report. The same command again goes on where it was stopped.
        subjects: in the file, a table by short name: name, images or rendered, prompt, trigger.
        motions: in the file, a table by short name: name, prompt, video or rendered.
        groups: pairs of a subject and a motion, by short names (house+patrolling), or a motion alone, which the prompts
            then give to subjects of their own.
        prompts: what is generated; {subject} and {motion} stand for their names.
        seeds: of training and sampling; rendered photos and clips are drawn anew with each.
        arms: in the file, by title, tables of flags of the stages that an arm has: absorber, appearance, motion, ttt,
            or joint (an empty one: the base's own settings), and generate.
        compare: differences to report, "one arm - another".
        clips: of each cell, from different noise.
        scores: in the file, a table of the scorers' flags of `customttt score`: clip, tracker, lpips, ...
        paper: in the file, by arm, what the paper prints for it: a table of clip_t, clip_i, temporal_consistency,
            motion_fidelity.
    """

    out: str
    subjects: dict[str, Any] = field(default_factory=dict)
    motions: dict[str, Any]
    groups: list[str]
    prompts: list[str]
    seeds: list[int]
    arms: dict[str, Any]
    compare: list[str] = field(default_factory=list)
    clips: int = 1
    scores: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)


def entry_of(cls: type, table: Any, where: str) -> Any:
    """A Subject or a Motion from its table; raises UserError, with `where` before it."""
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: a table was expected, not {table!r}")
    entry: Any = settings_from(cls, table, where)
    given = entry.images if cls is Subject else entry.video
    frames = {} if cls is Subject else entry.frames
    if (given is None) == (entry.rendered is None):
        raise UserError(f"{where}: give {'images' if cls is Subject else 'video'} or rendered, one of them")
    if given is None and frames and frames != Motion(name="", prompt="").frames:
        raise UserError(
            f"{where}: fps, frame_step and start choose frames of a video, and a rendered clip has no others"
        )
    names = HELD_OUT_SUBJECTS if cls is Subject else HELD_OUT_MOTIONS
    if entry.rendered is not None and not 0 <= entry.rendered < len(names):
        raise UserError(f"{where}: rendered must be from 0 to {len(names) - 1}, and is {entry.rendered}")
    return entry


def check_grid(settings: GridSettings) -> None:
    """Raises UserError where the grid's own names and tables are wrong."""
    if not settings.groups or not settings.prompts or not settings.seeds or not settings.arms or settings.clips < 1:
        raise UserError("a grid needs groups, prompts, seeds and arms, and at least one clip a cell")
    for listed in ("groups", "prompts", "seeds"):
        if len(set(getattr(settings, listed))) < len(getattr(settings, listed)):
            raise UserError(f"{listed}: one is given twice")
    for tables in ("subjects", "motions"):
        for name in getattr(settings, tables):
            # they are parts of folders' names, which must not lead out of the grid's own
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
                raise UserError(f"{tables}: {name!r} is no short name: letters, digits, - and _ were expected")
    for group in settings.groups:
        who, what = parts_of(group)
        if what not in settings.motions or who not in (None, *settings.subjects):
            raise UserError(
                f"groups: {group} is not SUBJECT+MOTION, nor a motion alone, of the subjects "
                f"{', '.join(settings.subjects) or '(none)'} and the motions {', '.join(settings.motions)}"
            )
    _check_lone_motions(settings)
    for prompt in settings.prompts:
        if re.search(r"[{}]", prompt.replace("{subject}", "").replace("{motion}", "")):
            raise UserError(f"prompts: {prompt!r} may hold {{subject}} and {{motion}}, and nothing else in braces")
    _check_arms(settings)


def parts_of(group: str) -> tuple[str | None, str]:
    """The short names of a group's subject, None where it has none, and of its motion."""
    who, plus, what = group.rpartition("+")
    return who if plus else None, what


def _check_lone_motions(settings: GridSettings) -> None:
    """What needs a subject must not be asked of a group without one."""
    alone = [group for group in settings.groups if parts_of(group)[0] is None]
    if not alone:
        return
    for prompt in settings.prompts:
        if "{subject}" in prompt:
            raise UserError(f"prompts: {prompt!r} holds {{subject}}, and the group {alone[0]} has none")
    for arm, tables in settings.arms.items():
        if isinstance(tables, Mapping) and "appearance" in tables:
            raise UserError(f"arms: {arm}: appearance needs a subject, and the group {alone[0]} has none")


def _check_arms(settings: GridSettings) -> None:
    for arm, tables in settings.arms.items():
        if not isinstance(arm, str) or " - " in arm:
            raise UserError(f"arms: {arm!r} is no title: a text without ' - ' was expected, which compare needs")
        if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
            raise UserError(f"arms: {arm}: tables of {', '.join(STAGES)}, generate were expected, not {tables!r}")
        unknown = [str(name) for name in tables if name not in (*STAGES, "generate")]
        if unknown or ("ttt" in tables and not {"appearance", "motion"} <= set(tables)):
            what = f"{min(unknown)} is no stage" if unknown else "ttt needs appearance and motion"
            raise UserError(f"arms: {arm}: {what}; the stages are {', '.join(STAGES)}, and generate")
        if "absorber" in tables and "motion" not in tables:
            raise UserError(f"arms: {arm}: absorber serves the training of a motion LoRA, and needs motion")
        if "joint" in tables and set(tables) & set(STAGES) != {"joint"}:
            raise UserError(f"arms: {arm}: joint trains both LoRAs by itself, and goes with no other stage")
    if len({slug_of(arm) for arm in settings.arms}) < len(settings.arms):
        raise UserError("arms: two titles differ in signs alone: their folders would be the same")
    for arm, printed in settings.paper.items():
        if arm not in settings.arms:
            raise UserError(f"paper: {arm} is no arm; arms are {', '.join(settings.arms)}")
        if not isinstance(printed, Mapping) or not set(printed) <= set(PAPER_SCORES):
            raise UserError(f"paper: {arm}: a table of {', '.join(PAPER_SCORES)} was expected, not {printed!r}")
    for line in settings.compare:
        if any(arm not in settings.arms for arm in line.split(" - ")) or line.count(" - ") != 1:
            raise UserError(
                f"compare: {line!r} is not of the form ONE ARM - ANOTHER; arms are {', '.join(settings.arms)}"
            )


def slug_of(title: str) -> str:
    """A folder's name for a title of any signs."""
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return slug or f"arm-{hashlib.sha256(title.encode()).hexdigest()[:6]}"
