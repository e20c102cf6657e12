"""A second process on the folder of any long work is refused, and changes nothing there."""

import pytest
from grids import settings_for

import train.run
from eval.ablate import ablate
from eval.demo import DemoSettings, demo
from eval.influence import InfluenceSettings, measure_influence
from eval.judge import JudgeSettings, train_judge
from model import UserError
from train.run import RunSettings
from train.tiny import TinySettings, _begin, train_tiny
from weights.folders import locked

pytest.importorskip("fcntl")


@pytest.fixture
def commands(small, files, judge, material, tmp_path):
    """By name: the folder that is at work, and what wants it too."""
    out, recipe = tmp_path / "out", TinySettings(out=str(tmp_path / "tiny"), device="cpu")
    _begin(tmp_path / "tiny", recipe)
    sections = {
        "appearance": {"images": str(material / "photos"), "prompt": "a teddy bear"},
        "motion": {"video": str(material / "clip.mp4"), "prompt": "a man runs"},
        "ttt": {"prompt": "a teddy bear runs"},
    }
    return {
        "run": (out, lambda: train.run.run(RunSettings(**files.flags(), out=str(out), **sections))),
        "demo": (out, lambda: demo(DemoSettings(out=str(out)))),
        "influence": (
            out,
            lambda: measure_influence(InfluenceSettings(out=str(out), pairs=1, judge=judge), small),
        ),
        "ablate": (tmp_path / "grid", lambda: ablate(settings_for(tmp_path, material), small)),
        "tiny": (tmp_path / "tiny" / "clip", lambda: train_tiny(recipe)),
        "judge": (out / "judge.run", lambda: train_judge(JudgeSettings(out=str(out / "judge.safetensors")))),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("command", ["run", "demo", "influence", "ablate", "tiny", "judge"])
def test_a_second_process_is_refused(commands, command):
    folder, start = commands[command]
    with locked(folder), pytest.raises(UserError, match=f"another process is at work in .*{folder.name}: wait for it"):
        start()
