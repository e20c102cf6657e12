"""Stage 3: references and the loss, against independent loops over the same network."""

import pytest
import torch
from lora_files import SPATIAL, kohya, random_weights
from oracles import reference_scheduler
from safetensors.torch import save_file
from two_loras import PROMPTS, TARGET, filled_in, logged_losses, lora_files, texts, write_loras

from lora import (
    adapter_parameters,
    adapters,
    merge_adapters,
    remove_adapter,
    unmerge_adapters,
)
from model import Recipe, UserError
from sampling import draw_noise, encode, sample_latents
from train.loop import derived_seed
from train.stage import predict
from train.ttt import TTTSettings, references, students, train_ttt
from weights import load_lora


@pytest.fixture
def settings(base, tmp_path):
    paths = write_loras(base, tmp_path, strength=0.3)
    return TTTSettings(**paths, prompt=TARGET, out=str(tmp_path / "run"), steps=2)


def test_the_papers_numbers_are_the_defaults(base, settings):
    base.recipe = Recipe()
    full = filled_in(TTTSettings(**{**vars(settings), "steps": None}), base)
    assert (full.steps, full.learning_rate, full.reference_steps, full.guidance_scale) == (30, 1e-6, 5, 9.0)
    assert (full.reference, full.reference_spacing, full.reference_every) == ("whole", "trailing", 1)
    assert (full.shared_noise, full.debiased) == (False, False)
    assert (full.appearance_prompt, full.motion_prompt) == (PROMPTS["appearance"], PROMPTS["motion"])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reference", ["whole", "partial"])
def test_references_are_what_the_sampler_gives_with_one_lora_on(base, settings, reference, shared):
    full = filled_in(TTTSettings(**{**vars(settings), "reference": reference, "shared_noise": shared}), base)
    text = texts(base)
    with students(base, lora_files(settings), 0.1):
        for p in (p for name in ("appearance", "motion") for p in adapter_parameters(base.unet, name)):
            p.data += 1.0  # whatever the students have become
        base.unet.train()
        drawn = dict(zip(("appearance", "motion"), references(base, full, text, step=4), strict=True))
        base.unet.eval()
    steps = {"steps": 2, "spacing": "trailing"} if reference == "whole" else {"steps": 3, "only_first": 2}
    for kind, motion in (("appearance", False), ("motion", True)):
        load_lora(base.unet, getattr(settings, kind))
        with adapters(base.unet, {kind: 1.0}):
            expected = sample_latents(
                base,
                text[kind],
                text["negative"],
                [derived_seed(0, kind, 4)],
                motion=motion,
                guidance_scale=9.0,
                shared_noise=shared and kind == "appearance",
                **steps,
            )
        remove_adapter(base.unet, kind)
        assert torch.equal(drawn[kind], expected)


def test_new_references_come_every_step_or_as_asked(base, settings):
    full = filled_in(settings, base)
    with students(base, lora_files(settings), 0.1):
        first, again, later = (references(base, full, texts(base), step) for step in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, later, strict=True))


def independent_sample(base, seed, text, negative, motion, guidance_scale=9.0, spacing="trailing", steps=2, first=2):
    """DDIM steps of diffusers' scheduler with guidance, the network called twice a step."""
    scheduler = reference_scheduler(spacing)
    scheduler.set_timesteps(steps)
    latents = draw_noise(seed, (4, 3, 4, 4))
    for t in scheduler.timesteps[:first]:
        with_text, without = (base.unet(latents, t.item(), words, motion=motion) for words in (text, negative))
        latents = scheduler.step(without + guidance_scale * (with_text - without), t, latents).prev_sample
    return latents


@torch.no_grad()
def independent_losses(base, step, drawn_at=None, prompts=None, skew=1.0, **options):
    """Two mean squared errors under the target prompt, noise and t drawn as a step draws them."""
    text = {role: encode(base, [prompt]) for role, prompt in {**PROMPTS, **(prompts or {})}.items()}
    target, negative = encode(base, [TARGET]), encode(base, [""])
    generator = torch.Generator().manual_seed(derived_seed(0, "step", step))
    alphas = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)
    losses = []
    for kind, motion in (("appearance", False), ("motion", True)):
        seed = derived_seed(0, kind, step if drawn_at is None else drawn_at)
        z = independent_sample(base, seed, text[kind], negative, motion, **options)
        if "first" in options:  # z is at the level of step 1 of (667, 334, 1), and goes back up to 334
            t, kept = torch.tensor([334]), alphas[334] / alphas[1]
        else:
            even = torch.randint(1000, (1,), generator=generator).item()
            t = torch.tensor([int(1000 * ((even + 0.5) / 1000) ** skew)])
            kept = alphas[t]
        eps = torch.randn(z.shape, generator=generator)
        noisy = kept.sqrt() * z + (1 - kept).sqrt() * eps
        losses.append((base.unet(noisy, t, target) - eps).square().mean().item())
    return losses


