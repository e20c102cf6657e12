"""What a config.json may say, and what follows from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import tensors, write_base, write_motion_adapter

from model import SD15, MotionConfig, TextConfig, UserError, VAEConfig
from weights.configs import motion_config, text_config, unet_config, vae_config
from weights.keymaps import MOTION_ADAPTER, TEXT, UNET_DIFFUSERS, VAE_DIFFUSERS
from weights.parts import Part, take

NARROW = replace(SD15, block_out_channels=(32, 64, 96, 96), cross_attention_dim=128)


@pytest.fixture(scope="module")
def read():
    """The networks of a narrow base, as read."""
    files = {
        "unet": ("sd15_diffusers_unet", UNET_DIFFUSERS),
        "vae": ("sd15_diffusers_vae", VAE_DIFFUSERS),
        "motion": ("animatediff_diffusers_motion_adapter", MOTION_ADAPTER),
    }
    found = {name: take(Path("folder"), tensors(file), [layout]) for name, (file, layout) in files.items()}
    text = {key.removeprefix("text_model."): tensor for key, tensor in tensors("sd15_diffusers_text").items()}
    return found | {"text": take(Path("folder"), text, [TEXT])}


@pytest.fixture
def parts(read):
    """The same, with no config.json yet."""
    return {name: replace(part, config={}) for name, part in read.items()}


def test_sizes_come_from_the_tensors(parts):
    assert unet_config(parts["unet"], None) == NARROW
    assert vae_config(parts["vae"]) == VAEConfig(block_out_channels=(32, 64, 96, 96))
    assert text_config(parts["text"]) == TextConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2
    )


def test_attention_head_dim_is_the_number_of_heads(parts):
    parts["unet"].config = {"attention_head_dim": 4, "norm_num_groups": 16}
    assert unet_config(parts["unet"], None) == replace(NARROW, num_attention_heads=4, norm_num_groups=16)
    parts["unet"].config = {"attention_head_dim": [4, 4, 4, 4], "num_attention_heads": None}
    assert unet_config(parts["unet"], None).num_attention_heads == 4
    parts["unet"].config = {"attention_head_dim": 64, "num_attention_heads": 2}
    assert unet_config(parts["unet"], None).num_attention_heads == 2


def test_the_scaling_factor_is_the_files_or_stable_diffusions(parts):
    assert vae_config(parts["vae"]).scaling_factor == 0.18215
    parts["vae"].config = {"scaling_factor": 0.5, "norm_num_groups": 8}
    assert vae_config(parts["vae"]) == VAEConfig(
        block_out_channels=(32, 64, 96, 96), scaling_factor=0.5, norm_num_groups=8
    )


@pytest.mark.parametrize(("frames", "pooled"), [(24, True), (32, False), (48, False)])
def test_an_adapters_length_tells_v1(parts, frames, pooled):
    parts["motion"].config = {"motion_max_seq_length": frames, "motion_norm_num_groups": 16}
    assert motion_config(parts["motion"]) == MotionConfig(max_frames=frames, pool_norms=pooled, norm_num_groups=16)


@pytest.mark.parametrize(
    ("network", "config", "says"),
    [
        ("unet", {"attention_head_dim": [5, 10, 20, 20]}, r"attention_head_dim = \[5, 10, 20, 20\]"),
        ("unet", {"attention_head_dim": 5}, r"attention_head_dim = 5, .* divides 32, 64, 96"),
        ("unet", {"attention_head_dim": "8"}, "attention_head_dim = '8'"),
        ("unet", {"norm_num_groups": -1}, "norm_num_groups = -1"),
        ("unet", {"act_fn": "gelu", "freq_shift": 1}, r"act_fn = 'gelu', freq_shift = 1 \(here: 'silu', 0\)"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("vae", {"norm_num_groups": 7}, "norm_num_groups = 7"),
        ("vae", {"scaling_factor": None}, "scaling_factor = None"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor = nan"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv = False"),
        ("text", {"num_attention_heads": 3}, "num_attention_heads = 3"),
        ("text", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("motion", {"motion_num_attention_heads": 0, "motion_max_seq_length": 32}, "motion_num_attention_heads = 0"),
        ("motion", {"motion_max_seq_length": "many"}, "motion_max_seq_length = 'many'"),
        ("motion", {"motion_layers_per_block": 3}, "motion_layers_per_block = 3"),
    ],
)
def test_what_these_networks_cannot_do_is_refused(parts, network, config, says):
    parts[network].config = config
    told = {"unet": lambda p: unet_config(p, None), "vae": vae_config, "text": text_config, "motion": motion_config}
    with pytest.raises(UserError, match=says):
        told[network](parts[network])


def test_a_lost_last_layer_of_clip_is_not_taken_for_a_shorter_clip(tmp_path):
    names = [f"encoder.layers.{i}.mlp.fc1.weight" for i in range(11)]
    found = {"embeddings.token_embedding.weight": (49408, 768)} | dict.fromkeys(names, (3072, 768))
    part = Part(tmp_path, TEXT, {name: torch.zeros(()).expand(shape) for name, shape in found.items()})
    assert text_config(part) == TextConfig()


def test_the_files_that_bases_writes_say_the_same_as_their_shapes(parts, tmp_path):
    base = write_base(tmp_path / "base")
    for network, folder in (("unet", "unet"), ("vae", "vae"), ("text", "text_encoder")):
        parts[network].config = json.loads((base / folder / "config.json").read_text())
    test_sizes_come_from_the_tensors(parts)
    adapter = write_motion_adapter(tmp_path / "adapter")
    parts["motion"].config = json.loads((adapter / "config.json").read_text())
    assert motion_config(parts["motion"]) == MotionConfig()
