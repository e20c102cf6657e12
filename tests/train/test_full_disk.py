"""A disk that takes no more, and folders that take nothing: told to people, and nothing lost by it."""

import os
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

import pytest
from small_runs import appearance, broken_off, motion

from model import UserError
from sampling.generate import GenerateSettings, generate_files
from train.appearance import train_appearance
from train.motion import train_motion
from train.tiny import TinySettings, train_tiny
from train.ttt import TTTSettings, train_ttt

resource = pytest.importorskip("resource")


@contextmanager
def room(size):
    """Within the block no file grows beyond so many bytes: the system refuses as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # which pytest has in files
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("full", ["log.csv", "state.pt", "lora.safetensors"])
def test_training_ends_with_its_last_good_state_and_goes_on_from_there(base, material, tmp_path, full):
    out = tmp_path / "run"
    settings = motion(material, out, steps=6, save_every=2, learning_rate=1e-3)
    whole = train_motion(motion(material, tmp_path / "own", steps=6, save_every=2, learning_rate=1e-3), base)
    stop = 5 if full == "lora.safetensors" else 3  # after the last state, or before another

    with broken_off(stop):
        train_motion(settings, base)
    good = (out / "state.pt").read_bytes()
    with (
        room(60 if full == "log.csv" else 2000),
        pytest.raises(UserError, match=rf"{full} could not be written.*large"),
    ):
        train_motion(settings, base)
    assert (out / "state.pt").read_bytes() == good
    assert not list(out.glob(".writing-*"))
    assert not (out / "lora.safetensors").exists()
    lora = train_motion(settings, base)
    assert lora.read_bytes().replace(bytes(out), bytes(whole.parent)) == whole.read_bytes()
    assert [row.split(",")[0] for row in (out / "log.csv").read_text().split()[1:]] == list("012345")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "frames/"])
def test_generating_keeps_the_former_clip_and_ends_as_ever_after(base, tmp_path, name):
    clip = GenerateSettings(prompt=["a man"], out=f"{tmp_path}/{name}", steps=2)

    def written():
        return {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    generate_files(clip, base)
    before = written()
    with room(200), pytest.raises(UserError, match=r"could not be written.*large"):
        generate_files(GenerateSettings(prompt=["a cat"], out=clip.out, steps=2, seed=[1]), base)
    assert written() == before
    generate_files(clip, base)
    assert written() == before


COMMANDS = {
    "appearance": lambda material, out: train_appearance(appearance(material, out)),
    "motion": lambda material, out: train_motion(motion(material, out)),
    "ttt": lambda material, out: train_ttt(
        TTTSettings(prompt="x", appearance=str(material / "a.st"), motion=str(material / "a.st"), out=str(out))
    ),
    "generate": lambda material, out: generate_files(GenerateSettings(prompt=["x"], out=f"{out}/clip.mp4")),
    "tiny": lambda material, out: train_tiny(TinySettings(out=str(out), device="cpu")),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("below", ["", "new/run"])
def test_a_read_only_folder_is_told_before_anything_is_loaded(material, tmp_path, monkeypatch, command, below):
    def loaded(*_):
        raise AssertionError("the base was loaded")

    for module in ("train.appearance", "train.motion", "train.ttt", "sampling.generate"):
        monkeypatch.setattr(f"{module}.open_base", loaded)
    home = tmp_path / "home"
    home.mkdir()
    if os.geteuid():
        home.chmod(0o555)
    else:  # whom nothing is read-only
        monkeypatch.setattr(os, "access", lambda path, mode: path != home)
    (material / "a.st").touch()
    with pytest.raises(UserError, match=r"cannot be written: .*home is read-only"):
        COMMANDS[command](material, home / below)
    assert not any(home.iterdir())
    if os.geteuid():
        home.chmod(0o755)


def test_a_finished_run_in_a_read_only_folder_is_finished(base, material, tmp_path, monkeypatch):
    lora = train_motion(motion(material, tmp_path / "run"), base)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "run")
    assert train_motion(motion(material, tmp_path / "run"), base) == lora