@pytest.mark.parametrize(
    ("asked", "loop"),
    [
        ({}, {}),
        ({"guidance_scale": 3.0}, {"guidance_scale": 3.0}),
        ({"timestep_skew": 0.5}, {"skew": 0.5}),
        ({"reference_spacing": "leading"}, {"spacing": "leading"}),
        ({"appearance_prompt": "a red ball"}, {"prompts": {"appearance": "a red ball"}}),
        ({"motion_prompt": "a dog runs"}, {"prompts": {"motion": "a dog runs"}}),
        ({"reference": "partial"}, {"steps": 3, "spacing": "leading", "first": 2}),
    ],
)
def test_every_option_of_the_references_acts_in_every_step(base, tmp_path, asked, loop):
    """B stays at zero at a learning rate of 1e-12: each logged loss is an independent loop's over the base."""
    paths = write_loras(base, tmp_path, strength=0.0)
    still = {"steps": 2, "learning_rate": 1e-12, "dropout": 0.0}
    train_ttt(TTTSettings(**paths, prompt=TARGET, out=str(tmp_path / "run"), **still, **asked), base)
    for step in range(2):
        expected = independent_losses(base, step, **loop)
        assert logged_losses(tmp_path / "run", step) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("every", "drawn_at"), [(1, [0, 1, 2, 3]), (2, [0, 0, 2, 2]), (0, [0, 0, 0, 0])])
def test_references_are_drawn_as_often_as_asked(base, tmp_path, every, drawn_at):
    paths = write_loras(base, tmp_path, strength=0.0)
    still = {"steps": 4, "learning_rate": 1e-12, "dropout": 0.0, "reference_every": every}
    train_ttt(TTTSettings(**paths, prompt=TARGET, out=str(tmp_path / "run"), **still), base)
    for step, drawn in enumerate(drawn_at):
        expected = independent_losses(base, step, drawn_at=drawn)
        assert logged_losses(tmp_path / "run", step) == pytest.approx(expected, rel=1e-3)


def test_sixty_references_start_from_sixty_noises():
    seeds = {derived_seed(0, kind, step) for kind in PROMPTS for step in range(30)}
    noises = torch.stack([draw_noise(seed, (4, 1, 2, 2)).flatten() for seed in seeds])
    assert len({tuple(noise.tolist()) for noise in noises}) == 60


def test_with_both_b_at_zero_the_losses_are_an_independent_loops_over_the_base(base, tmp_path):
    paths = write_loras(base, tmp_path, strength=0.0)
    train_ttt(TTTSettings(**paths, prompt=TARGET, out=str(tmp_path / "run"), steps=1), base)
    assert logged_losses(tmp_path / "run", 0) == pytest.approx(independent_losses(base, 0), rel=1e-4)


def test_with_loras_the_first_losses_are_those_of_merged_networks(base, settings, tmp_path):
    """The same loop, each network made by merging its LoRAs into the weights; dropout 0, so that nothing else acts."""
    train_ttt(TTTSettings(**{**vars(settings), "dropout": 0.0, "steps": 1}), base)
    text, losses = texts(base), []
    generator = torch.Generator().manual_seed(derived_seed(0, "step", 0))
    names = {kind: next(iter(load_lora(base.unet, getattr(settings, kind)))) for kind in PROMPTS}
    with torch.no_grad():
        for kind, motion in (("appearance", False), ("motion", True)):
            merge_adapters(base.unet, {names[kind]: 1.0})
            z = independent_sample(base, derived_seed(0, kind, 0), text[kind], text["negative"], motion)
            unmerge_adapters(base.unet)
            merge_adapters(base.unet, dict.fromkeys(names.values(), 1.0))
            prediction, target = predict(base.unet, base.schedule, z, text["student"], generator)
            unmerge_adapters(base.unet)
            losses.append((prediction - target).square().mean().item())
    assert logged_losses(tmp_path / "run", 0) == pytest.approx(losses, rel=1e-3)


def test_a_partial_reference_is_noised_by_the_one_step_it_came_down(base, settings):
    from train.ttt import partial_prediction

    full = filled_in(TTTSettings(**{**vars(settings), "reference": "partial"}), base)
    seen = {}

    class Network:
        dtype, device = torch.float32, torch.device("cpu")

        def __call__(self, noisy, timestep, text):
            seen.update(noisy=noisy, timestep=timestep)
            return noisy

    real, base.unet = base.unet, Network()
    z = torch.randn(1, 4, 3, 4, 4)
    _, target = partial_prediction(base, full, z, None, torch.Generator().manual_seed(1))
    base.unet = real
    # 3 sampling steps visit 667, 334, 1; after 2 of them z is at the level of step 1, and goes back up to 334
    betas = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
    kept = torch.prod(1 - betas[2:335]).float()
    assert seen["timestep"] == 334
    assert torch.allclose(seen["noisy"], kept.sqrt() * z + (1 - kept).sqrt() * target, atol=1e-4)


def test_the_debiased_option_changes_the_temporal_loss_alone(base, settings, tmp_path):
    rows = []
    for name, debiased in (("plain", False), ("debiased", True)):
        changes = {"out": str(tmp_path / name), "debiased": debiased, "steps": 1}
        train_ttt(TTTSettings(**{**vars(settings), **changes}), base)
        rows.append(logged_losses(tmp_path / name, 0))
    assert rows[0][0] == rows[1][0]
    assert rows[1][1] > 2 * rows[0][1]


def test_a_lora_of_another_tool_is_no_start(base, settings, tmp_path):
    """It says neither its prompt nor its layers; --lora of `generate` is its place."""
    weights = kohya(random_weights(base.unet, SPATIAL + "proj_out"))
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "k.safetensors")
    changed = TTTSettings(**{**vars(settings), "appearance": str(tmp_path / "k.safetensors")})
    with pytest.raises(UserError, match=r"kohya.*belongs in --lora\. Here a LoRA that customttt trained is wanted"):
        train_ttt(changed, base)
