"""Exports read back: by ourselves, and by the key rules of AnimateDiff and ComfyUI-AnimateDiff-Evolved."""

import json
import re
import warnings

import lora_files as tools
import pytest
import torch
from exports import SPECS, delta, exported, metadata
from lora_files import small
from oracles import diffusers_name, diffusers_unet
from safetensors.torch import load_file, save_file

import customttt
from lora import AdapterSpec, adapter_linears, adapter_modules, adapter_spec
from model import SD15_V2, UNet3D, UserError
from weights import load_lora, read_checkpoint, read_lora_header
from weights.inspect import describe

pytestmark = pytest.mark.filterwarnings("ignore:.*not of Stable Diffusion 1.5's size")


@pytest.fixture(scope="module")
def shared():
    return small(SD15_V2)


# adapter, format and suffix; a key that has to be in the file
ROADS = [
    ("appearance", "kohya", ".safetensors",
     "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0.lora_up.weight"),
    ("appearance", "diffusers", ".safetensors", "unet.down_blocks.2.attentions.0.proj_in.lora_A.weight"),
    ("motion", "diffusers", ".safetensors",
     "unet.mid_block.motion_modules.0.transformer_blocks.0.attn1.to_out.0.lora_B.weight"),
    ("motion", "motion-lora", ".safetensors", "down_blocks.2.motion_modules.1.temporal_transformer."
     "transformer_blocks.0.attention_blocks.1.processor.to_out_lora.down.weight"),
    ("motion", "motion-lora", ".ckpt",
     "up_blocks.0.motion_modules.2.temporal_transformer.transformer_blocks.0.ff.net.2_lora.up.weight"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*fuse_lora")
@pytest.mark.parametrize(("name", "form", "suffix", "key"), ROADS)
def test_an_export_read_as_another_tools_file_is_exact(unet, run, tmp_path, name, form, suffix, key):
    folder, halves = run
    [path] = exported(folder, form, tmp_path / f"out{suffix}", adapter=name)
    assert path == tmp_path / f"out{suffix}"
    assert key in read_checkpoint(path)
    modules = adapter_modules(unet, tools.loaded(unet, path))
    assert modules.keys() == halves[name].keys()
    spec = SPECS[name]
    for layer, module in modules.items():
        a, b = halves[name][layer]
        assert torch.equal(module.A.flatten(1), a)
        assert torch.equal(module.B.flatten(1), b * (spec["alpha"] / spec["rank"]))
        assert module.scale == 1
        assert torch.allclose(module.delta(), delta((a, b), spec), atol=1e-6)


def animatediff(keys):
    """AnimateDiff: {down key: weight}; `processor.`, `_lora` and the half are dropped, `to_out.` is `to_out.0.`"""
    names = {key: re.sub(r"processor\.|_lora|down\.", "", key) for key in keys if "up." not in key}
    return {key: name.replace("to_out.", "to_out.0.") for key, name in names.items()}


def evolved(keys):
    """ComfyUI-AnimateDiff-Evolved, on v2: the same of keys with `temporal` in them, which may have the 0 already."""
    names = {
        key: re.sub(r"processor\.|_lora|down\.", "", key) for key in keys if "temporal" in key and "up." not in key
    }
    return {key: re.sub(r"to_out\.(?!0\.)", "to_out.0.", name) for key, name in names.items()}


def evolved_on_v3(keys):
    """It passes over the middle block's pairs where the motion module has none."""
    return evolved([key for key in keys if "mid_block" not in key])


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("resolve", [animatediff, evolved, evolved_on_v3])
def test_motion_loras_resolve_by_their_readers_rules(run, tmp_path, suffix, resolve):
    folder, halves = run
    [path] = exported(folder, "motion-lora", tmp_path / f"m{suffix}", adapter="motion")
    tensors = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)["state_dict"]
    found = {
        weight: torch.mm(tensors[key.replace(".down.", ".up.")], tensors[key])
        for key, weight in resolve(tensors).items()
    }
    layers = {
        name: pair for name, pair in halves["motion"].items() if resolve != evolved_on_v3 or "layers.4" not in name
    }
    assert len(layers) == 12 * (2 + 3 + (resolve != evolved_on_v3))
    assert found.keys() == {f"{tools.animatediff_name(name)}.weight" for name in layers}
    for name, pair in layers.items():
        value = delta(pair, SPECS["motion"])
        assert torch.allclose(found[f"{tools.animatediff_name(name)}.weight"], value, atol=1e-6)


def test_the_names_are_those_of_the_published_motion_loras(run, tmp_path):
    manifest = json.loads((tools.Path(__file__).parents[1] / "manifests/animatediff_v2_motion_lora.json").read_text())
    published = set(re.findall(r"[\w.]+_lora\.(?:up|down)\.weight", json.dumps(manifest)))
    [path] = exported(run[0], "motion-lora", tmp_path / "m.ckpt", adapter="motion")
    attention = {key for key in read_checkpoint(path) if "attention_blocks" in key}
    assert len(attention) == 2 * 8 * (2 + 1 + 3)
    assert attention <= published


def test_animatediffs_walk_along_kohyas_names_ends_at_the_right_weights(unet, run, tmp_path):
    """It splits at every underscore, joins words until there is such a module, and passes over alpha."""
    folder, halves = run
    [path] = exported(folder, "kohya", tmp_path / "a.safetensors", adapter="appearance")
    network, tensors = diffusers_unet(unet), load_file(path)
    layers = {diffusers_name(name): delta(pair, SPECS["appearance"]) for name, pair in halves["appearance"].items()}
    by_module = {network.get_submodule(name): value for name, value in layers.items()}
    for key in (key for key in tensors if ".lora_down." in key):
        module, word = network, ""
        for part in key.partition(".")[0].removeprefix("lora_unet_").split("_"):
            word = f"{word}_{part}" if word else part
            children = dict(module.named_children())
            module, word = (children[word], "") if word in children else (module, word)
        up, down = (tensors[k].flatten(1) for k in (key.replace("lora_down", "lora_up"), key))
        assert torch.allclose(up @ down, by_module.pop(module), atol=1e-6)
        assert tensors[key.replace("lora_down.weight", "alpha")].item() == len(down)
    assert by_module == {}


def test_both_parts_get_a_file_each(run, tmp_path, capsys):
    with pytest.warns(UserWarning, match=r"pipe\.fuse_lora\(\) and pipe\.unload_lora_weights\(\)"):
        paths = exported(run[0], "diffusers", tmp_path / "teddy.safetensors")
    assert [path.name for path in paths] == ["teddy-appearance.safetensors", "teddy-motion.safetensors"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {paths[0]}: appearance, 72 pairs of rank 4 in spatial layers 2 4 6, float32"
    assert lines[2] == f"wrote {paths[1]}: motion, 72 pairs of rank 3 in temporal layers 2 4 5, float32"
    assert "load_lora_weights" in lines[1]
    assert not (tmp_path / "teddy.safetensors").exists()


def test_our_own_copies_are_ours(unet, run, tmp_path):
    folder, halves = run
    [path] = exported(folder, "own", tmp_path / "copy.safetensors")
    [half] = exported(folder, "own", tmp_path / "half.safetensors", dtype="float16", adapter="motion")
    copy, first = read_lora_header(path), read_lora_header(folder)
    assert (copy.adapters, copy.base, copy.settings) == (first.adapters, first.base, first.settings)
    assert list(read_lora_header(half).adapters) == ["motion"]
    load_lora(unet, path)
    load_lora(unet, half, {"motion": "rounded"})
    for name, found in halves.items():
        for layer, module in adapter_modules(unet, name).items():
            assert all(map(torch.equal, (module.A, module.B), found[layer]))
    assert adapter_spec(unet, "rounded") == adapter_spec(unet, "motion")
    for layer, module in adapter_modules(unet, "rounded").items():
        assert torch.equal(module.B, halves["motion"][layer][1].half().float())


@pytest.mark.parametrize(("dtype", "off"), [("float32", 1e-7), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_dtypes_round_and_no_more(unet, run, tmp_path, dtype, off):
    folder, halves = run
    [path] = exported(folder, "kohya", tmp_path / "a.safetensors", dtype=dtype, adapter="appearance")
    tensors = load_file(path)
    assert {str(t.dtype) for key, t in tensors.items() if not key.endswith(".alpha")} == {f"torch.{dtype}"}
    for layer, module in adapter_modules(unet, tools.loaded(unet, path)).items():
        expected = delta(halves["appearance"][layer], SPECS["appearance"])
        assert (module.delta() - expected).norm() <= off * expected.norm()


def test_headers_tell_tools_and_people_what_it_is(run, tmp_path):
    [path] = exported(run[0], "kohya", tmp_path / "teddy.safetensors", adapter="appearance")
    assert metadata(path) == {
        "format": "pt",
        "modelspec.title": "teddy",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.trigger_phrase": "zor",
        "modelspec.usage_hint": "trained with the prompt: a zor teddy",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
    }
    [motion] = exported(run[0], "motion-lora", tmp_path / "run.ckpt", adapter="motion")
    assert "motion LoRA, v2, sd15" in describe(motion)  # the middle block is AnimateDiff v2's
    text = describe(path)
    assert "kohya LoRA" in text
    assert "modelspec.trigger_phrase  zor" in text


def test_the_command(run, tmp_path, capsys):
    out = str(tmp_path / "a.safetensors")
    customttt.command(["export", "--run", str(run[0]), "--format", "kohya", "--out", out, "--adapter", "appearance"])
    assert "A1111: models/Lora" in capsys.readouterr().out
    with pytest.raises(UserError, match="one of own, kohya, diffusers, motion-lora"):
        customttt.command(["export", "--run", str(run[0]), "--format", "peft", "--out", out])


def test_only_a_base_of_another_size_is_warned_of(run, tmp_path):
    with pytest.warns(UserWarning, match="trained on sd15, which is not of Stable Diffusion 1.5's size"):
        exported(run[0], "kohya", tmp_path / "a.safetensors", adapter="appearance")
    with torch.device("meta"):
        linears = adapter_linears(UNet3D(SD15_V2), AdapterSpec("temporal", (4,), 1, 1.0))
    tensors = {}
    for name, linear in linears.items():
        tensors[f"m.{diffusers_name(name)}.lora_A.weight"] = torch.ones(1, linear.in_features)
        tensors[f"m.{diffusers_name(name)}.lora_B.weight"] = torch.ones(linear.out_features, 1)
    header = json.loads(metadata(run[0] / "lora.safetensors")["customttt"])
    entry = {**header["adapters"]["motion"], "layers": [4], "rank": 1, "targets": "blocks"}
    header = {"customttt": json.dumps({**header, "adapters": {"m": entry}})}
    save_file(tensors, tmp_path / "full.safetensors", header)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported(tmp_path / "full.safetensors", "diffusers", tmp_path / "d.safetensors")
