"""The tables against the published files' names, diffusers' converters, and our own modules."""

import re

import pytest
import torch
from base_tensors import entries, manifest
from bases import OLD_VAE_NAMES
from oracles import diffusers_name

from model import SD15, SD15_V1, SD15_V2, SD15_V3, AutoencoderKL, TextConfig, TextEncoder, UNet3D, VAEConfig
from weights import keymaps
from weights.keymaps import (
    ANIMATEDIFF,
    IGNORED_IN_BASE,
    IGNORED_IN_MOTION,
    IGNORED_IN_TEXT,
    IGNORED_IN_VAE,
    MOTION_ADAPTER,
    MOTIONS,
    TEXTS,
    UNET_DIFFUSERS,
    UNET_LDM,
    UNETS,
    VAE_DIFFUSERS,
    VAE_DIFFUSERS_OLD,
    VAE_LDM,
    VAES,
    Layout,
    best_layout,
    why_ignored,
)

LAYOUTS = (*UNETS, *MOTIONS, *VAES, *TEXTS)


@pytest.fixture(scope="module")
def full():
    """The state dicts of full-width modules, on the meta device."""
    with torch.device("meta"):
        modules = {
            "unet": UNet3D(SD15),
            "v1": UNet3D(SD15_V1),
            "v2": UNet3D(SD15_V2),
            "v3": UNet3D(SD15_V3),
            "vae": AutoencoderKL(VAEConfig()),
            "text": TextEncoder(TextConfig()).clip,
        }
    states = {name: module.state_dict() for name, module in modules.items()}
    for version in ("v1", "v2", "v3"):
        states[version] = {name: tensor for name, tensor in states[version].items() if ".temporal." in name}
    return states


FILES = [
    ("sd15_diffusers_unet", ["unet"], {}),
    ("sd15_diffusers_vae", ["vae"], IGNORED_IN_VAE),
    ("sd15_diffusers_text", ["text"], IGNORED_IN_TEXT),
    ("sd15_ldm_single_file", ["unet", "vae", "text"], IGNORED_IN_BASE),
    ("animatediff_v1_motion_module", ["v1"], IGNORED_IN_MOTION),
    ("animatediff_v2_motion_module", ["v2"], IGNORED_IN_MOTION),
    ("animatediff_v3_motion_module", ["v3"], IGNORED_IN_MOTION),
    ("animatediff_diffusers_motion_adapter", ["v3"], IGNORED_IN_MOTION),
]
LAYOUTS_OF = {"unet": UNETS, "vae": VAES, "text": TEXTS, "v1": MOTIONS, "v2": MOTIONS, "v3": MOTIONS}


@pytest.mark.parametrize(("file", "networks", "ignored"), FILES)
def test_every_key_is_mapped_or_ignored_for_a_reason_and_nothing_is_missing(full, file, networks, ignored):
    keys = manifest(file)
    left = set(keys)
    for network in networks:
        layout = best_layout(keys, LAYOUTS_OF[network])
        ours = {name: keys[key] for key in keys if (name := layout.to_ours(key)) is not None}
        squeezed = {n: s[: full[network][n].ndim] if set(s[2:]) == {1} else s for n, s in ours.items()}
        assert squeezed == {name: tuple(tensor.shape) for name, tensor in full[network].items()}
        mapped = {key for key in keys if layout.to_ours(key) is not None}
        assert mapped <= left
        assert not [key for key in mapped if why_ignored(key, ignored)]
        left -= mapped
    assert all(why_ignored(key, ignored) for key in left)


@pytest.mark.parametrize(("file", "networks", "ignored"), FILES)
def test_writing_gives_the_published_names_and_shapes(full, file, networks, ignored):
    keys = manifest(file)
    written = {}
    for network in networks:
        written |= best_layout(keys, LAYOUTS_OF[network]).write(full[network])
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == {
        key: shape for key, shape in keys.items() if not why_ignored(key, ignored)
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.prefix}{layout.name}")
def test_no_head_is_the_head_of_another_so_that_tables_read_both_ways(layout):
    for heads in (list(layout.heads), list(layout.heads.values())):
        assert len(set(heads)) == len(heads)
        assert not [(a, b) for a in heads for b in heads if b.startswith(f"{a}.")]


