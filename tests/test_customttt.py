"""The console command."""

import subprocess
import sys

import pytest

import customttt
from model import UserError


def test_every_command_has_an_entry_script_and_help_of_its_own(capsys):
    for name in customttt.COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            customttt.command([name, "--help"])
        assert stopped.value.code == 0
        assert f"customttt {name}" in capsys.readouterr().out


def test_without_words_it_lists_the_commands(capsys):
    assert customttt.command([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in customttt.COMMANDS)


def test_an_unknown_command_is_named():
    with pytest.raises(UserError, match="'tran'"):
        customttt.command(["tran"])


@pytest.mark.parametrize("module", ["customttt", "train.motion", "sampling.generate"])
def test_a_mistake_ends_with_code_2_and_one_plain_message(module, tmp_path):
    words = ["motion"] if module == "customttt" else []
    command = [sys.executable, "-m", module, *words, "--prompt", "a", "--out", str(tmp_path / "x"), "--nonsense", "1"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --nonsense is not a setting")
    assert "Traceback" not in ended.stderr
    assert "RuntimeWarning" not in ended.stderr
    assert not (tmp_path / "x").exists()
