"""LoRA files of other tools that are damaged, for something else, or fit in part: all are named, and nothing stays."""

import json

import lora_files as files
import pytest
import torch
from lora_files import assert_merges_as_by_hand, loaded, small, written

from lora import adapter_names
from model import SD15, SD15_V2, UserError
from weights import load_lora

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


def test_a_middle_pair_that_v2_lacks_too_is_not_skipped(tmp_path):
    v2 = small(SD15_V2)
    tensors = files.motion_lora(files.random_weights(v2, r"layers\.4\.temporal\.0\." + files.ATTENTION))
    tensors |= {key.replace("motion_modules.0", "motion_modules.1"): tensor.clone() for key, tensor in tensors.items()}
    with pytest.raises(UserError, match=r"8 of 16 pairs.*this base's do not have this one"):
        load_lora(v2, written(tmp_path, tensors))


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


def test_files_of_other_tools_are_not_what_training_wants(unet, tmp_path):
    path = written(tmp_path, files.kohya(files.random_weights(unet, files.SPATIAL + ".*")))
    with pytest.raises(
        UserError, match=r"kohya's scripts write it\. It belongs in --lora\. Here a LoRA that customttt"
    ):
        load_lora(unet, path, {"appearance": "appearance"})
