"""Files that do not fit, lie in the wrong place, or are not all there: each is told apart, in words that help."""

import json
from pathlib import Path

import pytest
import torch
from base_tensors import hollow, manifest
from bases import (
    tensors,
    write_base,
    write_motion_adapter,
    write_tokenizer,
    write_vae,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import weights.load
from model import UserError
from weights.load import load_base

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("ldm"), "ldm")


@pytest.fixture
def folder(tmp_path):
    return write_base(tmp_path / "sd15")


def change(file: Path, alter) -> None:
    found = load_file(file)
    alter(found)
    save_file(found, file, metadata={"format": "pt"})


def test_missing_left_over_and_reshaped_tensors_are_all_listed_in_the_files_own_names(folder):
    def alter(found):
        del found["mid_block.resnets.0.norm1.weight"]
        found["mid_block.resnets.2.norm1.weight"] = torch.ones(96)
        found["something.else"] = torch.ones(1)
        found["conv_out.bias"] = torch.ones(5)

    change(folder / UNET, alter)
    with pytest.raises(UserError) as told:
        load_base(folder)
    message = str(told.value)
    assert message.startswith(f"{folder / 'unet'} does not fit its network")
    assert "1 tensor is missing (mid_block.resnets.0.norm1.weight)" in message
    assert "2 tensors are left over (something.else, mid_block.resnets.2.norm1.weight)" in message
    assert "1 tensor is of another shape (conv_out.bias: (5,) for (4,))" in message
    assert "looks like a diffusers UNet" in message


def test_long_lists_are_abbreviated_with_their_count(tmp_path):
    found = tensors("sd15_ldm_single_file")
    torch.save({key: t for key, t in found.items() if ".output_blocks." not in key}, tmp_path / "cut.ckpt")
    with pytest.raises(
        UserError, match=r"\d{3} tensors are missing \(model\.diffusion_model\.output_.*, \.\.\.\)"
    ) as told:
        load_base(tmp_path / "cut.ckpt")
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize(
    ("network", "key"),
    [
        ("unet", "model.diffusion_model.out.2.weight"),
        ("vae", "first_stage_model.decoder.mid.attn_1.q.bias"),
        ("text", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
    ],
)
def test_one_missing_tensor_of_a_one_file_base_is_named(tmp_path, network, key):
    found = tensors("sd15_ldm_single_file")
    del found[key]
    torch.save(found, tmp_path / "base.ckpt")
    with pytest.raises(UserError, match=rf"1 tensor is missing \({key}\)"):
        load_base(tmp_path / "base.ckpt")


def test_a_stranger_among_the_keys_of_a_one_file_base_is_named(tmp_path):
    torch.save(tensors("sd15_ldm_single_file") | {"control_model.x": torch.ones(1)}, tmp_path / "base.ckpt")
    with pytest.raises(UserError, match=r"1 tensor is left over \(control_model\.x\)"):
        load_base(tmp_path / "base.ckpt")


def test_a_motion_module_that_lacks_a_layer_is_refused(one_file, tmp_path):
    found = tensors("animatediff_v3_motion_module")
    torch.save({key: t for key, t in found.items() if "up_blocks.2." not in key}, tmp_path / "mm.ckpt")
    with pytest.raises(UserError, match=r"78 tensors are missing \(up_blocks\.2\.motion_modules\.0\.temporal"):
        load_base(one_file, tmp_path / "mm.ckpt")


def test_a_module_for_another_width_is_refused(one_file, tmp_path):
    full = hollow(
        tmp_path / "full.ckpt",
        {key: shape for key, shape in manifest("animatediff_v3_motion_module").items() if not key.endswith(".pe")},
    )
    with (
        pytest.warns(UserWarning, match="taken for v3"),
        pytest.raises(UserError, match=r"520 tensors are of another shape .*\(320,\) for \(32,\)"),
    ):
        load_base(one_file, full)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(folder, bad):
    change(folder / UNET, lambda found: found["conv_in.weight"].view(-1).__setitem__(3, bad))
    with pytest.raises(UserError, match=r"is damaged: conv_in\.weight holds numbers that are not finite"):
        load_base(folder)


def test_weights_too_large_for_float16_are_no_damage(folder):
    change(folder / UNET, lambda found: found["conv_in.weight"].mul_(1e6))
    assert load_base(folder, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"conv_in\.weight has numbers too large for torch\.float16"):
        load_base(folder, dtype=torch.float16)


def sd2() -> dict[str, tuple[int, ...]]:
    shapes = {k: s for k, s in manifest("sd15_ldm_single_file").items() if not k.startswith("cond_stage_model.")}
    wide = {k: (s[0], 1024) for k, s in shapes.items() if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    return shapes | wide | {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": (3072, 1024)}


def sdxl() -> dict[str, tuple[int, ...]]:
    shapes = {k: s for k, s in manifest("sd15_ldm_single_file").items() if "diffusion_model" in k}
    return shapes | {"conditioner.embedders.1.model.text_projection": (1280, 1280)}


def inpainting() -> dict[str, tuple[int, ...]]:
    shapes = manifest("sd15_ldm_single_file")
    return shapes | {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (sd2, "Stable Diffusion 2"),
        (sdxl, "SDXL"),
        (inpainting, "inpainting"),
        (lambda: manifest("animatediff_v2_motion_lora"), "motion LoRA"),
        (lambda: manifest("animatediff_v3_domain_adapter"), "LoRA"),
        (lambda: manifest("animatediff_v3_motion_module"), "--motion_module"),
        (lambda: manifest("sd15_diffusers_vae"), "--vae"),
        (lambda: manifest("sd15_diffusers_unet"), "UNet"),
        (lambda: {"a": (1,), "b.c": (2, 3)}, "fit nothing known"),
    ],
)
def test_what_is_no_base_is_told_what_it_is(tmp_path, shapes, says):
    file = hollow(tmp_path / "wrong.ckpt", shapes())
    with pytest.raises(UserError, match=r"wrong\.ckpt was given as the base") as told:
        load_base(file)
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("animatediff_v2_motion_lora", "a base motion module"),
        ("animatediff_v3_domain_adapter", "LoRA"),
        ("sd15_ldm_single_file", "--base"),
        ("sd15_diffusers_unet", "--base"),
    ],
)
def test_what_is_no_motion_module_is_told_what_it_is(one_file, tmp_path, file, says):
    wrong = hollow(tmp_path / "wrong.ckpt", manifest(file))
    with pytest.raises(UserError, match=r"wrong\.ckpt was given as the motion module") as told:
        load_base(one_file, wrong)
    assert says in str(told.value)


