"""Exports in diffusers and peft: the same numbers come out as with the LoRA they were made from."""

import re
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from conftest import pool_module_norms
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from exports import SPECS, exported, written
from oracles import diffusers_unet, error
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from lora import adapter_names, adapters, remove_adapter
from sampling import draw_noise, encode, sample_latents
from weights import load_base, load_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*not of Stable Diffusion 1.5's size"),
    pytest.mark.filterwarnings("ignore:.*is left out"),
    pytest.mark.filterwarnings("ignore:.*fuse_lora"),
]
PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
PROMPT = "a teddy bear is playing guitar on the snow"
SIZE = {"num_frames": 4, "height": 40, "width": 64}
TOKENS = torch.tensor([[1022, 5, 300, 41, 1023]])
LATENTS = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
LAYERS = {"appearance": (2, 6), "motion": (2, 5)}  # the paper's
BOTH = {"appearance": 0.7, "motion": 1.2}


@dataclass(frozen=True)
class Trained:
    """A LoRA file of both parts, their numbers of pairs, and what our UNet makes of them."""

    path: Path
    pairs: dict[str, int]
    outputs: dict[str, torch.Tensor]
    latents: torch.Tensor


@pytest.fixture(scope="module")
def base(files):
    """The narrow base, with diffusers' norms."""
    loaded = load_base(files.folder, files.adapter, device="cpu")
    pool_module_norms(loaded.unet)
    return loaded


def trained(base, path, targets):
    """Random A and B, alpha not r; the network is left without."""
    specs = {name: {**SPECS[name], "layers": layers, "targets": targets[name]} for name, layers in LAYERS.items()}
    pairs = {name: len(halves) for name, halves in written(base.unet, path, **specs).items()}
    load_lora(base.unet, path)
    outputs = {}
    for name, scales in {"": {}, "both": BOTH, **{name: {name: 1.0} for name in BOTH}}.items():
        with torch.no_grad(), adapters(base.unet, scales):
            outputs[name] = base.unet(LATENTS, torch.tensor([500]), base.text(TOKENS))
    with adapters(base.unet, BOTH):
        text, negative = encode(base, [PROMPT]), encode(base, ["red ball"])
        latents = sample_latents(base, text, negative, [7], steps=3, guidance_scale=7.5, spacing="leading", **SIZE)
    for name in adapter_names(base.unet):
        remove_adapter(base.unet, name)
    return Trained(path, pairs, outputs, latents)


@pytest.fixture(scope="module")
def ours(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "lora.safetensors"
    return trained(base, path, {"appearance": "all", "motion": "blocks"})


@pytest.fixture
def pipeline(files):
    """diffusers' pipeline on the files that `base` was loaded from."""
    pipeline = AnimateDiffPipeline.from_pretrained(
        files.folder, motion_adapter=MotionAdapter.from_pretrained(files.adapter)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one(ours, form, name, **options):
    """The export of one of the parts."""
    [path] = exported(ours.path, form, ours.path.with_name(f"{name}.safetensors"), adapter=name, **options)
    return path


def output(unet, base):
    with torch.no_grad():
        return unet(LATENTS, torch.tensor([500]), base.text(TOKENS).repeat_interleave(2, dim=0)).sample


def layers_with(unet, name):
    return sum(isinstance(module, LoraLayer) and name in module.lora_A for module in unet.modules())


@pytest.mark.parametrize(
    ("name", "form", "dtype", "off"),
    [
        ("appearance", "diffusers", "float32", 1e-4),
        ("appearance", "kohya", "float32", 1e-4),
        ("motion", "diffusers", "float32", 1e-4),
        ("appearance", "kohya", "float16", 1e-2),
        ("motion", "diffusers", "float16", 1e-3),
    ],
)
def test_diffusers_loads_each_file_whole(ours, base, pipeline, name, form, dtype, off):
    path = one(ours, form, name, dtype=dtype)
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    assert layers_with(pipeline.unet, name) == ours.pairs[name]
    found = output(pipeline.unet, base)
    assert error(ours.outputs[name], found) < off
    assert error(ours.outputs[""], found) > 0.1


@pytest.mark.parametrize("name", BOTH)
def test_peft_loads_each_file_whole(ours, base, name):
    tensors = load_file(one(ours, "diffusers", name))
    tensors = {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}
    rank = SPECS[name]["rank"]
    targets = sorted({re.sub(r"\.lora_[AB]\.weight$", "", key) for key in tensors})
    unet = diffusers_unet(base.unet)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), unet, name)
    result = set_peft_model_state_dict(unet, tensors, adapter_name=name)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    assert layers_with(unet, name) == ours.pairs[name]
    assert error(ours.outputs[name], output(unet, base)) < 1e-4


def test_the_pages_example_gives_our_latents(ours, base, files, monkeypatch):
    """The code block of docs/formats.md, with other paths and a shorter clip."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    [code] = [block for block in blocks if "load_lora_weights" in block]
    folder = ours.path.parent
    exported(ours.path, "diffusers", folder / "teddy.safetensors")
    for on_the_page, used in (
        ('"guoyww/animatediff-motion-adapter-v1-5-3"', repr(str(files.adapter))),
        ('"sd15"', repr(str(files.folder))),
        ('"exports"', repr(str(folder))),
        ("[1.0, 1.0]", "[0.7, 1.2]"),
    ):
        assert on_the_page in code
        code = code.replace(on_the_page, used)
    set_up, call = code.split("frames = ")
    assert PROMPT in call
    names = {}
    exec(set_up, names)
    pipeline = names["pipe"]
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert {name: layers_with(pipeline.unet, name) for name in BOTH} == ours.pairs
    assert error(ours.outputs["both"], output(pipeline.unet, base)) < 1e-4
    noise = draw_noise(7, (4, 4, 5, 8))
    settings = {"num_inference_steps": 3, "guidance_scale": 7.5, "output_type": "latent"}
    theirs = pipeline(PROMPT, negative_prompt="red ball", latents=noise, **SIZE, **settings).frames
    assert error(ours.latents, theirs) < 1e-4


def test_motion_projections_work_in_diffusers_as_the_warning_says(base, pipeline, tmp_path):
    ours = trained(base, tmp_path / "lora.safetensors", {"appearance": "blocks", "motion": "all"})
    path = one(ours, "diffusers", "motion")
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="motion")
    assert layers_with(pipeline.unet, "motion") == ours.pairs["motion"]
    with pytest.raises(TypeError):
        output(pipeline.unet, base)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert error(ours.outputs["motion"], output(pipeline.unet, base)) < 1e-4
