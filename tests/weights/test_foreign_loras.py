"""LoRAs of other tools, written by those tools' rules: each layer as merged by hand."""

import json

import lora_files as files
import pytest
import torch
from lora_files import assert_merges_as_by_hand, loaded, small, written
from oracles import randomise

from lora import LowRank, adapter_modules, adapter_names
from model import SD15_V2, TextConfig, TextEncoder
from weights import load_lora


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


def test_a_published_files_line_says_what_it_is(unet, tmp_path, capsys):
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


def test_kohya_and_attention_processors_go_by_no_header(unet, tmp_path):
    weights = files.random_weights(unet, r"layers\.2\.spatial\.0\." + files.ATTENTION)
    header = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 64.0}), "ss_network_alpha": "64"}
    for write in (files.kohya, files.attention_processors):
        path = written(tmp_path, write(weights), f"{write.__name__}.safetensors", header)
        assert_merges_as_by_hand(unet, loaded(unet, path), weights)
