"""`customttt inspect` on files at full width: their headers are real, their data a hole in the disk."""

import json
import re

import pytest
import torch
from base_tensors import hollow, manifest
from PIL import Image
from safetensors.torch import save_file

from weights.inspect import describe, layer_of, main


def lines(path):
    """The description as a table of its lines; lines of the same name one after the other."""
    first, *rest = describe(path).splitlines()
    assert first == str(path)
    found: dict[str, list[str]] = {}
    for line in rest:
        name, value = re.fullmatch(r"  (\S+) +(.*)", line).groups()
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


@pytest.mark.parametrize(
    ("name", "kind", "parameters", "layers"),
    [
        ("animatediff_v1_motion_module", "motion module, v1, sd15", 417_137_600, "0 1 2 3 5 6 7 8"),
        ("animatediff_v2_motion_module", "motion module, v2, sd15", 453_209_280, "0 1 2 3 4 5 6 7 8"),
        ("animatediff_v3_motion_module", "motion module, v3, sd15", 417_137_600, "0 1 2 3 5 6 7 8"),
        ("animatediff_diffusers_motion_adapter", "motion adapter, v3, sd15", 417_137_600, "0 1 2 3 5 6 7 8"),
    ],
)
def test_a_motion_module_is_counted_without_its_tables(tmp_path, name, kind, parameters, layers):
    found = lines(hollow(tmp_path / "x", manifest(name), "F32"))
    assert found["kind"] == kind
    assert found["parameters"].startswith(f"{parameters:,} (and constants: ")
    assert found["temporal"] == f"layers {layers}"
    assert "spatial" not in found
    assert found["tensors"] == str(len(manifest(name)))


@pytest.mark.parametrize(
    ("name", "kind", "parameters"),
    [
        ("sd15_diffusers_unet", "UNet, sd15", 859_520_964),
        ("sd15_diffusers_vae", "VAE", 83_653_863),
        ("sd15_diffusers_text", "text encoder, sd15", 123_060_480),
        ("sd15_ldm_single_file", "one-file checkpoint, sd15", 859_520_964 + 83_653_863 + 123_060_480),
    ],
)
def test_a_stable_diffusion_file_is_counted_to_the_unit(tmp_path, name, kind, parameters):
    found = lines(hollow(tmp_path / "x", manifest(name)))
    assert found["kind"] == kind
    assert found["parameters"].split(" ")[0] == f"{parameters:,}"
    assert found["dtype"] == "float16"
    if "UNet" in kind or "one-file" in kind:
        assert found["spatial"] == "layers 0 1 2 4 6 7 8"
    else:
        assert "spatial" not in found


@pytest.mark.parametrize(
    ("name", "rank", "where", "layers"),
    [
        ("animatediff_v2_motion_lora", "64", "temporal", "layers 0 1 2 3 4 5 6 7 8"),
        ("animatediff_v3_domain_adapter", "128", "spatial", "layers 0 1 2 4 6 7 8"),
    ],
)
def test_a_lora_says_its_rank_and_its_layers(tmp_path, name, rank, where, layers):
    found = lines(hollow(tmp_path / "x", manifest(name)))
    assert (found["rank"], found[where]) == (rank, layers)


def test_the_motion_loras_parameters_are_those_of_the_readme(tmp_path):
    assert lines(hollow(tmp_path / "x", manifest("animatediff_v2_motion_lora")))["parameters"] == "19,333,120"


def test_a_kohya_lora_says_ranks_layers_and_what_its_header_tells(tmp_path):
    shapes = {
        "lora_unet_down_blocks_2_attentions_0_proj_in.lora_down.weight": (8, 1280, 1, 1),
        "lora_unet_down_blocks_2_attentions_0_proj_in.alpha": (),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.lora_down.weight": (4, 768),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 768),
    }
    found = lines(hollow(tmp_path / "x", shapes, ss_base_model_version="sd_v1", ss_tag_frequency="{}"))
    assert found["kind"] == "kohya LoRA, sd15"
    assert found["rank"] == "4 (3), 8 (1)"
    assert found["spatial"] == "layers 2 4"
    assert found["ss_base_model_version"] == "sd_v1"
    assert "ss_tag_frequency" not in found
    assert found["parameters"].endswith("(and constants: 1)")