@pytest.mark.parametrize(("file", "networks", "ignored"), FILES)
def test_keys_come_back_from_our_names(file, networks, ignored):
    for network in networks:
        layout = best_layout(manifest(file), LAYOUTS_OF[network])
        ours = {key: layout.to_ours(key) for key in manifest(file) if layout.to_ours(key) is not None}
        assert {key: layout.from_ours(name) for key, name in ours.items()} == {key: key for key in ours}


@pytest.mark.parametrize(("file", "networks", "ignored"), FILES)
def test_names_agree_with_diffusers_converters(file, networks, ignored):
    """`entries` sent each key through diffusers' own converter."""
    layouts = {network: best_layout(manifest(file), LAYOUTS_OF[network]) for network in networks}
    if "animatediff" in file:
        layouts = {"motion": layouts[networks[0]]}
    agreed = 0
    for entry in entries(file, "full"):
        network, _, theirs = entry.name.partition(".")
        if network == "constant" or theirs.endswith(".pe"):
            continue
        ours = layouts[network].to_ours(entry.key)
        assert (diffusers_name(ours) if network in ("unet", "motion") else ours) == theirs
        agreed += 1
    assert agreed >= 196


def test_old_vae_names_are_read_and_written(full):
    keys = {name: name for name in full["vae"]}
    for new, old in OLD_VAE_NAMES.items():
        keys = {re.sub(rf"attentions\.0\.{re.escape(new)}\.", f"attentions.0.{old}.", k): n for k, n in keys.items()}
    assert best_layout(keys, VAES) == VAE_DIFFUSERS_OLD
    assert {key: VAE_DIFFUSERS_OLD.to_ours(key) for key in keys} == keys
    assert set(VAE_DIFFUSERS_OLD.write(full["vae"])) == set(keys)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("layout", [VAE_DIFFUSERS, VAE_DIFFUSERS_OLD, VAE_LDM], ids=lambda layout: layout.name)
def test_a_vae_is_recognised_under_every_prefix(full, layout, prefix):
    keys = [prefix + key.removeprefix(layout.prefix) for key in layout.write(full["vae"])]
    found = best_layout(keys, VAES)
    assert (found.name, found.prefix) == (layout.name, prefix)
    assert {found.to_ours(key) for key in keys} == set(full["vae"])


@pytest.mark.parametrize(
    "prefix", ["", "text_model.", "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."]
)
def test_a_text_encoder_is_recognised_under_every_prefix(full, prefix):
    keys = [prefix + name for name in full["text"]]
    found = best_layout([*keys, prefix + "embeddings.position_ids"], TEXTS)
    assert {key: found.to_ours(key) for key in keys} == dict(zip(keys, full["text"], strict=True))
    assert found.to_ours(prefix + "embeddings.position_ids") is None


def test_heads_are_whole_segments():
    ldm = "model.diffusion_model."
    assert UNET_LDM.to_ours(ldm + "input_blocks.1.0.in_layers.0.weight") == "layers.0.resnets.0.norm1.weight"
    assert UNET_LDM.to_ours(ldm + "input_blocks.10.0.in_layers.0.weight") == "layers.3.resnets.0.norm1.weight"
    assert UNET_LDM.to_ours(ldm + "output_blocks.2.1.conv.weight") == "layers.5.upsampler.conv.weight"
    assert UNET_LDM.to_ours(ldm + "output_blocks.5.2.conv.weight") == "layers.6.upsampler.conv.weight"
    assert UNET_LDM.to_ours(ldm + "input_blocks.12.0.in_layers.0.weight") is None
    assert UNET_LDM.to_ours("input_blocks.1.0.in_layers.0.weight") is None
    assert UNET_DIFFUSERS.to_ours("down_blocks.10.resnets.0.conv1.weight") is None
    assert UNET_DIFFUSERS.from_ours("layers.9.resnets.0.conv1.weight") is None
    assert VAE_LDM.to_ours("first_stage_model.decoder.up.3.block.0.conv1.bias") == (
        "decoder.up_blocks.0.resnets.0.conv1.bias"
    )


