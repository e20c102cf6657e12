"""Merged checkpoints in diffusers: it opens them, and predicts what we predict with the LoRAs beside the weights."""

import re
from pathlib import Path

import pytest
import torch
from bases import write_motion_adapter, write_motion_module
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint
from merges import merged, random_inputs, write_loras
from oracles import error, like_diffusers
from safetensors.torch import load_file
from transformers import CLIPTextModel

from model import UNet3D
from sampling import draw_noise, encode, sample_latents
from sampling.generate import loaded_loras
from weights import load_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*not of Stable Diffusion 1.5's size"),
]
PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.fixture(scope="module", params=["v1", "v2", "v3"])
def given(request, files, tmp_path_factory):
    """What to merge with a motion module of each version, and the base it is, normed as diffusers does."""
    root = tmp_path_factory.mktemp(request.param)
    motion = write_motion_module(root / f"{request.param}.safetensors", request.param)
    base = load_base(files.folder, motion, device="cpu")
    loras = write_loras(base, root)
    unet = UNet3D(like_diffusers(base.unet.config)).eval().requires_grad_(False)
    unet.load_state_dict(base.unet.state_dict())
    base.unet = unet
    return {"base": str(files.folder), "motion_module": str(motion), "lora": loras}, base


def ours(base, loras):
    latents, tokens = random_inputs()
    with loaded_loras(base, loras), torch.no_grad():
        text = base.text(tokens)
        return base.unet(latents, 500, text), text


def theirs(unet, clip):
    latents, tokens = random_inputs()
    with torch.no_grad():
        text = clip(tokens).last_hidden_state
        return unet(latents, 500, text.repeat_interleave(latents.shape[2], dim=0)).sample, text


def test_the_folder_opens_as_an_animatediff_pipeline_and_predicts_the_same(given, tmp_path):
    pipeline = AnimateDiffPipeline.from_pretrained(merged(tmp_path / "out", **given[0]))
    settings, base = given
    found = theirs(pipeline.unet, pipeline.text_encoder)
    for mine, plain, its in zip(ours(base, settings["lora"]), ours(base, []), found, strict=True):
        assert error(mine, its) < 1e-4
        assert error(plain, its) > 0.1
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, given[1].schedule.alphas_cumprod)
    assert pipeline.unet.config.sample_size == 64


def test_the_one_files_load_by_diffusers_own_converters_and_predict_the_same(given, files, tmp_path):
    out = merged(tmp_path / "teddy", layout="ldm", **given[0])
    path, motion = out / "teddy.safetensors", out / "teddy_mm.safetensors"
    image = UNet2DConditionModel.from_single_file(path, config=str(files.folder), subfolder="unet")
    version = Path(given[0]["motion_module"]).stem
    adapter = MotionAdapter.from_single_file(motion, config=str(write_motion_adapter(tmp_path / "mm", version)))
    clip = CLIPTextModel.from_pretrained(files.folder / "text_encoder")
    names = convert_ldm_clip_checkpoint(load_file(path))
    assert names.pop("text_model.embeddings.position_ids").equal(torch.arange(77)[None])
    clip.load_state_dict({key.removeprefix("text_model."): tensor for key, tensor in names.items()})
    unet = UNetMotionModel.from_unet2d(image, adapter).eval()
    for mine, its in zip(ours(given[1], given[0]["lora"]), theirs(unet, clip), strict=True):
        assert error(mine, its) < 1e-4
    vae = AutoencoderKL.from_single_file(path, config=str(files.folder), subfolder="vae").eval()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        assert error(given[1].vae.encode(images), vae.encode(images).latent_dist.parameters) < 1e-4


@pytest.mark.parametrize("given", ["v3"], indirect=True)
def test_the_pages_example_gives_our_latents(given, tmp_path):
    """The code block of docs/formats.md, with another path and a shorter clip."""
    [code] = [
        c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL) if "merged/" in c
    ]
    assert '"merged/teddy"' in code
    set_up, call = code.replace('"merged/teddy"', repr(str(merged(tmp_path / "out", **given[0])))).split("frames = ")
    prompt = "a teddy bear is playing guitar on the snow"
    assert prompt in call
    names = {}
    exec(set_up, names)
    names["pipe"].set_progress_bar_config(disable=True)
    size = {"num_frames": 4, "height": 40, "width": 64}
    base = given[1]
    with loaded_loras(base, given[0]["lora"]):
        text, negative = encode(base, [prompt]), encode(base, ["red ball"])
        latents = sample_latents(base, text, negative, [7], steps=3, guidance_scale=7.5, spacing="leading", **size)
    settings = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "latent"}
    noise = draw_noise(7, (4, 4, 5, 8))
    found = names["pipe"](prompt, negative_prompt="red ball", latents=noise, **size, **settings).frames
    assert error(latents, found) < 1e-4