def test_a_lora_of_our_own_lists_its_adapters(tmp_path):
    entry = {"kind": "spatial", "layers": [2, 6], "rank": 32, "alpha": 32.0, "targets": "blocks", "trigger": ""}
    header = {
        "version": 1,
        "base": {"name": "sd15.safetensors", "fingerprint": ""},
        "adapters": {
            "appearance": {**entry, "prompt": "a teddy bear"},
            "motion": {**entry, "kind": "temporal", "layers": [2, 5], "prompt": "a man"},
        },
        "settings": {},
    }
    tensors = {
        "appearance.down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(32, 8),
        "motion.up_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(32, 8),
    }
    (tmp_path / "run").mkdir()
    save_file(tensors, tmp_path / "run" / "lora.safetensors", {"customttt": json.dumps(header)})
    for path in (tmp_path / "run", tmp_path / "run" / "lora.safetensors"):
        found = lines(path)
        assert found["adapter"] == [
            "appearance: spatial, layers 2 6, rank 32, alpha 32.0, prompt 'a teddy bear'",
            "motion: temporal, layers 2 5, rank 32, alpha 32.0, prompt 'a man'",
        ]
        assert (found["spatial"], found["temporal"], found["base"]) == ("layers 2", "layers 5", "sd15.safetensors")


def test_a_diffusers_folder_has_a_line_for_each_network(tmp_path):
    hollow(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", manifest("sd15_diffusers_unet"))
    hollow(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", manifest("sd15_diffusers_vae"), "F32")
    hollow(tmp_path / "text_encoder" / "model.safetensors", manifest("sd15_diffusers_text"))
    (tmp_path / "unet" / "config.json").write_text('{"cross_attention_dim": 768}')
    found = lines(tmp_path)
    assert found["kind"] == "diffusers folder, sd15"
    assert found["unet"] == "686 tensors, 859,520,964 parameters, float16 (diffusion_pytorch_model.fp16.safetensors)"
    assert found["text_encoder"] == "197 tensors, 123,060,480 parameters, float16 (model.safetensors)"
    assert found["vae"] == "248 tensors, 83,653,863 parameters, float32 (diffusion_pytorch_model.safetensors)"


def test_the_layer_of_every_ldm_tensor_is_that_of_its_diffusers_twin():
    """The oracle is the block table of the LDM layout, written out: input blocks 1 to 11, output blocks 0 to 11."""
    table = {
        **{
            f"input_blocks.{i}": layer for i, layer in zip(range(1, 12), (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3), strict=True)
        },
        **{f"output_blocks.{i}": layer for i, layer in enumerate((5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8))},
        **{f"middle_block.{i}": 4 for i in range(3)},
        **{"input_blocks.0": None, "time_embed.0": None, "out.2": None},
    }
    for name, layer in table.items():
        assert layer_of(f"model.diffusion_model.{name}.0.weight") == layer, name
        assert layer_of(f"lora_unet_{name.replace('.', '_')}_0_attn1_to_q.lora_down.weight") == layer, name
    for index, name in enumerate(["down_blocks.0", "down_blocks.3", "mid_block", "up_blocks.0", "up_blocks.3"]):
        assert layer_of(f"{name}.resnets.1.conv1.weight") == (0, 3, 4, 5, 8)[index]
        assert layer_of(f"lora_unet_{name.replace('.', '_')}_attentions_1_proj_in.alpha") == (0, 3, 4, 5, 8)[index]


def test_text_from_a_file_cannot_move_the_terminals_cursor(tmp_path):
    path = hollow(tmp_path / "x", manifest("animatediff_v3_domain_adapter"), name="nice\x1b[2J\nkind  VAE" + "x" * 9999)
    assert "\x1b" not in describe(path)
    assert lines(path)["name"].startswith("nice [2J kind  VAE")
    assert len(lines(path)["name"]) < 500


def test_a_bad_file_does_not_hide_the_others(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "b.ckpt").write_bytes(b"<html>")
    assert main([str(tmp_path / name) for name in ("a.jpg", "b.ckpt", "a.jpg")]) == 2
    out, err = capsys.readouterr()
    assert out.count("image, JPEG") == 2
    assert out.count("\n\n") == 1
    assert err.startswith(f"error: {tmp_path / 'b.ckpt'} is a web page")
    assert main([str(tmp_path / "a.jpg")]) == 0


def test_a_damaged_header_of_our_own_is_an_error(tmp_path, capsys):
    for text in ("{", "[]", "{}", '{"adapters": {"a": {}}}'):
        save_file({"a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "x", {"customttt": text})
        assert main([str(tmp_path / "x")]) == 2
        assert "damaged header" in capsys.readouterr().err
