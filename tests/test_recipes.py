"""The lines of docs/recipes.md: their flags are those of the commands, and their words those of the tiny base."""

import re
import shlex
from pathlib import Path

import pytest

from sampling.edit import EditSettings
from sampling.generate import GenerateSettings
from train.absorber import AbsorberSettings, check_settings
from train.appearance import AppearanceSettings
from train.motion import MotionSettings
from train.ttt import TTTSettings
from train.vocabulary import words
from weights import parse_lora, parse_settings
from weights.export import ExportSettings

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
LINES = re.findall(r"^customttt (.*)$", PAGE, re.MULTILINE)
SETTINGS = {
    "absorber": AbsorberSettings,
    "appearance": AppearanceSettings,
    "edit": EditSettings,
    "export": ExportSettings,
    "generate": GenerateSettings,
    "motion": MotionSettings,
    "ttt": TTTSettings,
}


def asked():
    """Of each line the command and its settings."""
    split = [shlex.split(line) for line in LINES]
    return [(name, parse_settings(SETTINGS[name], flags)) for name, *flags in split]


def test_what_a_line_takes_comes_from_the_demo_or_a_line_before_it():
    there = {"demo/photos", "demo/reference.mp4"}
    for _, settings in asked():
        given = vars(settings)
        loras = [str(parse_lora(lora).path) for lora in given.get("lora", [])]
        files = [given.get(name) for name in ("images", "video", "appearance", "run")] + loras
        files += [given["motion"]] if isinstance(given.get("motion"), str) else []
        files += given.get("absorbers", []) + given.get("more_videos", [])
        assert {file for file in files if file} <= there
        there.add(settings.out)


def test_no_line_writes_over_what_another_wrote():
    outs = [settings.out for _, settings in asked()]
    assert len(outs) == len(set(outs)) > 10


@pytest.mark.parametrize("line", LINES)
def test_the_tiny_base_knows_the_words(line):
    name, *flags = shlex.split(line)
    settings = parse_settings(SETTINGS[name], flags)
    if name == "absorber":
        check_settings(settings)
    prompts = vars(settings).get("prompt", [])
    spoken = " ".join([prompts] if isinstance(prompts, str) else prompts).replace("<look>", "")
    assert set(spoken.split()) <= {"a", "is", "and", "over", "the", *words()}