def test_module_names_are_renamed_like_tensors():
    ours = "layers.2.temporal.1.transformer_blocks.0.attn2.to_out.0"
    assert UNET_DIFFUSERS.from_ours(ours) == "down_blocks.2.motion_modules.1.transformer_blocks.0.attn2.to_out.0"
    assert ANIMATEDIFF.from_ours(ours) == (
        "down_blocks.2.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_out.0"
    )
    assert MOTION_ADAPTER.to_ours("up_blocks.0.motion_modules.3.norm.weight") is None  # layers have three at most


def test_convolutions_are_restored_where_the_file_has_them():
    name = "layers.6.spatial.2.proj_out.weight"
    for layout in (UNET_DIFFUSERS, UNET_LDM):
        (written,) = layout.write({name: torch.ones(3, 2)}).values()
        assert written.shape == (3, 2, 1, 1)
    temporal = "layers.6.temporal.2.proj_out.weight"
    (key, written), *rest = ANIMATEDIFF.write({temporal: torch.ones(3, 2), name: torch.ones(3, 2)}).items()
    assert key == "up_blocks.1.motion_modules.2.temporal_transformer.proj_out.weight"
    assert written.shape == (3, 2)
    assert not rest
    key = "decoder.mid_block.attentions.0.to_out.0.weight"
    assert VAE_LDM.write({key: torch.ones(3, 2)})["first_stage_model.decoder.mid.attn_1.proj_out.weight"].ndim == 4
    assert VAE_DIFFUSERS.write({key: torch.ones(3, 2)})[key].ndim == 2


@pytest.mark.parametrize(
    ("key", "ignored"),
    [
        ("model_ema.diffusion_modelinput_blocks00weight", IGNORED_IN_BASE),
        ("model_ema.num_updates", IGNORED_IN_BASE),
        ("sqrt_recipm1_alphas_cumprod", IGNORED_IN_BASE),
        ("log_one_minus_alphas_cumprod", IGNORED_IN_BASE),
        ("posterior_log_variance_clipped", IGNORED_IN_BASE),
        ("cond_stage_model.transformer.embeddings.position_ids", IGNORED_IN_BASE),
        ("cond_stage_model.transformer.text_projection.weight", IGNORED_IN_BASE),
        ("text_projection.weight", IGNORED_IN_TEXT),
        ("loss.discriminator.main.0.weight", IGNORED_IN_VAE),
        ("first_stage_model.loss.logvar", IGNORED_IN_BASE),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", IGNORED_IN_MOTION),
        ("conv_in.weight", IGNORED_IN_MOTION),
    ],
)
def test_known_extras_have_a_reason(key, ignored):
    assert why_ignored(key, ignored)


@pytest.mark.parametrize(
    ("key", "ignored"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", IGNORED_IN_BASE),
        ("control_model.input_blocks.0.0.weight", IGNORED_IN_BASE),
        ("model.diffusion_model.betas", IGNORED_IN_BASE),
        ("img_encoder.conv_in.weight", IGNORED_IN_MOTION),
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", IGNORED_IN_MOTION),
        ("down_blocks.0.motion_modules.9.temporal_transformer.norm.weight", IGNORED_IN_MOTION),
        ("down_blocks.0.motion_modules.0.temporal_transformer.proj_in.lora.weight", IGNORED_IN_MOTION),
    ],
)
def test_nothing_else_is_ignored(key, ignored):
    assert why_ignored(key, ignored) is None


def test_every_layout_has_a_name_for_messages():
    found = [layout for layout in vars(keymaps).values() if isinstance(layout, Layout)]
    assert len({layout.name for layout in found}) == len(found) == 8
