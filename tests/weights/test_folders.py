"""Places to write in and folders in place of old ones, with their writers killed; locks; folders that refuse."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.errors import UserError
from sampling import write_media
from weights import folders
from weights.files import atomic_write, write_json
from weights.folders import check_folder, locked, remove_leftovers, replacing, workplace

fcntl = pytest.importorskip("fcntl")


def killed(writer):
    """The process that `writer` runs in, killed: by itself, or once it sleeps."""
    child = os.fork()
    if not child:
        try:
            writer()
            time.sleep(60)
        finally:
            os._exit(1)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def named(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_may_be_read_by_whom_new_files_may_be_read_by(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "plain").touch()
        write_json(tmp_path / "a.json", {})
        with atomic_write(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.ones(2)}, temporary)
        write_media(tmp_path / "a.mp4", torch.zeros(1, 3, 16, 16))
    finally:
        os.umask(before)
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_the_next_write_removes_what_a_killed_one_left_and_no_other(tmp_path):
    def writer():
        with atomic_write(tmp_path / "clip.mp4") as temporary:
            temporary.write_bytes(b"half of")
            time.sleep(60)

    child = killed(writer)
    while not list(tmp_path.glob(".writing-*/clip.mp4")):
        time.sleep(0.001)
    write_json(tmp_path / "a.json", {})
    assert list(tmp_path.glob(".writing-*/clip.mp4"))  # its process lives
    kill(child)
    with workplace(tmp_path) as mine:
        assert named(tmp_path) == [mine.name, "a.json"]
        write_json(tmp_path / "b.json", {})
        assert mine.is_dir()
    assert named(tmp_path) == ["a.json", "b.json"]


def test_a_place_that_another_process_took_for_a_leftover_is_made_anew(tmp_path, monkeypatch):
    lock, taken = folders._lock, []

    def late(path):
        if not taken:
            taken.append(path)
            path.rmdir()
        return lock(path)

    monkeypatch.setattr(folders, "_lock", late)
    write_json(tmp_path / "a.json", {})
    assert taken
    assert named(tmp_path) == ["a.json"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_folder_is_replaced_loses_neither_the_old_nor_the_new(tmp_path, renames):
    clip, rename = tmp_path / "frames", Path.rename
    clip.mkdir()
    (clip / "0000.png").write_text("old")

    def writer():
        calls = iter(range(9))

        def until_killed(source, target):
            if next(calls) == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        Path.rename = until_killed
        with replacing([clip]) as fresh:
            fresh[clip].mkdir()
            (fresh[clip] / "0000.png").write_text("new")
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(killed(writer), 0)
    with pytest.raises(RuntimeError), replacing([clip]):
        raise RuntimeError
    assert (clip / "0000.png").read_text() == ("new" if renames == 2 else "old")
    assert named(tmp_path) == ["frames"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    clip, rename = tmp_path / "frames", Path.rename
    write_media(clip, torch.zeros(2, 3, 4, 4))

    def refused(source, target):
        if source.parent.name.startswith(".writing-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(UserError, match=r"frames could not be written.*No space left"):
        write_media(clip, torch.zeros(3, 3, 4, 4))
    assert named(tmp_path) == ["frames"]
    assert len(named(clip)) == 2


def test_a_locked_folder_is_refused_to_others_and_left_as_it_was(tmp_path):
    out = tmp_path / "runs" / "a"
    with locked(out):
        with pytest.raises(UserError, match=r"another process is at work in .*a: wait for it"), locked(out):
            pass
        with locked(out / "motion"), locked(tmp_path / "runs"):
            pass
        assert named(out) == []
    assert not out.exists()
    with locked(out):
        (out / "kept").touch()
    assert named(out) == ["kept"]


def test_where_folders_cannot_be_locked_it_is_said_and_no_place_is_taken_for_a_leftover(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with workplace(tmp_path) as place:
        write_json(tmp_path / "a.json", {})
        remove_leftovers(tmp_path)
        assert place.is_dir()
    assert named(tmp_path) == ["a.json"]
    with pytest.warns(UserWarning, match="could not be locked: start no second run"), locked(tmp_path):
        pass


def test_a_folder_that_refuses_is_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "one")
    with pytest.raises(UserError, match=r"file/below cannot be written: .*file is no folder"):
        check_folder(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # as it is for all but root
    with pytest.raises(UserError, match=r"new/one cannot be written: .* is read-only"):
        check_folder(tmp_path / "new" / "one")
    monkeypatch.undo()
    if os.geteuid():
        tmp_path.chmod(0o555)
        with pytest.raises(UserError, match="is read-only"), locked(tmp_path / "new"):
            pass
