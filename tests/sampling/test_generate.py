"""Generation against diffusers' AnimateDiffPipeline on the same files, and what a person relies on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from conftest import pool_module_norms
from diffusers import AnimateDiffPipeline, MotionAdapter
from diffusers.utils.torch_utils import randn_tensor
from oracles import error, reference_scheduler
from two_loras import write_loras

from lora import adapter_names, adapter_parameters, adapters, add_adapter, remove_adapter
from model import UserError
from sampling import decode, draw_noise, encode, read_video, sample_latents, sample_videos
from sampling.generate import GenerateSettings, clip_files, generate_files, loaded_loras, main
from weights import load_base, save_lora

PROMPT = "a teddy bear is playing guitar on the snow"


def filled_lora(base, path, kind="temporal", name="motion", seed=1):
    """Write a LoRA that visibly changes the output, and leave the network as it was."""
    add_adapter(base.unet, name, kind, (2,), rank=4)
    generator = torch.Generator().manual_seed(seed)
    for p in adapter_parameters(base.unet, name):
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    save_lora(path, base.unet, {name: ("a prompt", "")}, fingerprints=base.fingerprints)
    with adapters(base.unet, {name: 0.7}):
        latents = sample_latents(base, encode(base, [PROMPT]), encode(base, [""]), [1])
    remove_adapter(base.unet, name)
    return latents


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("guidance_scale", [9.0, 1.0])
def test_latents_of_a_guided_run_equal_diffusers(base, files, spacing, guidance_scale):
    pool_module_norms(base.unet)
    scheduler = reference_scheduler(spacing)
    pipeline = AnimateDiffPipeline.from_pretrained(
        files.folder, motion_adapter=MotionAdapter.from_pretrained(files.adapter), scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=PROMPT,
        negative_prompt="red ball",
        num_frames=4,
        height=40,
        width=64,
        num_inference_steps=5,
        guidance_scale=guidance_scale,
        latents=draw_noise(7, (4, 4, 5, 8)),
        output_type="latent",
    ).frames
    ours = sample_latents(
        base,
        encode(base, [PROMPT]),
        encode(base, ["red ball"]),
        [7],
        num_frames=4,
        height=40,
        width=64,
        steps=5,
        guidance_scale=guidance_scale,
        spacing=spacing,
    )
    assert error(ours, expected) < 1e-4


def test_frames_equal_diffusers_decoding(base, files):
    pool_module_norms(base.unet)
    pipeline = AnimateDiffPipeline.from_pretrained(
        files.folder, motion_adapter=MotionAdapter.from_pretrained(files.adapter)
    )
    latents = torch.randn(1, 4, 3, 4, 4)
    expected = pipeline.decode_latents(latents)[0].transpose(0, 1).clamp(-1, 1)
    assert (decode(base, latents)[0] - expected).abs().max() < 1e-4


def test_a_seed_gives_the_same_clip_in_any_batch(base):
    together = sample_videos(base, [PROMPT, "a ball"], [3, 4])
    alone = sample_videos(base, ["a ball"], [4])
    assert together.shape == (2, 3, 3, 32, 32)
    assert (together[1] - alone[0]).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 0.05


def test_eta_draws_noise_from_the_seed(base):
    text, negative = encode(base, [PROMPT]), encode(base, [""])
    runs = [sample_latents(base, text, negative, [seed], eta=1.0) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], sample_latents(base, text, negative, [1]))


def test_shared_noise_is_the_first_frames(base):
    noise = draw_noise(5, (4, 3, 2, 2))
    shared = draw_noise(5, (4, 3, 2, 2), shared=True)
    assert torch.equal(shared[:, :, 2], noise[:, :, 0])


def test_dropout_is_off_while_sampling_and_back_on_after(base):
    add_adapter(base.unet, "a", "spatial", (2,), rank=4, dropout=0.5)
    for p in adapter_parameters(base.unet, "a"):
        p.data.normal_(std=0.3)
    text, negative = encode(base, [PROMPT]), encode(base, [""])
    base.unet.train()
    with adapters(base.unet, {"a": 1.0}):
        first, second = (sample_latents(base, text, negative, [1]) for _ in range(2))
    assert torch.equal(first, second)
    assert base.unet.training


def test_files_are_written_with_loras_at_their_strength_and_the_network_left_clean(base, tmp_path):
    latents = filled_lora(base, tmp_path / "lora.safetensors")
    expected = decode(base, latents)[0]
    settings = GenerateSettings(
        prompt=[PROMPT], out=str(tmp_path / "clip"), lora=[f"{tmp_path / 'lora.safetensors'}:0.7"], seed=[1]
    )
    assert generate_files(settings, base) == [tmp_path / "clip"]
    written = read_video(tmp_path / "clip", 3, 32, 32)
    assert (written - expected).abs().max() < 1.01 / 127.5
    assert adapter_names(base.unet) == []
    assert json.loads((tmp_path / "clip.record.json").read_text())["seed"] == 1


def test_every_option_reaches_the_sampler_and_the_file(base, tmp_path):
    options = {"eta": 1.0, "spacing": "trailing", "steps": 2, "guidance_scale": 4.0, "num_frames": 2, "height": 40}
    settings = GenerateSettings(prompt=[PROMPT], out=str(tmp_path / "c"), seed=[8], negative_prompt="red", **options)
    generate_files(settings, base)
    expected = sample_videos(base, [PROMPT], [8], "red", **options)[0]
    assert (read_video(tmp_path / "c", 2, 40, 32) - expected).abs().max() < 1.01 / 127.5
    for name in options:
        left_out = {key: value for key, value in options.items() if key != name}
        other = sample_videos(base, [PROMPT], [8], "red", **left_out)[0]
        assert other.shape != expected.shape or (other - expected).abs().max() > 0.05, name
    assert (sample_videos(base, [PROMPT], [8], **options)[0] - expected).abs().max() > 0.05


def test_frames_a_second_are_as_asked(base, tmp_path):
    generate_files(GenerateSettings(prompt=["a"], out=str(tmp_path / "c.mp4"), steps=1, fps=5.0), base)
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert container.streams.video[0].average_rate == 5


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_a_generator_cannot_tell_apart_are_refused(base, tmp_path, seed):
    with pytest.raises(UserError, match="seed must be a whole number from 0 to 4294967295"):
        generate_files(GenerateSettings(prompt=["a"], out=str(tmp_path / "c.mp4"), seed=[seed]), base)


def test_noise_of_neighbouring_and_distant_seeds_differs():
    noises = {tuple(draw_noise(seed, (2, 1, 2, 2)).flatten().tolist()) for seed in (0, 1, 4096, 4097, 2**20, 2**32 - 1)}
    assert len(noises) == 6


def test_a_seeds_noise_is_the_one_diffusers_draws():
    reference = randn_tensor((1, 4, 3, 2, 2), generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_noise(5, (4, 3, 2, 2)), reference)


def test_the_same_seed_gives_the_same_bytes_whatever_the_memory_held(files, tmp_path):
    """x264 must not read what nobody wrote: two processes whose fresh memory is filled differently."""
    script = (
        "import sys, torch; from sampling import write_media; torch.manual_seed(0); "
        "write_media(sys.argv[1], torch.rand(4, 3, 64, 64) * 2 - 1)"
    )
    contents = []
    for fill in ("85", "170"):
        out = tmp_path / f"{fill}.mp4"
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", script, str(out)], env=environment, check=True)
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]


def test_frames_that_nothing_ties_together_are_warned_about(files, base, tmp_path):
    image_base = load_base(files.folder, device="cpu")
    image_base.recipe = base.recipe
    with pytest.warns(UserWarning, match="--motion_module"):
        generate_files(GenerateSettings(prompt=["a"], out=str(tmp_path / "c.mp4"), steps=1), image_base)


def test_several_prompts_and_seeds_are_numbered(tmp_path):
    settings = GenerateSettings(prompt=["a", "b"], out="clips/teddy.mp4", seed=[1, 7])
    assert [str(file) for _, _, file in clip_files(settings)] == [
        "clips/teddy-1-seed1.mp4",
        "clips/teddy-1-seed7.mp4",
        "clips/teddy-2-seed1.mp4",
        "clips/teddy-2-seed7.mp4",
    ]
    settings = GenerateSettings(prompt=["a"], out="clips/v1.5/", seed=[1, 7])
    assert [file.name for _, _, file in clip_files(settings)] == ["v1.5-1-seed1", "v1.5-1-seed7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "clip.avi"}, r"\.mp4"),
        ({"seed": [1, 1]}, "twice"),
        ({"prompt": []}, "at least one prompt"),
        ({"height": 100}, "104"),
        ({"steps": 0}, "1 to 1000"),
        ({"num_frames": 33}, "32"),
        ({"lora": ["nowhere"]}, "nowhere"),
        ({"lora": ["nowhere:abc"]}, "nowhere:abc does not exist"),
        ({"out": "."}, "no name"),
        ({"out": "clip.png"}, "one picture, not 3"),
        ({"fps": 0.0}, "fps"),
        ({"eta": -1.0}, "eta"),
    ],
)
def test_bad_settings_are_explained_and_nothing_is_written(base, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    settings = GenerateSettings(**{"prompt": [PROMPT], "out": "clip.mp4", **changes})
    with pytest.raises(UserError, match=message):
        generate_files(settings, base)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_clip(files, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    flags = [word for name, value in files.flags().items() for word in (f"--{name}", value)]
    sizes = ["--num_frames", "2", "--height", "32", "--width", "32", "--steps", "1", "--guidance_scale", "1"]
    main([*flags, *sizes, "--prompt", PROMPT, "--out", str(out), "--seed", "3"])
    assert read_video(out, 2, 32, 32).shape == (2, 3, 32, 32)
    assert str(Path(out)) in capsys.readouterr().out


def test_loras_on_the_same_layers_are_said_to_add(base, tmp_path, capsys):
    loras = write_loras(base, tmp_path, 0.3)
    other = shutil.copy(loras["motion"], tmp_path / "other.safetensors")
    with loaded_loras(base, [loras["appearance"], f"{loras['motion']}:0.5", str(other)]):
        on = [module for module in base.unet.modules() if len(getattr(module, "scales", {})) == 2]
    said = f"{loras['motion']}:0.5 and {other} sit on {len(on)} of the same layers: they add\n"
    assert capsys.readouterr().out == said
    assert on
