"""LoRAs of other tools, written by those tools' rules: each layer as merged by hand, and every wrong file named."""

import json
from dataclasses import replace

import lora_files as files
import pytest
import torch
from oracles import randomise
from safetensors.torch import save_file

from lora import LoRALayer, LowRank, adapter_modules, adapter_names, merge_adapters, unmerge_adapters
from model import SD15, SD15_V2, SD15_V3, TextConfig, TextEncoder, UNet3D, UserError
from weights import load_lora

SMALL = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 16}


def small(config=SD15_V3):
    return randomise(UNet3D(replace(config, **SMALL))).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def shared():
    """For tests that leave it as it was."""
    return small()


def loaded(network, path, **options):
    """The one adapter that a file gives."""
    [(name, entry)] = load_lora(network, path, **options).items()
    assert entry is None
    return name


def written(tmp_path, tensors, name="theirs.safetensors", metadata=None):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    else:
        torch.save(tensors, path)
    return path


def assert_merges_as_by_hand(network, name, weights, strength=0.8):
    """Each layer's weight, with the file merged, is W + s * alpha / r * up @ down; no other layer has an update."""
    assert adapter_modules(network, name).keys() == weights.keys()
    expected = files.merged_by_hand(network, weights, strength)
    before = {layer: network.get_submodule(layer).weight.clone() for layer in weights}
    merge_adapters(network, {name: strength})
    for layer, value in expected.items():
        assert torch.allclose(network.get_submodule(layer).weight, value, atol=1e-6), layer
        assert not torch.equal(value, before[layer]), layer
    unmerge_adapters(network)


@pytest.fixture
def unet(shared):
    yield shared
    for name, module in list(shared.named_modules()):
        if isinstance(module, LoRALayer):
            parent, _, child = name.rpartition(".")
            setattr(shared.get_submodule(parent), child, module.unwrap())


def mixed(weights):
    """One layer after another in another form."""
    writers = (files.kohya, files.attention_processors, lambda one: files.dotted(one, "unet."))
    each = (writers[i % 3]({name: low}) for i, (name, low) in enumerate(weights.items()))
    return {key: tensor for tensors in each for key, tensor in tensors.items()}


