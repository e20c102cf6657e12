"""Stages 1 and 2 against loops written from the paper: what goes in, what is drawn, what is asked for.

A learning rate of 1e-12 keeps B at zero, so that every logged loss is the base's own.
"""

import pytest
import torch
from clips import smooth
from oracles import sampled_latents
from small_runs import logged

import train.stage as stage
from lora import adapter_modules
from sampling import derived_seed, encode, read_image, read_video, write_media
from train.appearance import AppearanceSettings, train_appearance
from train.motion import MotionSettings, train_motion
from weights import load_lora

STILL = {"learning_rate": 1e-12, "dropout": 0.0, "steps": 4, "seed": 3}
BETAS = {
    "linear": torch.linspace(0.00085, 0.012, 1000),
    "scaled_linear": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    root = tmp_path_factory.mktemp("material")
    for i, size in enumerate([(48, 80), (40, 40), (64, 48)]):
        (root / "photos").mkdir(exist_ok=True)
        smooth(*size).rotate(90 * i).save(root / "photos" / f"{i}.png")
        (root / "photos" / f"{i}.txt").write_text(["a red ball", "a blue star on the beach", "a teddy"][i])
    write_media(root / "clip.mp4", torch.rand(12, 3, 32, 32) * 2 - 1, fps=10)
    return root


@torch.no_grad()
def prediction_error(base, latents, text, generator, betas, motion):
    """eps_theta(z_t, t, c) - eps for a uniform t."""
    t = torch.randint(1000, (1,), generator=generator)
    eps = torch.randn(latents.shape, generator=generator)
    kept = torch.cumprod(1 - betas, 0)[t]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * eps
    return base.unet(noisy, t, text, motion=motion) - eps


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_stage_1_denoises_single_pictures_under_their_captions(base, material, tmp_path, beta_schedule):
    settings = AppearanceSettings(
        images=str(material / "photos"), prompt="x", out=str(tmp_path / "run"), beta_schedule=beta_schedule, **STILL
    )
    train_appearance(settings, base)
    expected = []
    for step in range(4):
        generator = torch.Generator().manual_seed(derived_seed(3, "step", step))
        i = int(torch.randint(3, (1,), generator=generator))
        noise = torch.randn(1, 4, 1, 4, 4, generator=generator)
        latents = sampled_latents(base, read_image(material / "photos" / f"{i}.png", 32, 32)[None], noise)
        text = encode(base, [(material / "photos" / f"{i}.txt").read_text()])
        error = prediction_error(base, latents, text, generator, BETAS[beta_schedule], motion=False)
        expected.append(error.square().mean().item())
    assert logged(tmp_path / "run") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("taken", [{}, {"frame_step": 3}, {"start": 0.5}, {"fps": 5.0}])
@pytest.mark.parametrize("debiased", [True, False])
def test_stage_2_denoises_the_ordered_clip_with_and_without_the_debiased_term(
    base, material, tmp_path, taken, debiased
):
    settings = MotionSettings(
        video=str(material / "clip.mp4"), prompt="a man", out=str(tmp_path), debiased=debiased, **taken, **STILL
    )
    train_motion(settings, base)
    frames, text = read_video(material / "clip.mp4", 3, 32, 32, **taken), encode(base, ["a man"])
    expected = []
    for step in range(4):
        generator = torch.Generator().manual_seed(derived_seed(3, "step", step))
        latents = sampled_latents(base, frames, torch.randn(1, 4, 3, 4, 4, generator=generator))
        error = prediction_error(base, latents, text, generator, BETAS["linear"], motion=True)
        loss = error.square().mean()
        if debiased:
            anchor = int(torch.randint(3, (), generator=generator))
            terms = [(2**0.5 * error[:, :, i] - error[:, :, anchor]).square().mean() for i in range(3)]
            loss = loss + sum(terms) / 3
        expected.append(loss.item())
    assert logged(tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["appearance", "motion"])
def test_a_batch_has_the_mean_loss_of_its_members(base, material, tmp_path, kind):
    """Against a loop over the batch: each has its own picture, noise and timestep."""
    common = {"prompt": "a man", "out": str(tmp_path), "batch_size": 3, **STILL}
    if kind == "appearance":
        train_appearance(AppearanceSettings(images=str(material / "photos"), **common), base)
    else:
        train_motion(MotionSettings(video=str(material / "clip.mp4"), debiased=False, **common), base)
    expected = []
    for step in range(4):
        generator = torch.Generator().manual_seed(derived_seed(3, "step", step))
        members = []
        if kind == "appearance":
            for i in torch.randint(3, (3,), generator=generator).tolist():
                words = (material / "photos" / f"{i}.txt").read_text()
                members.append((read_image(material / "photos" / f"{i}.png", 32, 32)[None], words))
        else:
            members = 3 * [(read_video(material / "clip.mp4", 3, 32, 32), "a man")]
        shape = (3, 4, len(members[0][0]), 4, 4)
        spread = torch.randn(shape, generator=generator)
        timesteps = torch.randint(1000, (3,), generator=generator)
        eps = torch.randn(shape, generator=generator)
        errors = []
        for b, (images, words) in enumerate(members):
            latents, kept = sampled_latents(base, images, spread[b : b + 1]), torch.cumprod(1 - BETAS["linear"], 0)
            kept = kept[timesteps[b]]
            noisy = kept.sqrt() * latents + (1 - kept).sqrt() * eps[b : b + 1]
            with torch.no_grad():
                found = base.unet(noisy, timesteps[b : b + 1], encode(base, [words]), motion=kind == "motion")
            errors.append((found - eps[b : b + 1]).square().mean())
        expected.append((sum(errors) / 3).item())
    assert logged(tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("train", "name"), [(train_appearance, "appearance"), (train_motion, "motion")])
def test_what_is_set_reaches_the_loop_and_the_adapter(base, material, tmp_path, monkeypatch, train, name):
    seen = {}

    def spy(unet, names, losses, settings, folder, preview, further):
        seen.update(names=names, loop=settings, checkpointing={layer.checkpointing for layer in unet.layers})
        seen["dropout"] = {module.dropout for module in adapter_modules(unet, name).values()}
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "train", spy)
    common = {
        "prompt": "x",
        "out": str(tmp_path / "run"),
        "steps": 7,
        "learning_rate": 2e-3,
        "weight_decay": 0.3,
        "dropout": 0.25,
        "seed": 9,
        "save_every": 4,
        "preview_every": 2,
        "gradient_checkpointing": True,
    }
    settings = {
        "appearance": lambda: AppearanceSettings(images=str(material / "photos"), **common),
        "motion": lambda: MotionSettings(video=str(material / "clip.mp4"), **common),
    }[name]()
    with pytest.raises(KeyboardInterrupt):
        train(settings, base)
    assert (seen["names"], seen["dropout"], seen["checkpointing"]) == ([name], {0.25}, {True})
    loop = seen["loop"]
    assert (loop.steps, loop.learning_rate, loop.weight_decay, loop.seed) == (7, 2e-3, 0.3, 9)
    assert (loop.save_every, loop.preview_every) == (4, 2)


