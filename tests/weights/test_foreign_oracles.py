"""LoRA files that diffusers and peft wrote, or read: the same numbers come out of the UNet and of the text encoder."""

import lora_files as tools
import peft
import pytest
import torch
from conftest import pool_module_norms
from diffusers import AnimateDiffPipeline, MotionAdapter
from diffusers.utils import convert_state_dict_to_diffusers
from oracles import error
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from lora import LoRALayer, adapter_names
from sampling.generate import GenerateSettings, generate_files, loaded_loras

ENDS = (".to_q", ".to_v", ".to_out.0", ".proj_in", ".ff.net.2", ".conv1", ".time_emb_proj", ".downsamplers.0.conv")
TOKENS = torch.tensor([[1022, 5, 300, 41, 1023]])
LATENTS = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pipeline(files):
    """diffusers' pipeline on the files that `base` was loaded from."""
    return AnimateDiffPipeline.from_pretrained(
        files.folder, motion_adapter=MotionAdapter.from_pretrained(files.adapter)
    )


@pytest.fixture
def ours(base):
    pool_module_norms(base.unet)
    return base


def outputs(pipeline):
    """Their text embeddings, and their predicted noise under them."""
    with torch.no_grad():
        text = pipeline.text_encoder(TOKENS)[0]
        return text, pipeline.unet(
            LATENTS, torch.tensor([500]), text.repeat_interleave(2, dim=0)
        ).sample  # a text a frame


def our_outputs(base):
    with torch.no_grad():
        text = base.text(TOKENS)
        return text, base.unet(LATENTS, torch.tensor([500]), text)


def assert_same(base, lora, expected, plain, parts=("text", "unet")):
    """With `--lora lora` our outputs are theirs, they differ from those without, and nothing stays behind."""
    before = our_outputs(base)
    for value, known in zip(before, plain, strict=True):
        assert error(value, known) < 1e-4
    with loaded_loras(base, [lora]):
        found = our_outputs(base)
    for part, value, known, without in zip(("text", "unet"), found, expected, before, strict=True):
        assert error(value, known) < 1e-4, part
        assert (error(known, without) > 1e-2) == (part in parts), part
    for network, value, known in zip((base.text, base.unet), our_outputs(base), before, strict=True):
        assert torch.equal(value, known)
        assert not any(isinstance(module, LoRALayer) for module in network.modules())


def targets(unet):
    """All but what peft cannot wrap: diffusers calls the motion modules' proj_in by keyword."""
    names = [name for name, _ in unet.named_modules() if name.endswith(ENDS)]
    return [name for name in names if not ("motion_modules" in name and name.endswith("proj_in"))]


def with_random_lora(network, **config):
    """Add a LoRA of peft's to their network, in place, that changes what comes out."""
    network.add_adapter(peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(3)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return network


def test_a_current_diffusers_folder_with_its_header_at_half_strength(ours, pipeline, tmp_path):
    plain = outputs(pipeline)
    patterns = {"rank_pattern": {"to_q": 2, "attn2.to_v": 3}, "alpha_pattern": {"attn1.to_q": 5, "proj_in": 1}}
    unet = with_random_lora(pipeline.unet, r=4, lora_alpha=6, target_modules=targets(pipeline.unet), **patterns)
    text = with_random_lora(pipeline.text_encoder, r=3, lora_alpha=5, target_modules=["q_proj", "out_proj", "fc1"])
    AnimateDiffPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(unet),
        get_peft_model_state_dict(text, adapter_name="default"),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=text.peft_config["default"].to_dict(),
    )
    pipeline.set_adapters(["default"], [0.5])
    assert_same(ours, f"{tmp_path}:0.5", outputs(pipeline), plain)


def test_a_networks_own_adapter_file_with_rank_stabilised_scale(ours, pipeline, tmp_path):
    plain = outputs(pipeline)
    unet = with_random_lora(pipeline.unet, r=4, lora_alpha=2, target_modules=targets(pipeline.unet), use_rslora=True)
    unet.save_lora_adapter(tmp_path, weight_name="unet.safetensors")
    assert_same(ours, str(tmp_path / "unet.safetensors"), outputs(pipeline), plain, ["unet"])


