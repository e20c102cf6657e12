"""What a grid itself decides of its stages: what they train on, with which words, and which LoRAs come of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.grid_settings import Motion, Subject
from model import UserError
from train.absorber import AbsorberSettings
from train.appearance import AppearanceSettings
from train.data import clip_files, subject_files
from train.joint import JointSettings
from train.motion import MotionSettings
from train.ttt import TTTSettings
from weights import sha256
from weights.tokenizer import contains

BUILT_ON = {
    "motion": ("absorber",),
    "ttt": ("appearance", "motion"),
}  # the runs that a stage takes
PERFORMER = "{performer}"  # in the prompt of a rendered motion: who was drawn to perform it


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


def known_stages(
    group: str, subject: Subject | None, images: Path | None, motion: Motion, reference: Path, prompt: str, seed: int
) -> dict[str, Stage]:
    """The stages that arms of a group may have with one prompt and one seed, but for the absorber.

    Args:
        group: as in the settings.
        subject: None: the group has none, and neither has it appearance and test-time training; joint then takes the
            looks of the reference clip.
        images: the subject's photos.
        motion: with the performer's words in its prompt.
        reference: its clip.
        prompt: what is generated.
        seed: of the runs.
    """
    who, _, what = group.rpartition("+")
    filmed = {file.name: sha256(file) for file in clip_files(reference).values()}
    moving = {"video": str(reference), "prompt": motion.prompt, **motion.frames}
    known = {"motion": Stage(MotionSettings, f"motion-{what}-s{seed}", moving, filmed)}
    if subject is None or images is None:
        return known | {"joint": Stage(JointSettings, f"joint-{group}-s{seed}", moving, {"video": filmed})}
    seen = {file.name: sha256(file) for file in subject_files(images).values()}
    pictured = {"images": str(images), "trigger": subject.trigger}
    words = subject.prompt or subject.name
    return known | {
        "appearance": Stage(AppearanceSettings, f"appearance-{who}-s{seed}", {**pictured, "prompt": words}, seen),
        "ttt": Stage(TTTSettings, f"ttt-{group}-s{seed}", {"prompt": prompt}, {}),
        "joint": Stage(
            JointSettings,
            f"joint-{group}-s{seed}",
            {**pictured, "appearance_prompt": words, **moving},
            {"images": seen, "video": filmed},
        ),
    }


def with_absorber(known: Mapping[str, Stage], looks: str | None, table: Mapping[str, Any]) -> dict[str, Stage]:
    """The stages of an arm whose motion LoRA is trained with an absorber: its token is in the prompts of both.

    The absorber's prompt is the looks alone. Where it learns a token, that stands behind the looks' article, and
    begins as their last word, the noun, unless the table has another initializer.

    Args:
        known: the stages of `known_stages`.
        looks: what the reference clip shows, without its motion ("a man").
        table: the arm's flags of the absorber.

    Raises:
        UserError: no looks.
    """
    motion = known["motion"]
    if not looks or not looks.split():
        raise UserError('an absorber needs the looks of the motion\'s video, as in motions: jog: {looks: "a man"}')
    fixed = {**motion.fixed, "prompt": looks}
    if table.get("kind", AbsorberSettings.kind) != "lora":
        token = str(table.get("token", AbsorberSettings.token))
        fixed["prompt"] = with_token(looks, token)
        motion = replace(motion, fixed={**motion.fixed, "prompt": with_token(motion.fixed["prompt"], token)})
        if "initializer" not in table:
            fixed["initializer"] = looks.split()[-1]
    absorber = Stage(AbsorberSettings, motion.label.replace("motion", "absorber", 1), fixed, motion.contents)
    return {**known, "absorber": absorber, "motion": motion}


def with_token(text: str, token: str) -> str:
    """The text with a learned word behind its article, or at its head: "a man" becomes "a <look> man"."""
    if contains(text, token):
        return text
    article = re.match(r"(an?|the)\s+", text, re.IGNORECASE)
    place = article.end() if article else 0
    return f"{text[:place]}{token} {text[place:]}"


def loras_of(stages: Mapping[str, Any]) -> list[str]:
    """The LoRAs that an arm generates with.

    An absorber is gone by then, and so is joint's appearance LoRA where it has the looks of the reference clip.
    """
    if "ttt" in stages:
        return [stages["ttt"].out]
    return [
        f"{its.out}#motion" if isinstance(its, JointSettings) and its.images is None else its.out
        for stage, its in stages.items()
        if stage != "absorber"
    ]
