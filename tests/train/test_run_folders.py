"""Run folders: whose they are, and runs that were killed, changed or finished before."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from clips import smooth
from safetensors.torch import load_file
from small_runs import appearance, motion

from model import UserError
from train.appearance import train_appearance
from train.motion import MotionSettings, train_motion
from weights import load_base


def test_the_same_command_on_a_finished_run_changes_nothing(base, files, material, tmp_path):
    lora = train_motion(motion(material, tmp_path / "run"), base)
    before = lora.stat().st_mtime_ns
    (tmp_path / "run" / "state.pt").write_bytes(b"left by a kill between the last two writes")
    assert train_motion(motion(material, tmp_path / "run", **files.flags()), base=None) == lora
    assert lora.stat().st_mtime_ns == before
    assert not (tmp_path / "run" / "state.pt").exists()


def test_leaving_a_setting_to_the_base_is_not_what_was_asked_for_before(base, material, tmp_path):
    train_motion(motion(material, tmp_path / "run"), base)
    with pytest.raises(UserError, match=r"steps \(3 there, none given now\)"):
        train_motion(motion(material, tmp_path / "run", steps=None), base)
    assert train_motion(motion(material, tmp_path / "run", rank=4), base)  # the base's own number, said aloud


@pytest.mark.parametrize("other", ["base", "motion_module", "dtype"])
def test_a_run_does_not_go_on_with_another_network(base, material, tmp_path, other):
    def stopping(done):
        raise KeyboardInterrupt

    settings = motion(material, tmp_path / "run", preview_every=1, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.stage.previewer", lambda *_: stopping)
        with pytest.raises(KeyboardInterrupt):
            train_motion(settings, base)
    part = {"base": "unet", "motion_module": "motion_module", "dtype": None}[other]
    if part:
        base.fingerprints = {**base.fingerprints, part: "another"}
    else:
        base.unet.to(torch.bfloat16)
    with pytest.raises(UserError, match=part or "dtype .float32 there, bfloat16 now"):
        train_motion(settings, base)


def test_the_base_is_recorded_though_it_was_loaded_before(base, files, material, tmp_path):
    train_motion(motion(material, tmp_path / "run"), base)
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (kept["base"], kept["motion_module"], kept["dtype"]) == (str(files.folder), str(files.adapter), "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": 4}, "steps"), ({"seed": 1}, "seed"), ({"rank": 8}, "rank"), ({"prompt": "x"}, "prompt")],
)
def test_a_folder_of_a_different_run_is_refused(base, material, tmp_path, changes, message):
    train_motion(motion(material, tmp_path / "run"), base)
    with pytest.raises(UserError, match=f"other settings: {message}"):
        train_motion(motion(material, tmp_path / "run", **changes), base)


def test_other_contents_under_the_same_names_are_noticed(base, material, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    smooth().save(photos / "a.png")
    train_appearance(appearance(material, tmp_path / "run", images=str(photos)), base)
    smooth().rotate(180).save(photos / "a.png")
    with pytest.raises(UserError, match=r"contents of a\.png"):
        train_appearance(appearance(material, tmp_path / "run", images=str(photos)), base)
    smooth().save(photos / "a.png")
    smooth().save(photos / "b.png")
    with pytest.raises(UserError, match=r"contents of b\.png"):
        train_appearance(appearance(material, tmp_path / "run", images=str(photos)), base)


def test_a_folder_of_something_else_is_left_alone(base, material, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        train_motion(motion(material, tmp_path), base)
    with pytest.raises(UserError, match="is a file"):
        train_motion(motion(material, tmp_path / "thesis.txt"), base)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_killed_at_a_random_step_ends_with_the_same_lora(base, files, material, tmp_path):
    """SIGKILL in the middle of a real process; the very same command again."""
    steps = 12
    flags = {
        **files.flags(),
        "video": str(material / "clip.mp4"),
        "prompt": "a man runs",
        "num_frames": 3,
        "height": 32,
        "width": 32,
        "rank": 4,
        "steps": steps,
        "save_every": 2,
        "learning_rate": 1e-3,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train_motion(MotionSettings(**{**flags, "out": str(tmp_path / "whole")}), base)
    finally:
        torch.set_num_threads(threads)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "train.motion", *words, "--out", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    last = random.Random(os.urandom(4)).randrange(3, steps - 3)
    log = tmp_path / "killed" / "log.csv"
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) <= last):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "lora.safetensors").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    expected, resumed = load_file(whole), load_file(tmp_path / "killed" / "lora.safetensors")
    assert all(torch.equal(expected[key], resumed[key]) for key in expected), f"killed after step {last}"
    assert not list((tmp_path / "killed").glob(".writing-*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_float32_loras_to_about_the_same_loss(base, files, material, tmp_path, dtype):
    half = load_base(files.folder, files.adapter, device="cpu", dtype=dtype)
    half.recipe = base.recipe
    for stage, train in ((appearance, train_appearance), (motion, train_motion)):
        losses = []
        for its, loaded in (("exact", base), ("half", half)):
            out = tmp_path / f"{stage.__name__}-{its}"
            tensors = load_file(train(stage(material, out, steps=12, learning_rate=1e-5), loaded))
            assert all(value.dtype == torch.float32 and value.any() for value in tensors.values())
            rows = (out / "log.csv").read_text().splitlines()[1:]
            losses.append([float(row.split(",")[1]) for row in rows])
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        assert losses[1] != losses[0]