# what is written: by whom, for which layers, what the line about it says
KINDS = {
    "kohya": (files.kohya, files.SPATIAL + ".*", "kohya LoRA, 192 of 192 pairs, spatial layers 0 1 2 4 6 7 8"),
    "kohya with convolutions": (files.kohya, r"(layers\.(2|5)\.(resnets|downsampler|upsampler)|conv_in).*",
                                "kohya LoRA, 21 of 21 pairs, convolutional layers 2 5, what stands before"),
    "kohya for AnimateDiff": (
        lambda w: files.kohya(w, spell=files.animatediff_name), files.TEMPORAL + files.BLOCK,
        "200 of 200 pairs, temporal layers 0 1 2 3 5 6 7 8"),
    "attention processors": (
        files.attention_processors, files.SPATIAL + files.ATTENTION,
        "spatial LoRA, 128 of 128 pairs, spatial layers 0 1 2 4 6 7 8"),
    "MotionLoRA": (files.motion_lora, files.TEMPORAL + files.ATTENTION, "motion LoRA, 160 of 160 pairs, temporal"),
    "MotionDirector, temporal": (
        files.motion_director_temporal, files.TEMPORAL + files.BLOCK, "MotionDirector motion LoRA, 200 of 200 pairs"),
    "MotionDirector, spatial": (
        files.motion_director_spatial, files.SPATIAL + "(?!proj_out).*",
        "MotionDirector spatial LoRA, 176 of 176 pairs"),
    "PEFT": (lambda w: files.dotted(w, "base_model.model."), r"layers\.[25]\..*",
             "spatial layers 2, temporal layers 2 5, convolutional layers 2 5"),
    "mixed": (mixed, files.SPATIAL + ".*",
              ": LoRA (keys of kohya and attention processors and PEFT), 192 of 192 pairs"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_each_kind_changes_each_layer_as_by_hand(unet, tmp_path, capsys, kind, suffix):
    write, pattern, line = KINDS[kind]
    alpha = 3.0 if "kohya" in kind else None
    weights = files.random_weights(unet, pattern, alpha=alpha)
    tensors = write(weights)
    if suffix == ".ckpt":
        tensors = {"state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}, "epoch": 1}
        tensors["state_dict"]["animatediff_config"] = "dummy"
    name = loaded(unet, written(tmp_path, tensors, f"theirs{suffix}"))
    assert line in capsys.readouterr().out
    assert_merges_as_by_hand(unet, name, weights)


def test_a_published_files_line_says_what_it_is(tmp_path, capsys):
    unet = small()
    weights = {
        name: LowRank(torch.randn(128, low.A.shape[1]), torch.randn(len(low.B), 128), 128.0)
        for name, low in files.random_weights(unet, files.SPATIAL + files.ATTENTION).items()
    }
    path = written(tmp_path, files.attention_processors(weights), "v3_sd15_adapter.ckpt")
    load_lora(unet, path)
    expected = "v3_sd15_adapter.ckpt: v3 domain adapter, 128 of 128 pairs, spatial layers 0 1 2 4 6 7 8\n"
    assert capsys.readouterr().out == expected


def test_half_precision_files_are_read_exactly(unet, tmp_path):
    weights = files.random_weights(unet, files.SPATIAL + files.ATTENTION)
    halves = {key: tensor.half() for key, tensor in files.attention_processors(weights).items()}
    name = loaded(unet, written(tmp_path, halves))
    for layer, module in adapter_modules(unet, name).items():
        assert module.A.dtype == torch.float32
        assert torch.equal(module.A, weights[layer].A.half().float())


# what is wrong, with the file's tensors; what is said
Q = "down_blocks.2.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
DAMAGE = {
    "half": (lambda t: t.pop(f"{Q}.up.weight"), r"to_q_lora.down.weight is there without its 'up' half"),
    "other half": (lambda t: t.pop(f"{Q}.down.weight"), r"to_q_lora.up.weight is there without its 'down' half"),
    "lone alpha": (lambda t: [t.pop(f"{Q}.{h}.weight") for h in ("up", "down")] and t.update({
        "lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(1.0)}),
        "alpha is there without"),
    "infinite": (lambda t: t[f"{Q}.up.weight"].fill_(float("inf")), r"damaged: .*to_q_lora.up.weight.*not finite"),
    "whole numbers": (lambda t: t.update({f"{Q}.up.weight": torch.ones(32, 2, dtype=torch.int8)}), "no fractions"),
    "no rank": (lambda t: t.update({f"{Q}.down.weight": torch.ones(0, 32), f"{Q}.up.weight": torch.ones(32, 0)}),
                r"\(0, 32\), which is no matrix"),
    "a vector": (lambda t: t.update({f"{Q}.down.weight": torch.ones(32)}), r"\(32,\), which is no matrix"),
    "two ranks": (lambda t: t.update({f"{Q}.up.weight": torch.ones(32, 77)}), r"\(32, 77\).*wants \(32, \d\)"),
    "another width": (lambda t: t.update({f"{Q}.down.weight": torch.ones(2, 640)}),
                      r"to_q_lora.down.weight is \(2, 640\).*wants \(2, 32\).*another architecture"),
    "for full size": (lambda t: t.update({Q.replace("attn1", "attn2").replace("to_q", "to_k") + ".down.weight":
                                          torch.ones(2, 768)}), r"\(2, 768\).*made for Stable Diffusion 1.5"),
    "infinite alpha": (lambda t: t.update({
        "lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(float("nan"))}),
        "alpha should be one finite number"),
    "twice": (lambda t: t.update({
        "unet.down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 32)}),
        "one layer twice"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_with_the_key(unet, tmp_path, damage):
    tensors = files.attention_processors(files.random_weights(unet, r"layers\.2\.spatial\.0\." + files.ATTENTION))
    change, message = DAMAGE[damage]
    change(tensors)
    path = written(tmp_path, tensors)
    for allow_partial in (False, True):
        with pytest.raises(UserError, match=message):
            load_lora(unet, path, allow_partial=allow_partial)
    assert adapter_names(unet) == []


# a key that is no layer's, and the likely reason
STRANGERS = {
    "down_blocks.2.attentions.7.transformer_blocks.0.attn1.to_q.lora_A.weight": "no layer of Stable Diffusion 1.5",
    "lora_unet_down_blocks_2_attentions_0_transformer_blocks_3_attn1_to_q.lora_down.weight": "of SDXL",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "text encoder: it was loaded for the UNet alone",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "of a newer model",
    "down_blocks.0.temp_attentions.0.proj_in.lora_A.weight": "another video model",
    "unet.conv_in.weight": "no part of a LoRA",
}


@pytest.mark.parametrize(("key", "reason"), STRANGERS.items())
def test_partial_and_zero_matches_are_errors_unless_allowed(unet, tmp_path, capsys, key, reason):
    weights = files.random_weights(unet, r"layers\.2\.spatial\.0\..*")
    path = written(tmp_path, {**files.dotted(weights), key: torch.ones(2, 32)})
    total = 12 if key.endswith("conv_in.weight") else 13
    with pytest.raises(UserError, match=f"12 of {total} pairs .*{reason}.*--allow_partial"):
        load_lora(unet, path)
    assert adapter_names(unet) == []
    assert capsys.readouterr().out == ""
    with pytest.warns(UserWarning, match=reason):
        name = loaded(unet, path, allow_partial=True)
    assert f"12 of {total} pairs" in capsys.readouterr().out
    assert_merges_as_by_hand(unet, name, weights)


def test_a_file_of_which_nothing_fits_is_an_error_or_nothing(unet, tmp_path, capsys):
    path = written(tmp_path, {"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match=r"0 of 1 pairs of this LoRA fit the base.*newer model"):
        load_lora(unet, path)
    with pytest.warns(UserWarning, match="0 of 1"):
        assert load_lora(unet, path, allow_partial=True) == {}
    assert adapter_names(unet) == []


def test_a_long_list_of_strangers_is_cut_short(unet, tmp_path):
    weights = files.random_weights(unet, files.SPATIAL + ".*")
    tensors = {f"down_blocks.9.{i}.lora_A.weight": low.A for i, low in enumerate(weights.values())}
    with pytest.raises(UserError, match=r"0 of 192 pairs .*; and 189 more\."):
        load_lora(unet, written(tmp_path, tensors))


def test_the_middle_pairs_of_v2_are_skipped_on_v3_and_used_on_v2(unet, tmp_path, capsys):
    v2 = small(SD15_V2)
    weights = files.random_weights(v2, files.TEMPORAL + files.ATTENTION)
    path = written(tmp_path, files.motion_lora(weights), "v2_lora_ZoomIn.ckpt")
    assert_merges_as_by_hand(v2, loaded(v2, path), weights)
    assert "v2 motion LoRA, 168 of 168 pairs, temporal layers 0 1 2 3 4 5 6 7 8" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="8 pairs are for the middle block's motion module"):
        name = loaded(unet, path)
    assert "160 of 168 pairs, 8 of AnimateDiff v2's middle block skipped" in capsys.readouterr().out
    assert_merges_as_by_hand(unet, name, {n: low for n, low in weights.items() if "layers.4" not in n})


def test_a_file_of_middle_pairs_alone_has_no_use_on_v3(unet, tmp_path):
    weights = files.random_weights(small(SD15_V2), r"layers\.4\.temporal\.0\." + files.ATTENTION)
    with pytest.raises(UserError, match=r"0 of 8 pairs.*All 8 are of AnimateDiff v2's middle block"):
        load_lora(unet, written(tmp_path, files.motion_lora(weights)))


def test_a_motion_lora_without_motion_modules_says_what_is_missing(unet, tmp_path):
    weights = files.random_weights(unet, files.TEMPORAL + files.ATTENTION)
    with pytest.raises(UserError, match=r"0 of 160 pairs.*--motion_module"):
        load_lora(small(SD15), written(tmp_path, files.motion_lora(weights)))


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (4, 4)}, "LoHa"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": (4, 4)}, "LoKr"),
        ({"lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": (4, 4, 3, 3)}, "LoCon with a Tucker core"),
        ({"lora_unet_mid_block_attentions_0_proj_in.dora_scale": (4, 1)}, "DoRA"),
        ({"unet.mid_block.attentions.0.proj_in.lora_magnitude_vector": (4,)}, "DoRA"),
        ({"base_model.model.mid_block.attentions.0.proj_in.lora_magnitude_vector.weight": (4,)}, "DoRA"),
        ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": (4, 4, 4)}, "OFT"),
        ({"lora_unet_mid_block_attentions_0_proj_in.diff": (4, 4)}, "full difference"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused_by_name(unet, tmp_path, tensors, name):
    weights = files.random_weights(unet, r"layers\.2\.spatial\.0\..*")
    both = {**files.kohya(weights), **{key: torch.ones(shape) for key, shape in tensors.items()}}
    for held in (both, {key: torch.ones(shape) for key, shape in tensors.items()}):
        with pytest.raises(UserError, match=f"This is a {name} file"):
            load_lora(unet, written(tmp_path, held), allow_partial=True)


WRONG = {
    "SD2": ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 1024)},
            "for Stable Diffusion 2"),
    "SDXL": ({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 2048)}, "for SDXL"),
    "SDXL's second encoder": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 8)}, "for SDXL"),
    "nameless": ({"unet:0:up": (4, 4), "unet:0:down": (4, 4)}, "tensors have no names"),
    "a motion module": ({"down_blocks.3.motion_modules.0.temporal_transformer.proj_in.weight": (4, 4)},
                        "It belongs in --motion_module"),
    "an embedding": ({"<cat>": (768,)}, "textual-inversion"),
    "a ControlNet": ({"controlnet_cond_embedding.conv_in.weight": (4, 4)}, "ControlNet"),
    "anything": ({"layer.weight": (4, 4), "layer.bias": (4,)}, "fit nothing known here"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_files_in_the_wrong_place_are_told_where_they_belong(unet, tmp_path, kind):
    shapes, message = WRONG[kind]
    path = written(tmp_path, {key: torch.ones(shape) for key, shape in shapes.items()})
    with pytest.raises(UserError, match=rf"given as a LoRA\. .*{message}"):
        load_lora(unet, path, allow_partial=True)


def test_a_picture_is_no_lora(unet, tmp_path):
    (tmp_path / "lora.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    with pytest.raises(UserError, match="This is an image"):
        load_lora(unet, tmp_path / "lora.png")


def test_the_text_encoders_part_goes_there_under_the_same_name(unet, tmp_path, capsys):
    text = randomise(
        TextEncoder(TextConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                               num_attention_heads=2))
    ).clip  # fmt: skip
    images = files.random_weights(unet, r"layers\.6\.spatial\..*", alpha=1.0)
    words = files.random_weights(text, files.CLIP, alpha=2.0)
    path = written(tmp_path, {**files.kohya(images), **files.kohya_text(words)})
    name = loaded(unet, path, text=text)
    assert "48 of 48 pairs, spatial layers 6, 12 layers of the text encoder" in capsys.readouterr().out
    assert_merges_as_by_hand(unet, name, images)
    assert_merges_as_by_hand(text, name, words)
    second = loaded(unet, written(tmp_path, files.kohya_text(words), "words.safetensors"), text=text)
    assert adapter_names(unet) == [name]
    assert adapter_names(text) == [name, second]


def config_written(tmp_path, unet, where, table):
    weights = files.random_weights(unet, r"layers\.2\.spatial\.0\..*")
    if where == "header":
        return written(tmp_path, files.dotted(weights, "unet."), metadata={"lora_adapter_metadata": json.dumps(table)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(table))
    return written(tmp_path, files.dotted(weights, "base_model.model."), "adapter_model.safetensors").parent


@pytest.mark.parametrize("where", ["header", "folder"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"lora_alpha": float("nan")}, "alpha is nan"),
        ({"lora_alpha": "8"}, "alpha is '8'"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": None}}, "alpha is None"),
        ({"lora_alpha": 8, "alpha_pattern": [1]}, "a table was expected"),
        ({"lora_alpha": 8, "alpha_pattern": {"(a+)+b": 4}}, "too involved"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_(q": 4}}, "damaged"),
        ({"peft_type": "LOHA"}, "not a plain LoRA"),
        ([], "a table was expected"),
    ],
)
def test_damaged_settings_are_explained(unet, tmp_path, where, table, message):
    with pytest.raises(UserError, match=message):
        load_lora(unet, config_written(tmp_path, unet, where, table))


@pytest.mark.parametrize("text", ["{", "1" * 10_000, "[" * 100_000])
def test_headers_that_are_no_json_are_explained(unet, tmp_path, text):
    weights = files.dotted(files.random_weights(unet, r"layers\.2\.spatial\.0\.proj_in"))
    with pytest.raises(UserError, match="damaged"):
        load_lora(unet, written(tmp_path, weights, metadata={"lora_adapter_metadata": text}))


def test_kohya_and_attention_processors_go_by_no_header(unet, tmp_path):
    weights = files.random_weights(unet, r"layers\.2\.spatial\.0\." + files.ATTENTION)
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 64.0}), "ss_network_alpha": "64"}
    for write in (files.kohya, files.attention_processors):
        path = written(tmp_path, write(weights), f"{write.__name__}.safetensors", header)
        assert_merges_as_by_hand(unet, loaded(unet, path), weights)


def test_files_of_other_tools_are_not_what_training_wants(unet, tmp_path):
    path = written(tmp_path, files.kohya(files.random_weights(unet, files.SPATIAL + ".*")))
    with pytest.raises(
        UserError, match=r"kohya's scripts write it\. It belongs in --lora\. Here a LoRA that customttt"
    ):
        load_lora(unet, path, {"appearance": "appearance"})
