"""DDIM inversion against diffusers' scheduler and against closed forms, and MotionDirector's noise prior."""

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler
from oracles import error, reference_scheduler

from model import NoiseSchedule, UserError
from sampling import ddim_invert, ddim_sample, draw_noise, mixed_noise

ANIMATEDIFF = NoiseSchedule()
SPACINGS = ("leading", "linspace", "trailing")


def noise_of_the_timestep(latents, timestep):
    """A network whose prediction does not depend on the latents."""
    return draw_noise(timestep, latents.shape[1:])


def ideal_for_a_gaussian(latents, timestep, variance=0.25):
    """E[eps | x] for data x0 ~ N(0, variance)."""
    alpha = ANIMATEDIFF.alpha(torch.tensor([timestep]), latents)
    return (1 - alpha).sqrt() * latents / (alpha * variance + 1 - alpha)


@pytest.mark.parametrize("only_last", [None, 1, 25, 35])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [50, 35])
def test_what_does_not_depend_on_the_latents_is_inverted_exactly(steps, spacing, only_last):
    clean, options = torch.randn(1, 4, 2, 5, 5), {"spacing": spacing, "only_last": only_last}
    inverted = ddim_invert(noise_of_the_timestep, clean, ANIMATEDIFF, steps, **options)
    back = ddim_sample(noise_of_the_timestep, inverted, ANIMATEDIFF, steps, **options)
    assert error(inverted, clean) > 0.01
    assert ((back - clean).norm() / clean.norm()).item() < 3e-6


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # diffusers' inversion knows no linspace
@pytest.mark.parametrize(
    "schedule",
    [ANIMATEDIFF, NoiseSchedule("scaled_linear", prediction="v_prediction", final_alpha_one=False)],
    ids=["animatediff", "v_prediction"],
)
def test_every_step_equals_diffusers(schedule, spacing):
    scheduler = reference_scheduler(spacing, schedule, DDIMInverseScheduler)
    scheduler.set_timesteps(25)
    asked = []

    def network(latents, timestep):
        asked.append((timestep, latents))
        return torch.cos(2 * latents) - timestep / 700

    clean = torch.randn(1, 4, 2, 5, 5)
    ours = ddim_invert(network, clean, schedule, 25, spacing=spacing)
    by_us, expected = asked.copy(), clean
    for (timestep, latents), theirs in zip(by_us, scheduler.timesteps, strict=True):
        assert timestep == theirs
        assert error(latents, expected) < 1e-4
        expected = scheduler.step(network(expected, timestep), theirs, expected).prev_sample
    assert error(ours, expected) < 1e-4


# The figures are those of a calculation by hand for AnimateDiff's schedule and leading spacing.
@pytest.mark.parametrize(("steps", "scale"), [(25, 0.908), (50, 0.956), (100, 0.978)])
def test_a_gaussian_comes_back_smaller_by_a_share_that_halves_with_the_step(steps, scale):
    clean = torch.randn(1, 4, 2, 5, 5)
    inverted = ddim_invert(ideal_for_a_gaussian, clean, ANIMATEDIFF, steps)
    back = ddim_sample(ideal_for_a_gaussian, inverted, ANIMATEDIFF, steps)
    assert error(back, scale * clean) < 0.003


def test_a_gaussians_inversion_nears_the_exact_flow():
    """Its probability flow only scales: sqrt(a v + 1 - a) at every level, sqrt(v) at the clean one.

    However many the steps, the first goes from no noise to that of level 1, so the error does not vanish.
    """
    clean = torch.randn(1, 4, 2, 5, 5)

    def off(steps):
        last = ANIMATEDIFF.timesteps(steps)[0]
        alpha = ANIMATEDIFF.alphas_cumprod[last].item()
        exact = clean * math.sqrt((alpha * 0.25 + 1 - alpha) / 0.25)
        inverted = ddim_invert(ideal_for_a_gaussian, clean, ANIMATEDIFF, steps)
        return ((inverted - exact).norm() / exact.norm()).item()

    assert off(250) < 0.01
    assert off(250) < 0.7 * off(100) < 0.7 * off(50)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_refined_steps_are_given_back_exactly(prediction):
    schedule, clean = NoiseSchedule(prediction=prediction), torch.randn(1, 4, 2, 5, 5)

    def denoise(latents, timestep):
        eps = ideal_for_a_gaussian(latents, timestep)
        if prediction == "epsilon":
            return eps
        alpha = schedule.alpha(torch.tensor([timestep]), latents)
        return (eps - (1 - alpha).sqrt() * latents) / alpha.sqrt()

    def off(refine):
        inverted = ddim_invert(denoise, clean, schedule, 25, refine=refine)
        return error(ddim_sample(denoise, inverted, schedule, 25), clean)

    assert off(1) < 0.5 * off(0)
    assert off(20) < 1e-4


@pytest.mark.parametrize("only_last", [1, 10, 25])
def test_inverting_the_last_steps_reaches_their_level(only_last):
    """With one and the same noise predicted throughout, every level is sqrt(a) z + sqrt(1 - a) eps."""
    clean, noise = torch.randn(2, 1, 4, 2, 3, 3).unbind()
    reached = ddim_invert(lambda x, t: noise, clean, ANIMATEDIFF, 25, only_last=only_last)
    level = torch.tensor([1 + 40 * (only_last - 1)])
    assert error(reached, ANIMATEDIFF.add_noise(clean, noise, level)) < 1e-4


def test_none_of_the_steps_changes_nothing():
    clean = torch.randn(1, 4, 1, 2, 2)
    assert torch.equal(ddim_invert(ideal_for_a_gaussian, clean, ANIMATEDIFF, 10, only_last=0), clean)
    assert torch.equal(ddim_sample(ideal_for_a_gaussian, clean, ANIMATEDIFF, 10, only_last=0), clean)


@pytest.mark.parametrize("only_last", [-1, 11])
def test_more_steps_than_there_are_cannot_be_taken(only_last):
    for way in (ddim_invert, ddim_sample):
        with pytest.raises(UserError, match=f"of 10 steps the last 0 to 10 .* not {only_last}"):
            way(ideal_for_a_gaussian, torch.randn(1, 4, 1, 2, 2), ANIMATEDIFF, 10, only_last=only_last)


def test_latents_that_are_not_finite_are_reported():
    with pytest.raises(UserError, match="inversion gave latents that are not finite"):
        ddim_invert(lambda x, t: x * float("nan"), torch.randn(1, 4, 1, 2, 2), ANIMATEDIFF, 2)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_noise_prior_keeps_the_variance_and_correlates_as_asked(share):
    inverted, noise = torch.randn(1, 4, 16, 32, 32), torch.randn(3, 4, 16, 32, 32)
    mixed = mixed_noise(inverted, noise, share)
    assert mixed.shape == noise.shape
    assert mixed.std().item() == pytest.approx(1, abs=0.01)
    for clip, own in zip(mixed, noise, strict=True):
        pairs = torch.corrcoef(torch.stack([clip.flatten(), inverted.flatten(), own.flatten()]))[0, 1:]
        assert pairs.square().tolist() == pytest.approx([share, 1 - share], abs=0.02)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match="from 0 to 1"):
        mixed_noise(torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2), share)
