"""DDIM against diffusers' scheduler, step by step, and against a closed form."""

import pytest
import torch
from oracles import error, reference_scheduler

from model import NoiseSchedule, UserError
from sampling import ddim_sample


def toy_network(latents, timestep):
    return torch.sin(3 * latents) + timestep / 1000


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule(), NoiseSchedule("scaled_linear", prediction="v_prediction", final_alpha_one=False)],
    ids=["animatediff", "v_prediction"],
)
def test_every_step_equals_diffusers(spacing, eta, schedule):
    scheduler = reference_scheduler(spacing, schedule)
    scheduler.set_timesteps(25)
    start = torch.randn(1, 4, 2, 5, 5)
    noises = [torch.randn_like(start) for _ in range(25)]
    expected, seen = start, []
    for timestep, noise in zip(scheduler.timesteps, noises, strict=True):
        seen.append(expected)
        output = toy_network(expected, timestep.item())
        expected = scheduler.step(
            output, timestep, expected, eta=eta, variance_noise=noise if eta else None
        ).prev_sample
    visited = []

    def recording(latents, timestep):
        visited.append(latents)
        return toy_network(latents, timestep)

    ours = ddim_sample(recording, start, schedule, 25, spacing=spacing, eta=eta, step_noise=noises.__getitem__)
    for step, (mine, theirs) in enumerate(zip(visited, seen, strict=True)):
        assert error(mine, theirs) < 1e-4, step
    assert error(ours, expected) < 1e-4


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_perfect_denoiser_of_one_point_finds_it_in_any_number_of_steps(steps):
    """For data that is the single point z0, eps(x, t) = (x - sqrt(a) z0) / sqrt(1 - a), and DDIM is exact."""
    schedule, point = NoiseSchedule(), torch.randn(1, 4, 1, 3, 3)

    def denoise(latents, timestep):
        alpha = schedule.alpha(torch.tensor([timestep]), latents)
        return (latents - alpha.sqrt() * point) / (1 - alpha).sqrt()

    found = ddim_sample(denoise, torch.randn_like(point), schedule, steps, spacing="trailing")
    assert error(found, point) < 1e-3


def test_stopping_early_leaves_latents_of_the_level_reached():
    schedule, point = NoiseSchedule(), torch.randn(1, 4, 1, 3, 3)
    noise = torch.randn_like(point)
    levels = []

    def constant_noise(latents, timestep):
        levels.append(timestep)
        return noise

    start = schedule.add_noise(point, noise, torch.tensor([961]))
    partial = ddim_sample(constant_noise, start, schedule, 25, only_first=5)
    assert levels == [961, 921, 881, 841, 801]
    assert error(partial, schedule.add_noise(point, noise, torch.tensor([761]))) < 1e-3


def test_latents_that_are_not_finite_are_reported():
    with pytest.raises(UserError, match="not finite"):
        ddim_sample(lambda x, t: x * float("nan"), torch.randn(1, 4, 1, 2, 2), NoiseSchedule(), 2)


def test_eta_needs_noise():
    with pytest.raises(UserError, match="step_noise"):
        ddim_sample(toy_network, torch.randn(1, 4, 1, 2, 2), NoiseSchedule(), 2, eta=1.0)
