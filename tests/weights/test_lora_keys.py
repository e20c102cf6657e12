"""Every key of every kind of LoRA file means the layer it should, at full size: by manifests, rules and converters."""

import re
from collections import Counter

import base_tensors
import lora_files as files
import pytest
import torch
from oracles import diffusers_name

from lora import LowRank
from model import SD15_V2, SD15_V3, TextConfig, TextEncoder, UNet3D
from weights.lora_keys import read_key, spellings


@pytest.fixture(scope="module")
def networks():
    with torch.device("meta"):
        return UNet3D(SD15_V2), TextEncoder(TextConfig()).clip


@pytest.fixture(scope="module")
def names(networks):
    return spellings(*networks)


def meant(names, key):
    read = read_key(key)
    assert read is not None, key
    return (*names[read.layer], read.role)


def rank_4(network, pattern):
    """Updates on the meta device: their shapes are all that counts here."""
    found = {}
    for name, layer in files.targets(network, pattern).items():
        out, *inner = layer.weight.shape
        down, up = (4, *inner), (out, 4, *[1] * (len(inner) - 1))
        found[name] = LowRank(torch.empty(down, device="meta"), torch.empty(up, device="meta"), 4.0)
    return found


def written_by(write, weights):
    """{key: (layer, role)} of a writer's file: which tensor went where is told by the number in it."""
    tagged = {
        name: LowRank(torch.full((1, 1), 2.0 * i), torch.full((1, 1), 2.0 * i + 1), 1.0)
        for i, name in enumerate(weights)
    }
    numbers = {key: int(tensor.item()) for key, tensor in write(tagged).items() if not key.endswith(".alpha")}
    return {key: (list(tagged)[number // 2], ("down", "up")[number % 2]) for key, number in numbers.items()}


@pytest.mark.parametrize(
    ("file", "write", "pattern"),
    [
        ("animatediff_v2_motion_lora", files.motion_lora, files.TEMPORAL + files.ATTENTION),
        ("animatediff_v3_domain_adapter", files.attention_processors, files.SPATIAL + files.ATTENTION),
    ],
)
def test_every_key_of_the_published_files_means_its_layer(networks, names, file, write, pattern):
    unet, _ = networks
    shapes = base_tensors.manifest(file)
    expected = written_by(write, files.targets(unet, pattern))
    assert expected.keys() == shapes.keys()
    assert len(expected) == {"animatediff_v2_motion_lora": 336, "animatediff_v3_domain_adapter": 256}[file]
    for key, (layer, role) in expected.items():
        assert meant(names, key) == ("unet", layer, role), key
        out, inner = unet.get_submodule(layer).weight.shape
        rank = 64 if "motion" in file else 128
        assert shapes[key] == ((rank, inner) if role == "down" else (out, rank)), key


WRITERS = {
    "kohya": (files.kohya, ".*", 192),
    "attention processors, with their network": (
        lambda w: files.attention_processors(w, "unet."), files.SPATIAL + files.ATTENTION, 128),
    "MotionDirector, temporal": (files.motion_director_temporal, files.TEMPORAL + files.BLOCK, 210),
    "MotionDirector, spatial": (files.motion_director_spatial, files.SPATIAL + ".*", 176),
    "MotionDirector, temporal in plain names": (
        lambda w: files.dotted(w, "", ".lora_down.weight", ".lora_up.weight", files.animatediff_name),
        files.TEMPORAL + files.BLOCK, 210),
    "diffusers, intermediate": (
        lambda w: files.dotted(w, "unet.", ".lora.down.weight", ".lora.up.weight"), files.SPATIAL + ".*", 192),
    "diffusers, current": (lambda w: files.dotted(w, "unet."), ".*", 400),
    "PEFT": (lambda w: files.dotted(w, "base_model.model."), ".*", 400),
    "PEFT, in memory": (
        lambda w: files.dotted(w, "base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"), ".*", 400),
    "PEFT, saved by a parallel training": (lambda w: files.dotted(w, "module.unet."), ".*", 400),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_every_layer_is_found_under_every_tools_name(networks, names, kind):
    write, pattern, least = WRITERS[kind]
    expected = written_by(write, files.targets(networks[0], pattern))
    assert len(expected) >= 2 * least
    assert {key: meant(names, key) for key in expected} == {k: ("unet", *place) for k, place in expected.items()}


def test_motion_director_names_what_the_fact_sheet_says(networks):
    temporal = files.motion_director_temporal(rank_4(networks[0], files.TEMPORAL + files.BLOCK))
    inside = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0."
    assert {
        inside + "attention_blocks.0.processor.to_q_lora.down.weight",
        inside + "attention_blocks.0.to_out.processor.0_lora.down.weight",
        inside + "ff.net.0.processor.proj_lora.down.weight",
        inside + "ff.net.processor.2_lora.down.weight",
    } <= temporal.keys()
    spatial = files.motion_director_spatial(rank_4(networks[0], files.SPATIAL + ".*"))
    assert {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
        "down_blocks.0.attentions.0.proj_in_lora.down.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj_lora.up.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2_lora.down.weight",
    } <= spatial.keys()


def test_ldm_names_mean_what_diffusers_converter_says(networks, names):
    ours = {diffusers_name(name): name for name in files.targets(networks[0], ".*")}
    seen = 0
    for key, name, _ in base_tensors.entries("sd15_ldm_single_file", "full"):
        theirs, module = key.removesuffix(".weight"), name.removeprefix("unet.").removesuffix(".weight")
        if not key.startswith("model.diffusion_model.") or key == theirs or module not in ours:
            continue
        seen += 1
        assert meant(names, f"{theirs}.lora_A.weight") == ("unet", ours[module], "down")
        underscored = theirs.removeprefix("model.diffusion_model.").replace(".", "_")
        assert meant(names, f"lora_unet_{underscored}.lora_up.weight") == ("unet", ours[module], "up")
    assert seen == len(files.targets(networks[0], r"(?!.*temporal).*"))


TEXT_KEYS = {
    "lora_te_text_model_encoder_layers_3_self_attn_q_proj.lora_down.weight": "self_attn.q_proj",
    "lora_te1_text_model_encoder_layers_3_mlp_fc2.lora_down.weight": "mlp.fc2",
    "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.down.weight": "self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.3.self_attn.k_proj.lora_linear_layer.down.weight": "self_attn.k_proj",
    "text_encoder.text_model.encoder.layers.3.self_attn.v_proj.lora_A.weight": "self_attn.v_proj",
    "text_encoder.encoder.layers.3.mlp.fc1.lora_A.weight": "mlp.fc1",
    "base_model.model.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight": "self_attn.q_proj",
}


@pytest.mark.parametrize(("key", "end"), TEXT_KEYS.items())
def test_the_text_encoders_layers_are_known_in_all_generations(names, key, end):
    assert meant(names, key) == ("text", f"encoder.layers.3.{end}", "down")


def test_alpha_belongs_to_its_layer(names):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    assert meant(names, f"{stem}.alpha") == ("unet", "layers.4.spatial.0.proj_in", "alpha")


def test_no_name_means_two_layers(networks, names):
    """Underscores could make two dotted names one; `spellings` would keep the last."""
    unet, text = networks
    counts = Counter(place for place in names.values())
    parts = Counter(part for part, _ in counts)
    assert parts == {"unet": len(files.targets(unet, ".*")), "text": len(files.targets(text, ".*"))}
    for pattern, times in ((r"layers\.2\.spatial\.\d\.proj_in", 4), (r"layers\.2\.spatial\..*attn1\.to_out\.0", 8)):
        for layer in files.targets(unet, pattern):
            assert counts["unet", layer] == times, layer
    for layer in files.targets(unet, files.TEMPORAL + r"transformer_blocks\.0\.attn1\.to_out\.0"):
        assert counts["unet", layer] == 8, layer


def test_what_is_no_key_of_a_lora_is_none():
    for key in ("conv_in.weight", "down_blocks.0.attentions.0.proj_in.weight", "lora", "x.lora_A.bias", "a.alphas"):
        assert read_key(key) is None, key
    with torch.device("meta"):
        v3 = UNet3D(SD15_V3)
    assert not any(re.match(r"layers\.4\.temporal", layer) for _, layer in spellings(v3).values())
