"""How a command ends: exit codes, and one line instead of a traceback."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from model.errors import UserError
from weights.command import run_command


def end_of(main, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["--x"])
    return ended.value.code, capsys.readouterr().err


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x.ckpt is empty."), 2, "error: x.ckpt is empty.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, message):
    assert end_of(raising(error), capsys) == (code, message)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_flags_that_lower_it(capsys, error):
    code, message = end_of(raising(error), capsys)
    assert code == 2
    assert message.count("\n") == 1
    for flag in ("--num_frames", "--width", "--height", "--gradient_checkpointing", "--dtype", "--rank"):
        assert flag in message


def test_a_mistake_of_the_program_is_not_hidden():
    for error in (RuntimeError("shapes differ"), ValueError("x"), OSError("x")):
        with pytest.raises(type(error)):
            run_command(raising(error), [])


def test_a_command_that_ends_well_gives_0_or_what_it_returned(capsys):
    assert end_of(lambda argv: None, capsys) == (0, "")
    assert end_of(lambda argv: 3, capsys) == (3, "")
    assert end_of(lambda argv: len(argv), capsys) == (1, "")


def test_a_warning_is_one_plain_line(capsys):
    assert end_of(lambda argv: warnings.warn("the prompt is too long:\n  cut", stacklevel=1), capsys) == (
        0,
        "warning: the prompt is too long: cut\n",
    )


SCRIPT = """
import sys, warnings
from dataclasses import dataclass
from weights.command import run_command
from weights.settings import parse_settings

@dataclass
class Lines:
    \"\"\"Print lines.

    Args:
        lines: how many.
    \"\"\"
    lines: int = 1

def main(argv=None):
    settings = parse_settings(Lines, argv, prog="lines")
    warnings.warn("careful")
    for index in range(settings.lines):
        print("line", index)

if __name__ == "__main__":
    run_command(main)
"""


def run_script(*words, pipe=""):
    root = Path(__file__).parents[2]
    script = f'"{sys.executable}" -c "$SCRIPT" {" ".join(words)} {pipe}'
    environment = {**os.environ, "SCRIPT": SCRIPT, "PYTHONPATH": str(root)}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, env=environment, check=False
    )


def test_a_script_reads_its_command_line_and_survives_a_reader_that_leaves():
    ended = run_script("--lines", "1000000", pipe="| head -n 1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "line 0\n", "warning: careful\n")
