"""The README's Python does what its four commands do, and what it and the page on the demo name is there."""

import re
import shlex
from pathlib import Path

import pytest

import sampling.generate
import train.appearance
import train.motion
import train.ttt
import weights
from customttt import COMMANDS
from eval.demo import DemoSettings
from eval.demo_plan import prompts
from sampling.generate import GenerateSettings
from train.vocabulary import words
from weights import parse_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STEPS = {
    "appearance": (train.appearance, "train_appearance", "AppearanceSettings"),
    "motion": (train.motion, "train_motion", "MotionSettings"),
    "ttt": (train.ttt, "train_ttt", "TTTSettings"),
    "generate": (sampling.generate, "generate_files", "GenerateSettings"),
}


def test_the_python_lines_ask_for_what_the_commands_ask_for(monkeypatch):
    asked = {}
    monkeypatch.setattr(weights, "load_base", lambda base, module: (base, module))
    for name, (module, function, _) in STEPS.items():
        monkeypatch.setattr(module, function, lambda settings, base, name=name: asked.update({name: (settings, base)}))
    [code] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "train_ttt" in block]
    exec(code, {})
    for name, (module, _, settings) in STEPS.items():
        [line] = re.findall(rf"^customttt {name} +(--base .*)$", README, re.MULTILINE)
        words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', line)]
        expected = parse_settings(getattr(module, settings), words)
        mine, base = asked[name]
        assert base == (expected.base, expected.motion_module)
        assert vars(mine) == {**vars(expected), "base": "tiny", "motion_module": None}


def test_every_command_the_readme_names_exists():
    named = set(re.findall(r"^`?customttt (\w+)", README, re.MULTILINE))
    assert named <= set(COMMANDS)


def test_the_first_commands_need_nothing_but_the_tiny_base():
    demo, generate = re.findall(r"^customttt (.*)$", README, re.MULTILINE)[:2]
    assert demo == "demo"
    settings = parse_settings(GenerateSettings, shlex.split(generate)[1:])
    assert settings.base == "tiny"
    assert set(settings.prompt[0].split()) <= {"a", "is", "over", "the", *words()}


@pytest.mark.parametrize("page", ["README.md", "docs/demo.md"])
def test_the_prompts_of_the_demo_are_told(page):
    page = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert all(f'"{prompt}"' in page for prompt in prompts(DemoSettings()))


def test_the_variations_of_the_demo_parse():
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    lines = re.findall(r"^customttt demo (--.*)$", page, re.MULTILINE)
    outs = {parse_settings(DemoSettings, shlex.split(line)).out for line in lines}
    assert len(outs) == len(lines) == 3
    assert "demo" not in outs


@pytest.mark.parametrize("page", ["README.md", "docs/demo.md", "docs/run.md", "docs/files.md", "docs/formats.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