def test_dropout_acts_in_training(base, material, tmp_path):
    losses = []
    for dropout in (0.0, 0.5):
        changes = {**STILL, "dropout": dropout, "learning_rate": 1e-2}
        out = tmp_path / str(dropout)
        train_motion(MotionSettings(video=str(material / "clip.mp4"), prompt="a man", out=str(out), **changes), base)
        losses.append(logged(out))
    assert losses[0][0] == losses[1][0]  # B is zero
    assert losses[0][1:] != losses[1][1:]


def test_the_seed_is_where_a_starts(base, material, tmp_path):
    starts = {}
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        changes = {**STILL, "seed": seed, "steps": 1}
        settings = MotionSettings(video=str(material / "clip.mp4"), prompt="a", out=str(tmp_path / run), **changes)
        load_lora(base.unet, train_motion(settings, base), {"motion": run})
        starts[run] = next(iter(adapter_modules(base.unet, run).values())).A
    assert torch.equal(starts["a"], starts["b"])
    assert not torch.allclose(starts["a"], starts["c"])


def test_the_vae_and_the_text_encoder_wait_on_the_cpu_and_come_back(base):
    with stage.set_aside(base):
        assert base.vae.quant_conv.weight.device.type == "cpu"
    moved = []
    base.vae.to = lambda device: moved.append(device)
    with stage.set_aside(base):
        assert moved == [torch.device("cpu")]
    assert len(moved) == 2
