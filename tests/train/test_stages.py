"""Stages 1 and 2 on the narrow random base: what they train on, what they write, how they stop and go on."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import appearance, motion

from lora import adapter_names
from model import NoiseSchedule, UserError
from sampling import encode, encode_videos, read_video, sample_videos
from sampling.generate import GenerateSettings, generate_files
from train.appearance import AppearanceSettings, train_appearance
from train.motion import MotionSettings, train_motion
from train.stage import predict
from weights import load_base, read_lora_header


def test_the_papers_numbers_are_the_defaults(base, material, tmp_path):
    from model import Recipe
    from train.appearance import with_defaults as looks_defaults
    from train.motion import with_defaults as motion_defaults

    base.recipe = Recipe()
    looks = looks_defaults(AppearanceSettings(images="a", prompt="b", out="c"), base)
    moves = motion_defaults(MotionSettings(video="a", prompt="b", out="c"), base)
    common = {"rank": 32, "dropout": 0.1, "weight_decay": 0.1, "steps": 500, "height": 256, "num_frames": 16}
    assert {name: getattr(looks, name) for name in common} == common
    assert {name: getattr(moves, name) for name in common} == common
    assert (looks.layers, looks.learning_rate) == ([2, 6], 1e-5)
    assert (moves.layers, moves.learning_rate) == ([2, 5], 5e-5)


@pytest.mark.parametrize("stage", ["appearance", "motion"])
def test_a_run_folder_holds_settings_log_and_lora(base, material, tmp_path, stage):
    settings, train = {"appearance": (appearance, train_appearance), "motion": (motion, train_motion)}[stage]
    assert train(settings(material, tmp_path / "run"), base) == tmp_path / "run" / "lora.safetensors"
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "inputs.json",
        "log.csv",
        "lora.safetensors",
        "settings.json",
    ]
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert kept["rank"] == 4
    assert kept["steps"] == 3
    header = read_lora_header(tmp_path / "run")
    entry = header.adapters[stage]
    assert entry.spec.layers == {"appearance": (2, 6), "motion": (2, 5)}[stage]
    assert entry.spec.kind == {"appearance": "spatial", "motion": "temporal"}[stage]
    assert entry.prompt == {"appearance": "a teddy bear", "motion": "a man runs"}[stage]
    assert header.fingerprints == base.fingerprints
    assert all(value.any() for value in load_file(tmp_path / "run" / "lora.safetensors").values())
    assert adapter_names(base.unet) == []


def test_appearance_trains_without_a_motion_module_on_each_picture_with_its_caption(files, material, tmp_path):
    """An image-only base gives the LoRA that the base with motion modules gives: they are bypassed."""
    results = []
    for name, adapter in (("image", None), ("video", files.adapter)):
        base = load_base(files.folder, adapter, device="cpu")
        settings = appearance(material, tmp_path / name, rank=4, height=32, width=32)
        results.append(load_file(train_appearance(settings, base)))
    assert results[0].keys() == results[1].keys()
    assert all(torch.allclose(results[0][key], results[1][key], atol=1e-6) for key in results[0])


def test_a_pictures_own_caption_changes_what_is_learnt(base, material, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for i in range(3):
        Image.open(material / "photos" / f"{i}.png").save(plain / f"{i}.png")
    settings = appearance(material, tmp_path / "a", steps=6, seed=1)
    with_caption = load_file(train_appearance(settings, base))
    settings = appearance(material, tmp_path / "b", steps=6, seed=1, images=str(plain))
    without = load_file(train_appearance(settings, base))
    assert any(not torch.equal(with_caption[key], without[key]) for key in with_caption)


def test_a_step_noises_the_latents_and_asks_for_the_noise(base):
    """The student's input and target, rebuilt from the generator's draws."""
    latents, text = torch.randn(2, 4, 3, 4, 4), encode(base, ["a ball", "a dog"])
    prediction, target = predict(base.unet, base.schedule, latents, text, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    t = torch.randint(1000, (2,), generator=generator)
    noise = torch.randn(2, 4, 3, 4, 4, generator=generator)
    a = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), 0)[t].float()
    a = a[:, None, None, None, None]
    assert torch.equal(target, noise)
    with torch.no_grad():
        expected = base.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, t, text)
    assert torch.allclose(prediction, expected, atol=1e-4)


@pytest.mark.parametrize("skew", [1.0, 0.5])
def test_every_diffusion_step_can_be_drawn(base, skew):
    """The mean of 1000 u ** skew is 1000 / (1 + skew), rounded down; u is one of 0.0005, 0.0015, ..."""
    drawn = []

    class Recorder(NoiseSchedule):
        def add_noise(self, latents, noise, timesteps):
            drawn.extend(timesteps.tolist())
            return super().add_noise(latents, noise, timesteps)

    class Network:
        dtype, device = torch.float32, torch.device("cpu")

        def __call__(self, noisy, timesteps, text, motion):
            return noisy

    generator = torch.Generator().manual_seed(0)
    predict(Network(), Recorder(), torch.zeros(20_000, 1, 1, 1, 1), None, generator, skew=skew)
    assert min(drawn) == int(1000 * 0.0005**skew)
    assert max(drawn) == 999
    assert sum(drawn) / len(drawn) == pytest.approx(1000 / (1 + skew) - 0.5, abs=8)


def test_motion_learns_with_the_debiased_loss_unless_told_otherwise(base, material, tmp_path):
    losses = []
    for name, debiased in (("with", True), ("without", False)):
        train_motion(motion(material, tmp_path / name, steps=1, debiased=debiased), base)
        losses.append(float((tmp_path / name / "log.csv").read_text().splitlines()[1].split(",")[1]))
    assert losses[0] > 2 * losses[1]


def test_latents_are_drawn_from_the_encoders_distribution(base):
    videos = torch.rand(1, 3, 2, 32, 32) * 2 - 1
    latents = encode_videos(base, videos)
    moments = base.vae.encode(videos[:, :, 1])
    mean, log_variance = moments.chunk(2, dim=1)
    assert torch.allclose(latents.mean[:, :, 1], mean * 0.18215, atol=1e-5)
    assert torch.allclose(latents.std[:, :, 1], (log_variance / 2).exp() * 0.18215, atol=1e-5)


def test_previews_equal_what_generate_gives_with_the_same_seed(base, material, tmp_path):
    settings = motion(material, tmp_path / "run", steps=2, preview_every=2, seed=5, learning_rate=1e-2)
    train_motion(settings, base)
    preview = read_video(tmp_path / "run" / "previews" / "step-00002.mp4", 3, 32, 32)
    generated = tmp_path / "clip.mp4"
    generate_files(
        GenerateSettings(prompt=["a man runs"], out=str(generated), lora=[str(tmp_path / "run")], seed=[5]), base
    )
    assert torch.equal(read_video(generated, 3, 32, 32), preview)
    untrained = sample_videos(base, ["a man runs"], [5])[0]
    assert (untrained - preview).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [4]}, "layer 4 has no motion module"),
        ({"num_frames": 6}, "5"),
        ({"height": 36}, "divisible by 8"),
        ({"video": "nowhere.mp4"}, "nowhere"),
        ({"steps": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"learning_rate": 1e39}, "at most 1"),
        ({"seed": -5}, "seed must be from 0"),
        ({"rank": 0}, "rank"),
        ({"batch_size": -1}, "batch_size must be at least 1, and is -1"),
        ({"timestep_skew": 0.0}, "timestep_skew must be above 0 and at most 10, and is 0"),
    ],
)
def test_bad_settings_leave_no_folder_and_a_clean_network(base, material, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_motion(motion(material, tmp_path / "run", **changes), base)
    assert not (tmp_path / "run").exists()
    assert adapter_names(base.unet) == []


def test_the_trigger_must_be_in_the_prompt(base, material, tmp_path):
    with pytest.raises(UserError, match="sks"):
        train_appearance(appearance(material, tmp_path / "run", trigger="sks"), base)
    lora = train_appearance(appearance(material, tmp_path / "run", trigger="teddy bear"), base)
    assert read_lora_header(lora).adapters["appearance"].trigger == "teddy bear"


def test_motion_without_a_motion_module_says_what_to_give(files, material, tmp_path):
    base = load_base(files.folder, device="cpu")
    with pytest.raises(UserError, match="--motion_module"):
        train_motion(motion(material, tmp_path / "run", num_frames=3, height=32, width=32), base)


def test_gradient_checkpointing_trains_the_same_lora(base, material, tmp_path):
    plain = load_file(train_motion(motion(material, tmp_path / "a", steps=2), base))
    less = load_file(train_motion(motion(material, tmp_path / "b", steps=2, gradient_checkpointing=True), base))
    assert all(torch.allclose(plain[key], less[key], atol=1e-6) for key in plain)


def test_a_long_prompt_is_warned_about_with_what_was_cut(base, material, tmp_path):
    with pytest.warns(UserWarning, match="the very last words"):
        train_motion(motion(material, tmp_path / "run", prompt="a man " * 80 + "the very last words"), base)
