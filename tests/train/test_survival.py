"""Runs that survive: damaged states, a full disk, a second process, each against the run that nothing disturbed."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import broken_off, motion

import weights.files
from model import UserError
from train.motion import train_motion
from train.states import checksum

STEPS = 8


def settings(material, out):
    return motion(material, out, steps=STEPS, save_every=2, learning_rate=1e-3)


@pytest.fixture
def whole(base, material, tmp_path):
    return load_file(train_motion(settings(material, tmp_path / "whole"), base))


def same(expected, lora):
    found = load_file(lora)
    return all(torch.equal(expected[key], found[key]) for key in expected)


def flipped(data):
    """One bit of a stored tensor changed: somewhere in the middle of the file."""
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "cut": lambda data: data[:300],
    "empty": lambda data: b"",
    "flipped": flipped,
    "text": lambda data: b"x" * 99,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_falls_back_to_the_one_before(base, material, tmp_path, whole, damage):
    out = tmp_path / "run"
    with broken_off(7):
        train_motion(settings(material, out), base)
    state = out / "state.pt"
    assert (out / "state.before.pt").is_file()
    state.write_bytes(DAMAGES[damage](state.read_bytes()))
    with pytest.warns(UserWarning, match=r"state\.pt is damaged.*going on from the state before it, of step 4"):
        lora = train_motion(settings(material, out), base)
    assert same(whole, lora)
    assert not list(out.glob("state*"))


def test_where_every_state_is_damaged_it_says_what_to_delete(base, material, tmp_path, whole):
    out = tmp_path / "run"
    with broken_off(7):
        train_motion(settings(material, out), base)
    for name in ("state.pt", "state.before.pt"):
        (out / name).write_bytes(b"nothing of use")
    with pytest.raises(UserError, match=r"delete .*state\.pt and .*state\.before\.pt, and the run starts anew"):
        train_motion(settings(material, out), base)
    for name in ("state.pt", "state.before.pt"):
        (out / name).unlink()
    assert same(whole, train_motion(settings(material, out), base))


def test_a_kill_between_the_two_renames_leaves_the_state_before(base, material, tmp_path, whole):
    out = tmp_path / "run"
    with broken_off(5):
        train_motion(settings(material, out), base)
    (out / "state.pt").rename(out / "state.before.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(whole, train_motion(settings(material, out), base))


@pytest.mark.parametrize("moment", ["writing", "flushing"])
def test_a_full_disk_ends_the_run_with_the_last_good_state(base, material, tmp_path, monkeypatch, whole, moment):
    out, saved = tmp_path / "run", []
    patched, name = {"writing": (Path, "write_bytes"), "flushing": (weights.files, "_flush_to_disk")}[moment]
    real = getattr(patched, name)

    def write(path, *contents):
        saved.append(path)
        if path.suffix == ".pt" and len([each for each in saved if each.suffix == ".pt"]) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *contents)

    with monkeypatch.context() as patch:
        patch.setattr(patched, name, write)
        with pytest.raises(UserError, match="No space left"):
            train_motion(settings(material, out), base)
    assert not list(out.glob(".writing-*"))
    assert not (out / "lora.safetensors").exists()
    assert same(whole, train_motion(settings(material, out), base))
    steps = [line.split(",")[0] for line in (out / "log.csv").read_text().splitlines()[1:]]
    assert steps == [str(i) for i in range(STEPS)]


HOLD = """
import sys, time
from weights.folders import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(base, material, tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is at work in"):
            train_motion(settings(material, out), base)
        assert not any(out.iterdir())
        other.kill()
    assert train_motion(settings(material, out), base).is_file()
    assert not [file for file in out.iterdir() if file.name.startswith(".")]


def test_a_checksum_changes_with_every_part_of_a_state():
    state = {"done": 3, "parameters": [torch.zeros(2, 2)], "optimizer": {"state": {0: {"m": torch.ones(2)}}, "lr": 0.1}}
    first = checksum(state)
    assert checksum({**state, "checksum": "x"}) == first
    changed = [
        {**state, "done": 4},
        {**state, "parameters": [torch.zeros(4)]},
        {**state, "parameters": [torch.tensor([[0.0, 0], [0, 1e-30]])]},
        {**state, "parameters": [torch.zeros(2, 2).half()]},
        {**state, "optimizer": {"state": {0: {"m": torch.ones(2)}}, "lr": 0.2}},
        {**state, "optimizer": {"state": {1: {"m": torch.ones(2)}}, "lr": 0.1}},
    ]
    assert len({first, *map(checksum, changed)}) == 1 + len(changed)