def test_a_motion_module_for_sdxl_is_told_from_ours(one_file, tmp_path):
    three_levels = {k: s for k, s in manifest("animatediff_v3_motion_module").items() if "_blocks.3." not in k}
    with pytest.raises(UserError, match=r"sdxl\.ckpt was given as the motion module.*SDXL"):
        load_base(one_file, hollow(tmp_path / "sdxl.ckpt", three_levels))


def test_folders_in_the_wrong_place_are_told_what_they_are(one_file, tmp_path):
    adapter = write_motion_adapter(tmp_path / "adapter")
    vae = write_vae(tmp_path / "vae")
    with pytest.raises(UserError, match=r"adapter was given as the base.*MotionAdapter.*--motion_module"):
        load_base(adapter)
    with pytest.raises(UserError, match=r"vae was given as the motion module.*VAE"):
        load_base(one_file, vae)
    with pytest.raises(UserError, match=r"adapter was given as the VAE.*MotionAdapter"):
        load_base(one_file, vae=adapter)
    with pytest.raises(UserError, match=r"was given as the base"):
        load_base(write_tokenizer(tmp_path / "tokenizer"))


def test_a_base_without_a_vae_asks_for_one(tmp_path):
    found = {key: t for key, t in tensors("sd15_ldm_single_file").items() if not key.startswith("first_stage")}
    torch.save(found, tmp_path / "base.ckpt")
    with pytest.raises(UserError, match=r"base\.ckpt has no VAE: name one with --vae"):
        load_base(tmp_path / "base.ckpt")
    assert load_base(tmp_path / "base.ckpt", vae=write_vae(tmp_path / "vae.safetensors"))


def test_a_folder_without_its_text_encoder_says_so(folder):
    (folder / "text_encoder").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="has no text encoder"):
        load_base(folder)


def test_networks_that_do_not_belong_together_are_refused(folder, tmp_path):
    full = {k: s for k, s in manifest("sd15_diffusers_text").items() if "position_ids" not in k}
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "config.json").unlink()
    hollow(folder / "text_encoder" / "pytorch_model.bin", full)
    with pytest.raises(UserError, match=r"wants text of width 128, and the text encoder gives 768"):
        load_base(folder)


def test_shards_that_are_not_there_are_named(tmp_path):
    base = write_base(tmp_path, sharded=True)
    (base / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"needs 2 files, of which diffusion_pytorch_model-00002-of-00002\.safetensors"):
        load_base(base)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}, "outside its folder"),
        ({"weight_map": {"conv_in.weight": "/etc/passwd"}}, "outside its folder"),
        ({"weight_map": ["a"]}, "no table `weight_map`"),
        ([], "no table `weight_map`"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, content, says):
    base = write_base(tmp_path, sharded=True)
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        load_base(base)


def test_paths_that_are_not_there_and_names_on_the_hub(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere\.safetensors does not exist"):
        load_base(tmp_path / "nowhere.safetensors")

    def cached(name, local_files_only):
        assert local_files_only
        if name != "somebody/sd15":
            raise LocalEntryNotFoundError("not cached")
        return str(folder)

    monkeypatch.setattr(weights.load, "snapshot_download", cached)
    assert load_base("somebody/sd15").name == "somebody/sd15"
    with pytest.raises(UserError, match=r"hf download somebody/else"):
        load_base("somebody/else")
