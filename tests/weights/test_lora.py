"""LoRA files of our own: what goes in comes out, and what does not fit is named."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from oracles import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora import adapter_modules, adapter_names, adapter_parameters, adapter_spec, add_adapter, remove_adapter
from model import SD15_V3, UNet3D, UserError
from weights import load_lora, lora_path, read_lora_header, save_lora, split_strength

PRINTS = {"unet": "abc", "motion_module": "def"}
NARROW = replace(SD15_V3, block_out_channels=(32, 32, 32, 32), cross_attention_dim=16)


@pytest.fixture
def unet():
    return randomise(UNet3D(NARROW)).requires_grad_(False)


@pytest.fixture
def file(unet, tmp_path):
    """A file with two adapters; the network is left without any. Returns its path and the weights that went in."""
    add_adapter(unet, "appearance", "spatial", (2, 6), rank=4, alpha=2)
    add_adapter(unet, "motion", "temporal", (2, 5), rank=3, targets="attention")
    weights = {}
    for name in adapter_names(unet):
        for p in adapter_parameters(unet, name):
            p.data.normal_()
        weights[name] = [p.detach().clone() for p in adapter_parameters(unet, name)]
    words = {"appearance": ("a teddy bear", "teddy"), "motion": ("a man is running", "")}
    save_lora(
        tmp_path / "l.safetensors",
        unet,
        words,
        base="sd15",
        fingerprints={"unet": "abc", "motion_module": "def"},
        settings={"steps": 5},
    )
    for name in words:
        remove_adapter(unet, name)
    return tmp_path / "l.safetensors", weights


def changed(path, tensors=None, header=None):
    """Rewrite a file with other tensors or another header."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    metadata = {"customttt": json.dumps(header(json.loads(metadata["customttt"])))} if header else metadata
    save_file(tensors(load_file(path)) if tensors else load_file(path), path, metadata=metadata)
    return path


def test_one_argument_puts_adapters_back_as_they_were(unet, file):
    path, weights = file
    entries = load_lora(unet, path)
    assert list(entries) == adapter_names(unet) == ["appearance", "motion"]
    for name, expected in weights.items():
        assert all(torch.equal(p, q) for p, q in zip(adapter_parameters(unet, name), expected, strict=True))
    spec = adapter_spec(unet, "motion")
    assert (spec.kind, spec.layers, spec.rank, spec.targets) == ("temporal", (2, 5), 3, "attention")
    assert adapter_spec(unet, "appearance").alpha == 2
    assert (entries["appearance"].prompt, entries["appearance"].trigger) == ("a teddy bear", "teddy")


def test_keys_are_diffusers_module_names(file):
    keys = load_file(file[0]).keys()
    assert "appearance.down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys
    assert "motion.up_blocks.0.motion_modules.2.transformer_blocks.0.attn2.to_out.0.lora_B.weight" in keys


def test_the_header_says_what_the_file_is(file):
    header = read_lora_header(file[0])
    assert (header.base, header.settings) == ("sd15", {"steps": 5})
    assert header.fingerprints == {"unet": "abc", "motion_module": "def"}


def test_taken_names_get_a_number_and_chosen_names_are_used(unet, file):
    load_lora(unet, file[0])
    assert list(load_lora(unet, file[0])) == ["appearance_2", "motion_2"]
    assert list(load_lora(unet, file[0], {"motion": "run"})) == ["run"]


def test_a_run_folder_stands_for_its_file(file, tmp_path):
    assert lora_path(file[0]) == file[0]
    with pytest.raises(UserError, match="no run folder"):
        lora_path(tmp_path)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        lora_path(tmp_path)
    file[0].rename(tmp_path / "lora.safetensors")
    assert lora_path(tmp_path) == tmp_path / "lora.safetensors"


def test_another_checkpoint_of_the_same_kind_gives_a_note_only(unet, file):
    with pytest.warns(UserWarning, match="appearance was trained on another checkpoint"):
        load_lora(unet, file[0], fingerprints={"unet": "xyz", "motion_module": "def"})
    with pytest.warns(UserWarning, match="motion was trained on another motion module"):
        load_lora(unet, file[0], fingerprints={"unet": "abc", "motion_module": "xyz"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora(unet, file[0], fingerprints={"unet": "abc", "motion_module": "def"})


def test_adapters_that_the_file_does_not_have_are_named(unet, file):
    with pytest.raises(UserError, match="no adapter 'run': it has appearance, motion"):
        load_lora(unet, file[0], {"run": "run"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(NARROW, block_out_channels=(32, 32, 64, 32)), "another architecture"),
        (replace(NARROW, motion=None), "motion_module"),
    ],
)
def test_another_architecture_is_refused_and_the_network_left_clean(file, config, message):
    unet = UNet3D(config)
    with pytest.raises(UserError, match=message):
        load_lora(unet, file[0])
    assert adapter_names(unet) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "to_q.lora_A" not in k}, "it has no"),
        (lambda t: {**t, "stranger.lora_A.weight": torch.ones(2)}, "stranger"),
        (lambda t: {k: v * float("inf") for k, v in t.items()}, "not finite"),
    ],
)
def test_missing_spare_and_infinite_tensors_are_named(unet, file, tensors, message):
    with pytest.raises(UserError, match=message):
        load_lora(unet, changed(file[0], tensors=tensors))
    assert adapter_names(unet) == []


def with_motion(header, name="motion", **changes):
    """The header with its motion adapter alone, renamed or changed."""
    return {**header, "adapters": {name: {**header["adapters"]["motion"], **changes}}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (lambda h: {**h, "version": 99}, "newer"),
        (lambda h: {k: v for k, v in h.items() if k != "adapters"}, "damaged"),
        (lambda h: with_motion(h, name="absent"), "nothing"),
        (lambda h: with_motion(h, name="motion.down_blocks"), "dot"),
        (lambda h: with_motion(h, kind="text"), "kind"),
        (lambda h: with_motion(h, layers=[4]), "layer 4"),
        (lambda h: with_motion(h, rank=10**12), "header says rank"),
        (lambda h: with_motion(h, alpha=float("nan")), "not finite"),
        (lambda h: with_motion(h, targets="qkv"), "targets"),
        (lambda h: [], "damaged"),
    ],
)
def test_damaged_headers_are_explained(unet, file, header, message):
    with pytest.raises(UserError, match=message):
        load_lora(unet, changed(file[0], header=header))
    assert adapter_names(unet) == []


def test_other_kinds_of_files_are_named(unet, tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "k.safetensors")
    with pytest.raises(UserError, match="kohya"):
        load_lora(unet, tmp_path / "k.safetensors")


def test_infinite_weights_are_not_saved(unet, tmp_path):
    add_adapter(unet, "a", "spatial", (2,), rank=2)
    next(iter(adapter_modules(unet, "a").values())).B.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        save_lora(tmp_path / "a.safetensors", unet, {"a": ("", "")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "path", "strength"),
    [
        ("runs/teddy", "runs/teddy", 1.0),
        ("runs/teddy:0.8", "runs/teddy", 0.8),
        ("runs/a:b", "runs/a:b", 1.0),
        ("C:/runs/x:-1", "C:/runs/x", -1.0),
    ],
)
def test_a_strength_stands_behind_a_colon(argument, path, strength):
    assert split_strength(argument) == (path, strength)


@pytest.mark.parametrize("argument", ["runs/teddy:nan", "runs/teddy:inf"])
def test_a_strength_is_a_finite_number(argument):
    with pytest.raises(UserError, match="strength"):
        split_strength(argument)
