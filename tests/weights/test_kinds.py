"""Every kind of file is known by its tensors; names and shapes come from the manifests, diffusers and peft."""

import diffusers
import pytest
import torch
from base_tensors import manifest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

from weights.detect import detect_tensors

SD15 = {
    "block_out_channels": (32, 64, 64, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL = {
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "use_linear_projection": True,
}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def built(cls, **config):
    with torch.device("meta"):
        return cls(**config)


def text_model(width):
    config = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(vocab_size=100, **config))


def renamed(tensors, old, new):
    return {name.replace(old, new): shape for name, shape in tensors.items()}


def peft_lora(unet, targets=("to_q", "to_k", "to_v", "to_out.0"), prefix="unet."):
    model = get_peft_model(unet, LoraConfig(r=4, target_modules=list(targets)))
    found = get_peft_model_state_dict(model)
    return {f"{prefix}{name.removeprefix('base_model.model.')}": tuple(t.shape) for name, t in found.items()}


def kohya_lora(unet, prefix="lora_unet_"):
    """By kohya's rule: the module's dotted name with underscores, under one prefix."""
    found = {}
    for name, shape in peft_lora(unet, prefix="").items():
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        key = prefix + module.replace(".", "_")
        found[f"{key}.lora_{'down' if side == 'A' else 'up'}.weight"] = shape
        found[f"{key}.alpha"] = ()
    return found


def ldm(width=768, channels=4, text="cond_stage_model.transformer."):
    found = dict(manifest("sd15_ldm_single_file"))
    found["model.diffusion_model.input_blocks.0.0.weight"] = (320, channels, 3, 3)
    found = {n: (*s[:-1], width) if "attn2.to_k" in n or "attn2.to_v" in n else s for n, s in found.items()}
    return renamed(found, "cond_stage_model.transformer.", text)


def sd15_unet(**changes):
    return built(diffusers.UNet2DConditionModel, **{**SD15, **changes})


def motion_module_of_sdxl():
    v3 = manifest("animatediff_v3_motion_module")
    return {name: shape for name, shape in v3.items() if "blocks.3." not in name}


def motion_director(name, tail, new_tail):
    """The repository's own key rule for modules other than q, k, v."""
    return renamed(manifest(name), tail, new_tail)


CASES = {
    "one-file checkpoint, sd15": lambda: ldm(),
    "one-file checkpoint, sd2": lambda: ldm(1024, text="cond_stage_model.model."),
    "one-file checkpoint, inpainting, sd15": lambda: ldm(channels=9),
    "one-file checkpoint, inpainting, sd2": lambda: ldm(1024, 9, "cond_stage_model.model."),
    "one-file checkpoint, pix2pix, sd15": lambda: ldm(channels=8),
    "one-file checkpoint, sdxl": lambda: {
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    },
    "UNet, sd15": lambda: manifest("sd15_diffusers_unet"),
    "UNet, inpainting, sd15": lambda: shapes(sd15_unet(in_channels=9)),
    "UNet, sd2": lambda: shapes(sd15_unet(cross_attention_dim=1024, use_linear_projection=True)),
    "UNet, sdxl": lambda: shapes(built(diffusers.UNet2DConditionModel, **SDXL)),
    "UNet": lambda: shapes(sd15_unet(cross_attention_dim=64)),
    "UNet, modelscope": lambda: shapes(
        built(diffusers.UNet3DConditionModel, block_out_channels=(32, 64, 64, 64), norm_num_groups=8)
    ),
    "VAE": lambda: manifest("sd15_diffusers_vae"),
    "text encoder, sd15": lambda: manifest("sd15_diffusers_text"),
    "text encoder, sd2": lambda: shapes(text_model(1024)),
    "text encoder, sdxl": lambda: shapes(text_model(1280)),
    "motion module, v1, sd15": lambda: manifest("animatediff_v1_motion_module"),
    "motion module, v2, sd15": lambda: manifest("animatediff_v2_motion_module"),
    "motion module, v3, sd15": lambda: manifest("animatediff_v3_motion_module"),
    "motion module, v3, sdxl": motion_module_of_sdxl,
    "motion module, HotshotXL, sdxl": lambda: {
        "down_blocks.0.temporal_attentions.0.transformer_blocks.0.attention_blocks.0.positional_encoding.pe": (
            1,
            24,
            320,
        )
    },
    "image-to-video module, PIA, sd15": lambda: {
        **manifest("animatediff_v3_motion_module"),
        "conv_in.weight": (320, 9, 3, 3),
    },
    "image-to-video module, AnimateLCM-I2V, sd15": lambda: {
        **manifest("animatediff_v2_motion_module"),
        "img_encoder.conv_in.weight": (128, 3, 3, 3),
    },
    "motion adapter, v3, sd15": lambda: manifest("animatediff_diffusers_motion_adapter"),
    "motion adapter, v2, sd15": lambda: shapes(
        built(diffusers.MotionAdapter, block_out_channels=(32, 64, 64, 64), motion_norm_num_groups=8)
    ),
    "motion UNet, v2, sd15": lambda: shapes(
        built(diffusers.UNetMotionModel, block_out_channels=(32, 64, 64, 64), norm_num_groups=8)
    ),
    "motion LoRA, v2, sd15": lambda: manifest("animatediff_v2_motion_lora"),
    "motion LoRA, MotionDirector, sd15": lambda: motion_director(
        "animatediff_v2_motion_lora", "processor.to_out_lora", "to_out.processor.0_lora"
    ),
    "motion LoRA, sd15": lambda: peft_lora(
        built(
            diffusers.MotionAdapter, block_out_channels=(32, 64), motion_norm_num_groups=8, use_motion_mid_block=False
        )
    ),
    "spatial LoRA, v3 domain adapter, sd15": lambda: manifest("animatediff_v3_domain_adapter"),
    "spatial LoRA, MotionDirector, sd15": lambda: {
        **manifest("animatediff_v3_domain_adapter"),
        "down_blocks.0.attentions.0.proj_in_lora.down.weight": (32, 320, 1, 1),
    },
    "spatial LoRA, sd15": lambda: peft_lora(sd15_unet()),
    "spatial LoRA, sdxl": lambda: peft_lora(built(diffusers.UNet2DConditionModel, **SDXL)),
    "other LoRA": lambda: {"transformer.single.0.attn.to_q.lora_A.weight": (4, 64)},
    "kohya LoRA, sd15": lambda: kohya_lora(sd15_unet()),
    "kohya LoRA, sd2": lambda: kohya_lora(sd15_unet(cross_attention_dim=1024)),
    "kohya LoRA, sdxl": lambda: kohya_lora(built(diffusers.UNet2DConditionModel, **SDXL)),
    "LyCORIS, LoHa": lambda: {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (320, 4)},
    "LyCORIS, DoRA, sd15": lambda: {
        **kohya_lora(sd15_unet()),
        "lora_unet_mid_block_attentions_0_proj_in.dora_scale": (64, 1),
    },
    "nameless LoRA": lambda: {"unet:0:up": (320, 4), "unet:0:down": (4, 320)},
    "textual inversion, sd15": lambda: {"<cat-toy>": (768,)},
    "textual inversion, sd2": lambda: {"emb_params": (3, 1024)},
    "textual inversion, sdxl": lambda: {"clip_l": (1, 768), "clip_g": (1, 1280)},
    "controlnet, sd15": lambda: shapes(built(diffusers.ControlNetModel, **SD15)),
    "controlnet, SparseCtrl, sd15": lambda: {
        "controlnet_cond_embedding.conv_in.weight": (320, 4, 3, 3),
        "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight": (320, 320),
    },
    "another model": lambda: {"model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight": (8, 8)},
    "unknown": lambda: {"layer.weight": (8, 8), "layer.bias": (8,)},
}


def words(found):
    return ", ".join(filter(None, (found.kind, found.version, found.family)))


@pytest.mark.parametrize("expected", CASES)
def test_a_file_is_called_by_its_name(expected):
    found = detect_tensors(CASES[expected]())
    assert words(found) == expected
    assert found.note.endswith(".")
    assert found.note[0].isupper()


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"string_to_param.*": (2, 768)}, "textual inversion, sd15"),
        ({"tensor": (2, 768)}, "textual inversion, sd15"),
        ({"[0]": (4, 3), "[1]": (3, 4)}, "nameless LoRA"),
        (kohya_lora(sd15_unet()) | {"lora_te2_text_model_x.lora_down.weight": (4, 1280)}, "kohya LoRA, sdxl"),
        (
            {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)},
            "kohya LoRA, sdxl",
        ),
        (renamed(manifest("sd15_diffusers_text"), "text_model.", ""), "text encoder, sd15"),
        ({n: s for n, s in manifest("sd15_ldm_single_file").items() if n.startswith("model.")}, "UNet, sd15"),
        ({n: s for n, s in manifest("sd15_ldm_single_file").items() if n.startswith("first_")}, "VAE"),
        ({n: s for n, s in manifest("sd15_ldm_single_file").items() if n.startswith("cond_")}, "text encoder, sd15"),
        (manifest("sd15_diffusers_unet") | manifest("animatediff_v3_motion_module"), "motion module, v3, sd15"),
        ({n: s for n, s in manifest("animatediff_v3_motion_module").items() if ".pe" not in n}, "motion module, sd15"),
        ({n: (4, *s[1:]) for n, s in manifest("animatediff_v3_domain_adapter").items()}, "spatial LoRA, sd15"),
        ({"decoder.conv_in.weight": (512, 16, 3, 3), "quant_conv.weight": (32, 32, 1, 1)}, "another model"),
    ],
)
def test_another_form_of_a_file_has_the_same_name(tensors, expected):
    assert words(detect_tensors(tensors)) == expected


def test_tensors_serve_as_well_as_shapes():
    assert detect_tensors({"<cat-toy>": torch.zeros(768)}) == detect_tensors({"<cat-toy>": (768,)})


def test_a_file_of_another_family_is_sent_nowhere():
    for case in ("one-file checkpoint, sd2", "motion module, v3, sdxl", "one-file checkpoint, inpainting, sd15"):
        assert "belongs in --" not in detect_tensors(CASES[case]()).note
    assert "Stable Diffusion 2" in detect_tensors(CASES["UNet, sd2"]()).note
    assert "SDXL" in detect_tensors(CASES["kohya LoRA, sdxl"]()).note
