"""What a demonstration is asked for, and the settings of all its steps that follow from it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eval.checks import check_stages
from eval.demo_inputs import BACKGROUND, MOTION_WORD, PERFORMER, PHOTOGRAPHED, SUBJECT_WORD
from eval.reading import load_judge
from model import Recipe, UserError
from sampling import check_size
from sampling.generate import GenerateSettings, clip_files
from train.appearance import AppearanceSettings
from train.data import clip_files as clip_files_of
from train.data import read_subject, subject_files
from train.motion import MotionSettings, read_frames
from train.run import RunSettings, section
from train.ttt import TTTSettings
from train.world import HELD_OUT_MOTIONS, HELD_OUT_SUBJECTS, SIZE
from weights import Base, BaseSettings

Settings = TypeVar("Settings", bound=BaseSettings)

PHOTOS, REFERENCE = "photos", "reference.mp4"  # in the demo's folder


@dataclass(kw_only=True)
class DemoSettings(RunSettings):
    """A demonstration, from inputs to a page that shows them beside the results.

    Args:
        out: folder for everything: inputs, LoRAs, clips, contact-sheet.png, index.html.
        subject_number: which subject that the tiny base never saw is photographed: 0 arrow, 1 gear, 2 drop,
            3 hourglass, 4 house.
        motion_number: which motion that it never saw is filmed: 0 figure eight, 1 spiral, 2 hopping and turning,
            3 swinging, 4 patrolling.
        images: a folder of your own photos instead; needs --subject_prompt.
        video: a video of your own instead; needs --motion_prompt and --prompt.
        subject_prompt: what the photos show; not given: "a zor", to the tiny base any subject.
        motion_prompt: what the video shows; not given: "a plain yellow circle is dax".
        prompt: what is generated; not given: subject_prompt + " is dax over the road".
        seed: of everything random; the clips' seeds count on from it.
        clips: how many are generated of each kind.
        appearance: in the file, a table of stage 1's settings: steps, learning_rate, ...
        motion: in the file, a table of stage 2's settings.
        ttt: in the file, a table of stage 3's settings.
        generate: in the file, a table of the sampler's settings: steps, guidance_scale, ...
    """

    out: str = "demo"
    subject_number: int = 4
    motion_number: int = 4
    images: str | None = None
    video: str | None = None
    subject_prompt: str | None = None
    motion_prompt: str | None = None
    prompt: str | None = None
    seed: int = 0
    clips: int = 3


@dataclass(frozen=True)
class Plan:
    """The settings of all steps."""

    looks: AppearanceSettings
    moves: MotionSettings
    both: TTTSettings
    clips: dict[str, GenerateSettings]


def make_plan(settings: DemoSettings) -> Plan:
    """The settings of every step, checked as far as that goes without loading the base.

    Raises:
        UserError: a number out of range, an input without its prompt or one that is not there, a bad table.
    """
    for name, known in (("subject_number", HELD_OUT_SUBJECTS), ("motion_number", HELD_OUT_MOTIONS)):
        if not 0 <= getattr(settings, name) < len(known):
            raise UserError(f"{name} must be from 0 to {len(known) - 1}, and is {getattr(settings, name)}")
    if settings.num_frames is not None and settings.num_frames < 1:
        raise UserError(f"num_frames must be at least 1, and is {settings.num_frames}")
    if not 1 <= settings.clips <= 100 or not 0 <= settings.seed <= 2**32 - 100:
        raise UserError(f"clips must be from 1 to 100, and seed from 0 to {2**32 - 100}")
    subject, motion, prompt = prompts(settings)
    out = Path(settings.out)
    if settings.images is not None:
        subject_files(settings.images)
    if settings.video is not None:
        clip_files_of(settings.video)

    images, video = settings.images or str(out / PHOTOS), settings.video or str(out / REFERENCE)
    seen = f"{subject} {PHOTOGRAPHED}" if settings.images is None or settings.base == "tiny" else subject
    looks = table(AppearanceSettings, settings, "appearance", images=images, prompt=seen, seed=settings.seed)
    moves = table(MotionSettings, settings, "motion", video=video, prompt=motion, seed=settings.seed)
    if settings.video is None and (moves.fps is not None or moves.frame_step != 1 or moves.start):
        raise UserError(
            "motion: fps, frame_step and start choose frames of a --video, and a rendered clip has no others"
        )
    roles = {"appearance": looks.out, "motion": moves.out}
    both = table(TTTSettings, settings, "ttt", prompt=prompt, seed=settings.seed, **roles)
    seeds = [settings.seed + i for i in range(settings.clips)]
    loras: dict[str, list[str]] = {"base": [], "both": [looks.out, moves.out], "ttt": [both.out]}
    clips = {}
    for kind, lora in loras.items():
        file = str(out / "clips" / f"{kind}.mp4")
        clips[kind] = table(GenerateSettings, settings, "generate", out=file, prompt=[prompt], seed=seeds, lora=lora)
        clip_files(dataclasses.replace(clips[kind], lora=[]))
    return Plan(looks, moves, both, clips)


def prompts(settings: DemoSettings) -> tuple[str, str, str]:
    """Of the subject, of the reference clip, and of what is generated.

    Raises:
        UserError: one that only the person who brought the photos or the video can word is missing, or empty.
    """
    if settings.images is not None and settings.subject_prompt is None:
        raise UserError('--images needs --subject_prompt: what the photos show, as in "a teddy bear"')
    if settings.video is not None and settings.motion_prompt is None:
        raise UserError('--video needs --motion_prompt: what it shows, as in "a man is playing guitar"')
    if settings.motion_prompt is not None and settings.prompt is None:
        raise UserError('--motion_prompt needs --prompt: what to generate, as in "a teddy bear is playing guitar"')
    subject = f"a {SUBJECT_WORD}" if settings.subject_prompt is None else settings.subject_prompt
    motion = f"a {' '.join(PERFORMER)} is {MOTION_WORD}" if settings.motion_prompt is None else settings.motion_prompt
    prompt = f"{subject} is {MOTION_WORD} over the {BACKGROUND}" if settings.prompt is None else settings.prompt
    if not all(words.strip() for words in (subject, motion, prompt)):
        raise UserError("a prompt is empty: say what is to be seen")
    return subject, motion, prompt


def table(cls: type[Settings], settings: DemoSettings, name: str, **fixed: Any) -> Settings:
    """A step's settings: its table in the file, and what the demo itself decides.

    Raises:
        UserError: a bad table, or one that sets what the demo decides.
    """
    fixed = {"out": str(Path(settings.out) / name), **fixed}
    taken = sorted((fixed.keys() | {"height", "width", "num_frames"}) & getattr(settings, name).keys())
    if taken:
        raise UserError(f"{name}: {', '.join(taken)} cannot stand in a step's table: see `customttt demo --help`")
    return section(cls, settings, name, **fixed)


def check_base(settings: DemoSettings, plan: Plan, base: Base) -> None:
    """Find out before any work whether the base can do all of it, and whether it can read what was brought along.

    Raises:
        UserError: a base without motion modules, more frames than they know, sizes that cannot be rendered, photos or a
            video that cannot be read, a number in a step's table that is out of its range, or no judge for the scores.
    """
    modules = base.unet.config.motion
    if modules is None:
        raise UserError(f"{base.name} has no motion modules, and a clip needs them: give --motion_module")
    frames, height, width = sizes(settings, base.recipe)
    check_size(height, width)
    if frames > modules.max_frames:
        raise UserError(f"num_frames must be at most {modules.max_frames} with these motion modules, and is {frames}")
    if height != width and (settings.images is None or settings.video is None):
        raise UserError(
            f"photos and clips are rendered square, and not {height} high and {width} wide: give --height and --width "
            "one number, or bring both --images and --video"
        )
    if settings.images is not None:
        read_subject(settings.images, plan.looks.prompt, height, width)
    if settings.video is not None:
        read_frames(plan.moves, base)
    stages = {"appearance": plan.looks, "motion": plan.moves, "ttt": plan.both}
    check_stages(stages, plan.clips["ttt"], base)
    if is_scored(settings, frames, height, width):
        load_judge()


def is_scored(settings: DemoSettings, frames: int, height: int, width: int) -> bool:
    """Whether the judge can compare anything: it knows what is rendered in the tiny base's world, at its size."""
    rendered = settings.images is None or settings.video is None
    return settings.base == "tiny" and rendered and (height, width) == (SIZE, SIZE) and frames >= 2


def sizes(settings: DemoSettings, recipe: Recipe) -> tuple[int, int, int]:
    """Frames, height and width of all that is made: as asked for, or the base's own."""
    given = (settings.num_frames, settings.height, settings.width)
    own = (recipe.num_frames, recipe.height, recipe.width)
    frames, height, width = (mine if value is None else value for value, mine in zip(given, own, strict=True))
    return frames, height, width
