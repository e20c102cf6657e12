"""The losses against brute-force loops and closed forms."""

import pytest
import torch

from model import NoiseSchedule
from train.losses import debiased_loss, motion_loss, noise_loss, noise_weights


def brute_force_debiased(prediction, target, anchor, beta=1.0):
    alpha = (beta**2 + 1) ** 0.5
    total, count = 0.0, 0
    for b in range(prediction.shape[0]):
        for i in range(prediction.shape[2]):
            phi = [alpha * e[b, :, i] - beta * e[b, :, anchor] for e in (prediction.double(), target.double())]
            total += (phi[0] - phi[1]).square().sum().item()
            count += phi[0].numel()
    return total / count


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_debiased_loss_is_the_loop_over_frames(beta):
    prediction, target = torch.randn(2, 4, 5, 3, 3), torch.randn(2, 4, 5, 3, 3)
    for anchor in range(5):
        expected = brute_force_debiased(prediction, target, anchor, beta)
        assert debiased_loss(prediction, target, anchor, beta).item() == pytest.approx(expected, rel=1e-5)


def test_a_residual_shared_by_all_frames_weighs_0172():
    target = torch.randn(1, 4, 16, 8, 8)
    prediction = target + torch.randn(1, 4, 1, 8, 8)
    ratio = debiased_loss(prediction, target, 3) / noise_loss(prediction, target)
    assert ratio.item() == pytest.approx((2**0.5 - 1) ** 2, rel=1e-4)


def test_independent_residuals_weigh_282_at_16_frames():
    """(alpha^2 + beta^2) for the 15 other frames, (alpha - beta)^2 for the anchor."""
    target = torch.zeros(1, 4, 16, 200, 200)
    prediction = torch.randn(1, 4, 16, 200, 200)
    ratio = debiased_loss(prediction, target, 3) / noise_loss(prediction, target)
    assert ratio.item() == pytest.approx((15 * 3 + 0.17157) / 16, rel=1e-2)


def test_motion_loss_draws_its_anchor_from_the_generator_and_every_frame_may_be_it():
    prediction, target = torch.randn(1, 4, 4, 3, 3), torch.randn(1, 4, 4, 3, 3)
    plain = noise_loss(prediction, target)
    possible = {round((plain + debiased_loss(prediction, target, k)).item(), 5) for k in range(4)}
    seen = {round(motion_loss(prediction, target, torch.Generator().manual_seed(seed)).item(), 5) for seed in range(64)}
    assert seen == possible
    assert torch.equal(motion_loss(prediction, target, torch.Generator(), debiased=False), plain)


def test_half_precision_predictions_are_compared_in_float32():
    prediction, target = torch.full((1, 1, 2, 1, 1), 300.0).half(), torch.zeros(1, 1, 2, 1, 1)
    assert noise_loss(prediction, target).item() == 90_000


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_noise_weights_cap_the_say_of_steps_with_little_noise_and_raise_that_of_the_noisiest(power):
    """By a loop over the betas: a step of SNR 20 counts a quarter, those below 5 by one over what is left of a clip."""
    schedule, kept, weights = NoiseSchedule(), 1.0, []
    for step in range(1000):
        kept *= 1 - (0.00085 + (0.012 - 0.00085) * step / 999)
        snr = kept / (1 - kept)
        weights.append(min(1.0, 5 / snr) / kept**power)
    assert torch.allclose(noise_weights(schedule, torch.arange(1000), power), torch.tensor(weights), rtol=1e-3)
    assert weights[0] < 0.01
    assert weights[999] == pytest.approx(645**power, rel=0.05)
