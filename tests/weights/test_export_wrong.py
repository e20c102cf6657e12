"""What cannot be exported is said, and nothing is written, nor written over."""

import json
import shutil

import pytest
import torch
from exports import SPECS, exported, metadata, written
from lora_files import small
from safetensors.torch import load_file, save_file

from model import SD15, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*not of Stable Diffusion 1.5's size")


@pytest.mark.parametrize(
    ("form", "left", "message"),
    [("kohya", "motion", "motion-lora or diffusers"), ("motion-lora", "appearance", "kohya or diffusers")],
)
def test_what_a_format_cannot_hold_is_said(run, tmp_path, form, left, message):
    out = tmp_path / "out.safetensors"
    with pytest.warns(UserWarning, match=f"{left} is left out.*{message}"):
        assert exported(run[0], form, out) == [out]
    with pytest.raises(UserError, match=f"{left} cannot be exported so.*{message}"):
        exported(run[0], form, tmp_path / "none.safetensors", adapter=left)
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize("factor", [1e6, 1e-8])
def test_what_half_precision_cannot_hold_is_not_written(run, tmp_path, factor):
    path = run[0] / "lora.safetensors"
    save_file({key: t * factor for key, t in load_file(path).items()}, path, metadata(path))
    for form in ("kohya", "own"):
        with pytest.raises(UserError, match=r"torch\.float16 cannot hold.*--dtype"):
            exported(run[0], form, tmp_path / "a.safetensors", dtype="float16", adapter="appearance")
        exported(run[0], form, tmp_path / "b.safetensors", dtype="bfloat16", adapter="appearance")
    assert not (tmp_path / "a.safetensors").exists()


def test_exports_replace_exports_and_nothing_dearer(run, tmp_path):
    folder, out = run[0], tmp_path / "a.safetensors"
    for form in ("kohya", "diffusers", "own"):
        exported(folder, form, out, adapter="appearance")
    with pytest.raises(UserError, match="is the LoRA that is to be exported"):
        exported(folder, "own", folder / "lora.safetensors")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="what a run has trained"):
        exported(folder, "own", tmp_path / "other" / "lora.safetensors")
    (tmp_path / "notes.safetensors").write_text("my notes")
    save_file({"first_stage_model.decoder.conv_in.weight": torch.ones(4, 4, 3, 3),
               "first_stage_model.quant_conv.weight": torch.ones(8)}, tmp_path / "vae.safetensors")  # fmt: skip
    (tmp_path / "folder.safetensors").mkdir()
    for name, what in (("notes", "not a model file"), ("vae", "but a VAE"), ("folder", "but a folder")):
        with pytest.raises(UserError, match=rf"{name}\.safetensors exists and is no LoRA.*{what}"):
            exported(folder, "own", tmp_path / f"{name}.safetensors")
    assert (tmp_path / "notes.safetensors").read_text() == "my notes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "kohya", "out": "a.ckpt"}, r"format kohya ends in \.safetensors"),
        ({"form": "motion-lora", "out": "a.bin"}, r"ends in \.ckpt or \.safetensors"),
        ({"form": "own", "out": "a"}, r"ends in \.safetensors"),
        ({"form": "own", "out": "a.safetensors", "adapter": "shape"}, "no adapter 'shape': it has appearance, motion"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is left out")
def test_wrong_settings_are_explained(run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        exported(run[0], **{**options, "out": tmp_path / options["out"]})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_adapters_of_a_kind_are_exported_one_by_one(tmp_path):
    spec = {**SPECS["appearance"], "layers": (2,)}
    written(small(SD15), tmp_path / "two.safetensors", one=spec, two=spec)
    with pytest.raises(UserError, match=r"several adapters of a kind.*--adapter, of one, two"):
        exported(tmp_path / "two.safetensors", "kohya", tmp_path / "a.safetensors")
    assert exported(tmp_path / "two.safetensors", "kohya", tmp_path / "a.safetensors", adapter="two")


def test_other_tools_files_are_no_source(run, tmp_path):
    exported(run[0], "kohya", tmp_path / "a.safetensors", adapter="appearance")
    with pytest.raises(UserError, match="a LoRA that customttt trained is wanted"):
        exported(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")


KEY = "motion.down_blocks.2.motion_modules.0.transformer_blocks.0.attn1.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "entry", "message"),
    [
        (lambda t: t.pop(KEY), {}, f"it has no {KEY}"),
        (lambda t: t.update({KEY: t[KEY][:2]}), {}, r"\(2, 32\), of rank 3"),
        (lambda t: t[KEY].fill_(float("nan")), {}, "not finite"),
        (lambda t: t.update({"motion.conv_in.lora_A.weight": torch.ones(3, 4)}), {}, "conv_in.* no part"),
        (lambda t: t.update({"stranger": torch.ones(3, 4)}), {}, "stranger is no part"),
        (lambda t: None, {"layers": [2, 9]}, "no adapter is as its header says 'motion' is"),
        (lambda t: None, {"layers": []}, "no adapter is as"),
        (lambda t: None, {"kind": "sideways"}, "no adapter is as"),
        (lambda t: None, {"targets": "some"}, "no adapter is as"),
        (lambda t: None, {"rank": 4}, "of rank 4"),
        (lambda t: None, {"targets": "blocks"}, "proj_in.*is no part of what its header describes"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is left out")
def test_damaged_files_are_refused(run, tmp_path, tensors, entry, message):
    path = run[0] / "lora.safetensors"
    held, header = load_file(path), json.loads(metadata(path)["customttt"])
    tensors(held)
    header["adapters"]["motion"] |= entry
    save_file({k: t.contiguous() for k, t in held.items()}, path, {"customttt": json.dumps(header)})
    with pytest.raises(UserError, match=message):
        exported(run[0], "own", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