def test_the_generation_before_and_its_half_converted_keys(ours, pipeline, tmp_path):
    """`convert_state_dict_to_diffusers` renames attention projections and leaves `proj_in.lora_A`."""
    plain = outputs(pipeline)
    unet = with_random_lora(pipeline.unet, r=4, lora_alpha=4, target_modules=targets(pipeline.unet))
    text = with_random_lora(pipeline.text_encoder, r=2, lora_alpha=2, target_modules=["k_proj", "v_proj", "out_proj"])
    parts = {"unet": get_peft_model_state_dict(unet), "text_encoder": get_peft_model_state_dict(text)}
    tensors = {f"{p}.{k}": t for p, state in parts.items() for k, t in convert_state_dict_to_diffusers(state).items()}
    assert any(".lora.down." in key for key in tensors)
    assert any(".lora_linear_layer.up." in key for key in tensors)
    assert any(".lora_A." in key for key in tensors)
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    assert_same(ours, str(tmp_path), outputs(pipeline), plain)


def test_pefts_own_folders(ours, pipeline, tmp_path):
    plain = outputs(pipeline)
    config = {"lora_alpha": 8, "target_modules": ["q_proj", "fc2"], "alpha_pattern": {"layers.1.mlp.fc2": 3}}
    text = peft.get_peft_model(pipeline.text_encoder, peft.LoraConfig(r=4, init_lora_weights=False, **config))
    text.save_pretrained(tmp_path)
    expected = text(TOKENS)[0].detach()
    with torch.no_grad():
        by_frame = expected.repeat_interleave(2, dim=0)
        expected = expected, pipeline.unet(LATENTS, torch.tensor([500]), by_frame).sample
    assert (tmp_path / "adapter_config.json").is_file()
    assert_same(ours, str(tmp_path), expected, plain)


@pytest.mark.parametrize("kind", ["kohya", "attention processors"])
def test_diffusers_reads_the_same_from_older_files(ours, pipeline, tmp_path, kind):
    plain = outputs(pipeline)
    if kind == "kohya":
        images = tools.random_weights(ours.unet, tools.SPATIAL + ".*", alpha=1.5)
        words = tools.random_weights(ours.text.clip, tools.CLIP, alpha=2.0)
        tensors, parts = {**tools.kohya(images), **tools.kohya_text(words)}, ("text", "unet")
    else:
        images = tools.random_weights(ours.unet, tools.SPATIAL + tools.ATTENTION)
        tensors, parts = tools.attention_processors(images, "unet."), ("unet",)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    assert_same(ours, str(tmp_path / "theirs.safetensors"), outputs(pipeline), plain, parts)


@pytest.mark.filterwarnings("ignore:.*12 of 13 pairs")
def test_the_command_uses_the_file_and_leaves_no_trace(base, tmp_path, capsys):
    weights = tools.random_weights(base.text.clip, tools.CLIP, alpha=4.0)
    stranger = {"lora_unet_up_blocks_9_proj_in.lora_down.weight": torch.ones(2, 2)}
    save_file({**tools.kohya_text(weights), **stranger}, tmp_path / "words.safetensors")
    clip = {"prompt": ["a teddy bear"], "seed": [1], "steps": 1}
    plain, changed, again = (
        generate_files(
            GenerateSettings(out=str(tmp_path / f"{name}.mp4"), lora=lora, allow_partial=bool(lora), **clip), base
        )[0].read_bytes()
        for name, lora in (("a", []), ("b", [f"{tmp_path / 'words.safetensors'}:2"]), ("c", []))
    )
    assert plain != changed
    assert plain == again
    assert "words.safetensors: kohya LoRA, 12 of 13 pairs, 12 layers of the text encoder" in capsys.readouterr().out
    assert adapter_names(base.text) == adapter_names(base.unet) == []
