"""The README's Python does what its four commands do."""

import re
from pathlib import Path

import sampling.generate
import train.appearance
import train.motion
import train.ttt
import weights
from customttt import COMMANDS
from weights import parse_settings

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
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
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    for name, (module, _, settings) in STEPS.items():
        [line] = re.findall(rf"^customttt {name} +(--.*)$", README, re.MULTILINE)
        words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', line)]
        expected = parse_settings(getattr(module, settings), words)
        mine, base = asked[name]
        assert base == (expected.base, expected.motion_module)
        assert vars(mine) == {**vars(expected), "base": "tiny", "motion_module": None}


def test_every_command_the_readme_names_exists():
    named = set(re.findall(r"^`?customttt (\w+)", README, re.MULTILINE))
    assert named <= set(COMMANDS)
