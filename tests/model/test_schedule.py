"""The noise schedule against diffusers' scheduler and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler

from model import NoiseSchedule, UserError


@pytest.mark.parametrize(("name", "last"), [("linear", 0.001579), ("scaled_linear", 0.004660)])
def test_alphas_are_those_of_the_named_betas(name, last):
    alphas = NoiseSchedule(beta_schedule=name).alphas_cumprod
    reference = DDIMScheduler(beta_schedule=name, beta_start=0.00085, beta_end=0.012).alphas_cumprod
    assert torch.allclose(alphas, reference, rtol=1e-5)
    assert alphas[-1].item() == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 5, 7, 25, 30, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_visited_steps_are_those_of_diffusers(spacing, steps):
    reference = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    reference.set_timesteps(steps)
    # numpy's arange gives diffusers one step too many where 1000 / steps is not exact: it lands below 0
    expected = [t for t in reference.timesteps.tolist() if t >= 0]
    assert NoiseSchedule().timesteps(steps, spacing) == expected


def test_animatediff_visits_961_to_1():
    visited = NoiseSchedule().timesteps(25)
    assert (visited[0], visited[1], visited[-1]) == (961, 921, 1)


def test_trailing_starts_at_pure_noise():
    assert NoiseSchedule().timesteps(5, "trailing") == [999, 799, 599, 399, 199]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_gives_latents_and_noise_back(prediction):
    schedule = NoiseSchedule(prediction=prediction)
    latents, noise, timesteps = torch.randn(3, 4, 2, 5, 5), torch.randn(3, 4, 2, 5, 5), torch.tensor([0, 400, 800])
    noisy = schedule.add_noise(latents, noise, timesteps)
    clean, eps = schedule.split(schedule.target(latents, noise, timesteps), noisy, timesteps)
    assert torch.allclose(clean, latents, atol=1e-4)
    assert torch.allclose(eps, noise, atol=1e-4)


def test_noise_and_velocity_are_those_of_diffusers():
    schedule = NoiseSchedule(prediction="v_prediction")
    reference = DDIMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    latents, noise, timesteps = torch.randn(2, 4, 2, 5, 5), torch.randn(2, 4, 2, 5, 5), torch.tensor([10, 990])
    assert torch.allclose(
        schedule.add_noise(latents, noise, timesteps), reference.add_noise(latents, noise, timesteps), atol=1e-6
    )
    assert torch.allclose(
        schedule.target(latents, noise, timesteps), reference.get_velocity(latents, noise, timesteps), atol=1e-6
    )


def test_the_step_below_zero_has_no_noise_or_that_of_step_0():
    like = torch.zeros(1, 4, 1, 2, 2)
    below = torch.tensor([-40])
    assert NoiseSchedule().alpha(below, like).item() == 1
    kept = NoiseSchedule(final_alpha_one=False)
    assert kept.alpha(below, like).item() == kept.alphas_cumprod[0]


@pytest.mark.parametrize("steps", [0, 1001])
def test_too_few_or_too_many_steps_are_refused(steps):
    with pytest.raises(UserError, match="1 to 1000"):
        NoiseSchedule().timesteps(steps)


def test_a_thousand_leading_steps_do_not_fit():
    with pytest.raises(UserError, match="trailing"):
        NoiseSchedule().timesteps(1000, "leading")


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="scaled_linear"):
        NoiseSchedule(beta_schedule="sqrt_linear")
    with pytest.raises(UserError, match="trailing"):
        NoiseSchedule().timesteps(5, "karras")
