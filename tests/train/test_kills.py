"""Kills at random moments of all stages, of saving and of generating: what ends as if nothing had happened."""

import os
import sys

import pytest
from kills import Killer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills and locks are POSIX's")


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_after_any_kill_the_same_command_ends_with_the_same_files(files, material, tmp_path, monkeypatch, count):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # else the server could not import ahead
    landed = Killer(files.flags(), material, tmp_path, seed=count).kill(count)
    print(landed)
    assert sum(landed.values()) == count
