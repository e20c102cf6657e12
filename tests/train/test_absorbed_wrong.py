"""Absorbers that do not fit: refused before the long work, or warned about."""

import json
import shutil
import warnings

import pytest
import torch
from absorbed_runs import clip, reversed_clip, run
from conftest import small_base
from lora_files import SPATIAL, kohya, random_weights, written
from safetensors.torch import save_file
from small_runs import absorber, appearance, motion

import train.motion
from lora import adapter_names
from model import UserError
from train.absorber import train_absorber
from train.appearance import train_appearance
from train.motion import train_motion
from weights import Embedding, save_embedding


@pytest.fixture(scope="module")
def base(files):
    """One for all runs, each of which leaves it as it was."""
    return small_base(files)


def test_an_absorber_of_another_clip_is_warned_about(base, material, tmp_path, looks):
    frames = reversed_clip(tmp_path, clip(material))
    with pytest.warns(UserWarning, match="0 was trained on another clip"):
        run(base, material, tmp_path / "a", [looks / "0"], video=str(frames))
    moved = tmp_path / "moved.mp4"
    moved.write_bytes((material / "clip.mp4").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(base, material, tmp_path / "b", [looks / "0"], video=str(moved))
        train_appearance(appearance(material, tmp_path / "photos", steps=1), base)
        run(base, material, tmp_path / "c", [tmp_path / "photos"], prompt="a dog runs")
    with pytest.warns(UserWarning, match="1 was trained on another clip"):
        run(base, material, tmp_path / "d", [looks / "0", looks / "1"], more_videos=[str(frames)])


def wrong_width(base, material, tmp_path):
    save_embedding(tmp_path / "wide.safetensors", Embedding("<look>", torch.ones(1, 768)))
    return tmp_path / "wide.safetensors"


def wrong_token(base, material, tmp_path):
    save_embedding(tmp_path / "x.safetensors", Embedding("red", torch.ones(1, 128)))
    return tmp_path / "x.safetensors"


def a_motion_lora(base, material, tmp_path):
    return train_motion(motion(material, tmp_path / "motion", steps=1), base).parent


def unfinished(base, material, tmp_path):
    train_absorber(absorber(material, tmp_path / "half", steps=1), base)
    (tmp_path / "half" / "lora.safetensors").unlink()
    return tmp_path / "half"


def another_model(base, material, tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}, tmp_path / "nine.safetensors")
    return tmp_path / "nine.safetensors"


WRONG = {
    "token that CLIP knows": (wrong_token, {"prompt": "a red dog"}, "'red' is a word of CLIP's own"),
    "width": (wrong_width, {}, r"are 768 wide \(Stable Diffusion 1.x\), and the text encoder of sd15 takes 128"),
    "motion LoRA": (a_motion_lora, {}, r"motion.* changes motion modules: it would absorb the motion"),
    "unfinished": (unfinished, {}, r"half has no lora\.safetensors: the run in it is not finished"),
    "another model": (another_model, {}, r"nine\.safetensors"),
    "a video": (lambda base, material, tmp_path: material / "clip.mp4", {}, "is a video"),
    "photos": (lambda base, material, tmp_path: material / "photos", {}, "photos has no lora.safetensors"),
    "nothing": (lambda base, material, tmp_path: "none.pt", {}, "none.pt does not exist: an absorber's run folder"),
    "strength": (
        lambda base, material, tmp_path: f"{wrong_width(base, material, tmp_path)}:0.5",
        {},
        "only a LoRA has",
    ),
}


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("inputs.json", {"contents": [1, 2]}, "inputs.json is damaged: it should say what the absorber was trained on"),
        ("inputs.json", {"contents": {"a": [1]}}, "inputs.json is damaged"),
        ("inputs.json", {}, "inputs.json is damaged"),
        ("settings.json", {"kind": ["x"]}, r"settings.json is damaged: no absorber is of the kind \['x'\]"),
    ],
)
def test_a_damaged_run_folder_is_told_from_an_absorber(base, material, tmp_path, looks, file, content, says):
    shutil.copytree(looks / "0", tmp_path / "looks")
    (tmp_path / "looks" / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        run(base, material, tmp_path / "run", [tmp_path / "looks"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_absorber_is_refused(base, material, tmp_path, monkeypatch, case):
    made, changes, says = WRONG[case]
    argument = made(base, material, tmp_path)
    monkeypatch.setattr(train.motion, "encode_videos", lambda *arguments: 1 / 0)  # told before the long work
    with pytest.raises(UserError, match=says):
        run(base, material, tmp_path / "run", [argument], **changes)
    assert not (tmp_path / "run").exists()
    assert adapter_names(base.unet) == adapter_names(base.text.clip) == []


def test_absorbers_that_do_not_go_together_are_refused(base, files, material, tmp_path, monkeypatch, looks):
    monkeypatch.setattr(train.motion, "encode_videos", lambda *arguments: 1 / 0)
    ours, lora = str(looks / "0"), str(looks / "0" / "lora.safetensors")
    for absorbers, changes, says in (
        ([ours], {"prompt": "a dog runs"}, "token <look> is not in the prompt 'a dog runs'"),
        ([ours, looks / "1"], {}, "the token '<look>' is given twice"),
        ([files.folder, files.folder / "unet"], {}, "are both checkpoints, and there is one UNet"),
        ([lora + ":<look>"], {}, "'<look>' is not a finite number"),
        ([lora, lora], {}, "lora.safetensors is given twice for one video"),
        ([f"{ours}:<other>"], {}, "token <other> is not in the prompt"),
        ([ours], {"more_videos": [str(material / "clip.mp4")] * 2}, "1 absorbers for 3 videos: give one for each"),
        ([ours] * 2, {"more_videos": [str(material / "clip.mp4")], "more_prompts": ["a dog"]}, "in the prompt 'a dog'"),
    ):
        with pytest.raises(UserError, match=says):
            run(base, material, tmp_path / "run", absorbers, **changes)
    assert not (tmp_path / "run").exists()


def test_what_fits_of_a_lora_is_used_where_that_is_asked_for(base, material, tmp_path):
    weights = kohya(random_weights(base.unet, SPATIAL + r"proj_in"))
    path = written(tmp_path, {**weights, "lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match="--allow_partial takes what fits"):
        run(base, material, tmp_path / "run", [path])
    with pytest.warns(UserWarning, match="Not used: lora_unet_nowhere"):
        run(base, material, tmp_path / "run", [path], allow_partial=True)
