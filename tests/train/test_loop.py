"""The loop: Lion as published, randomness from (seed, step) alone, and runs that survive being stopped."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from lora import adapter_parameters, add_adapter, remove_adapter
from model import TINY, UNet3D, UserError
from sampling import derived_seed
from train.folder import RunFolder
from train.loop import LoopSettings, train


@pytest.fixture(scope="module")
def network():
    return UNet3D(TINY).requires_grad_(False)


@pytest.fixture
def unet(network):
    """A network with one small adapter, and a toy loss on the adapter alone: no forward pass needed."""
    add_adapter(network, "a", "spatial", (4,), rank=2, dropout=0.1, generator=torch.Generator().manual_seed(0))
    yield network
    remove_adapter(network, "a")


def toy_losses(unet):
    parameters = adapter_parameters(unet, "a")

    def losses(step, generator):
        target = torch.randn((), generator=generator)
        yield "first", sum((p - target).square().sum() for p in parameters)
        yield "second", sum((p + torch.rand(())).abs().sum() for p in parameters)

    return losses


def settings(steps, **changes):
    return LoopSettings(
        **{
            "steps": steps,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "seed": 3,
            "save_every": 1,
            "preview_every": 0,
            **changes,
        }
    )


def weights(unet):
    return [p.detach().clone() for p in adapter_parameters(unet, "a")]


def reset(unet, start):
    for p, value in zip(adapter_parameters(unet, "a"), start, strict=True):
        p.data.copy_(value)


def test_the_update_is_lions(unet, tmp_path):
    """Chen et al. 2023, algorithm 2, written out with betas 0.9 and 0.99 and decoupled weight decay."""
    start = weights(unet)
    train(unet, ["a"], toy_losses(unet), settings(4), RunFolder(tmp_path))
    trained = weights(unet)
    expected = [p.clone().requires_grad_() for p in start]
    momenta = [torch.zeros_like(p) for p in start]
    for step in range(4):
        torch.manual_seed(derived_seed(3, "dropout", step))
        target = torch.randn((), generator=torch.Generator().manual_seed(derived_seed(3, "step", step)))
        loss = sum((p - target).square().sum() for p in expected)
        loss = loss + sum((p + torch.rand(())).abs().sum() for p in expected)
        gradients = torch.autograd.grad(loss, expected)
        with torch.no_grad():
            for p, m, g in zip(expected, momenta, gradients, strict=True):
                p.copy_(p * (1 - 1e-2 * 0.1) - 1e-2 * torch.sign(0.9 * m + 0.1 * g))
                m.copy_(0.99 * m + 0.01 * g)
    for p, q in zip(trained, expected, strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_losses_of_a_step_add_up_like_one_backward_each(unet, tmp_path):
    order = []

    def losses(step, generator):
        for p in adapter_parameters(unet, "a"):
            yield "loss", p.sum()
            order.append(p.grad is not None)

    train(unet, ["a"], losses, settings(1), RunFolder(tmp_path))
    assert all(order)


@pytest.mark.parametrize("stopped_after", [1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_weights(unet, tmp_path, stopped_after):
    start = weights(unet)
    train(unet, ["a"], toy_losses(unet), settings(5), RunFolder(tmp_path / "whole"))
    whole = weights(unet)

    reset(unet, start)
    calls = []

    def stopping(step, generator):
        calls.append(step)
        if step == stopped_after:
            raise KeyboardInterrupt
        yield from toy_losses(unet)(step, generator)

    folder = RunFolder(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train(unet, ["a"], stopping, settings(5, save_every=2), folder)
    reset(unet, [torch.full_like(p, 9.0) for p in start])
    torch.manual_seed(99)
    if not folder.state.is_file():
        reset(unet, start)
    train(unet, ["a"], toy_losses(unet), settings(5, save_every=2), folder)
    assert all(torch.equal(p, q) for p, q in zip(weights(unet), whole, strict=True))
    logs = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("whole", "cut")]
    whole_rows, cut_rows = ([row.rpartition(",")[0] for row in log] for log in logs)
    assert whole_rows == cut_rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_its_state_saved(unet, tmp_path, number):
    def losses(step, generator):
        if step == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        yield from toy_losses(unet)(step, generator)

    folder, before = RunFolder(tmp_path), signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(unet, ["a"], losses, settings(9, save_every=100), folder)
    assert torch.load(folder.state, weights_only=True)["done"] == 3
    assert signal.getsignal(number) == before


def test_training_works_outside_the_main_thread(unet, tmp_path):
    failures = []

    def work():
        try:
            train(unet, ["a"], toy_losses(unet), settings(1), RunFolder(tmp_path))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(unet, tmp_path):
    def losses(step, generator):
        scale = float("nan") if step == 3 else 1.0
        yield "loss", sum(scale * p.square().sum() for p in adapter_parameters(unet, "a"))

    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"Step 3: the loss is nan: the run stopped. The last good state") as caught:
        train(unet, ["a"], losses, settings(9, save_every=2), folder)
    assert str(folder.state) in str(caught.value)
    state = torch.load(folder.state, weights_only=True)
    assert state["done"] == 2
    assert all(torch.isfinite(p).all() for p in state["parameters"])


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(unet, tmp_path):
    def losses(step, generator):
        p = adapter_parameters(unet, "a")[0]
        yield "loss", ((p - p.detach()) ** (0.5 if step == 2 else 2)).sum()

    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="Step 2: the gradient is not finite"):
        train(unet, ["a"], losses, settings(3), folder)
    assert torch.load(folder.state, weights_only=True)["done"] == 1  # what led there is not good


def test_a_log_that_a_kill_left_empty_is_begun_again(unet, tmp_path):
    (tmp_path / "log.csv").touch()
    train(unet, ["a"], toy_losses(unet), settings(2), RunFolder(tmp_path))
    assert (tmp_path / "log.csv").read_text().startswith("step,first,second,seconds\n0,")


def test_the_callers_random_numbers_are_left_alone(unet, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(unet, ["a"], toy_losses(unet), settings(2), RunFolder(tmp_path))
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def scaled(monkeypatch):
    """The loop with float16's gradient scaler, which a float32 network on the CPU has off."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: real(device, enabled=True))


def test_a_step_whose_gradients_overflow_float16_is_taken_again(unet, tmp_path, scaled):
    start = weights(unet)
    train(unet, ["a"], toy_losses(unet), settings(3), RunFolder(tmp_path / "plain"))
    plain = weights(unet)
    reset(unet, start)
    overflowing = []

    def losses(step, generator):
        for name, loss in toy_losses(unet)(step, generator):
            if step == 1 and len(overflowing) < 3:
                overflowing.append(step)
                loss.register_hook(lambda grad: grad * float("inf"))
            yield name, loss

    train(unet, ["a"], losses, settings(3), RunFolder(tmp_path / "overflow"))
    assert overflowing
    assert all(torch.equal(p, q) for p, q in zip(weights(unet), plain, strict=True))


def test_gradients_that_always_overflow_end_the_run(unet, tmp_path, scaled):
    def losses(step, generator):
        loss = adapter_parameters(unet, "a")[0].sum()
        loss.register_hook(lambda grad: grad * float("inf"))
        yield "loss", loss

    with pytest.raises(UserError, match="Step 0: the gradient is not finite"):
        train(unet, ["a"], losses, settings(3), RunFolder(tmp_path))


def test_a_damaged_state_is_named(unet, tmp_path):
    folder = RunFolder(tmp_path)
    train(unet, ["a"], toy_losses(unet), settings(2), folder)
    folder.state.write_bytes(folder.state.read_bytes()[:200])
    with pytest.raises(UserError, match=r"state\.pt"):
        train(unet, ["a"], toy_losses(unet), settings(3), folder)


def test_a_state_is_kept_only_once_the_next_loss_shows_it_good(unet, tmp_path):
    """A step that makes the weights explode is not what a run goes on from."""

    def losses(step, generator):
        p = adapter_parameters(unet, "a")[0]
        yield "loss", p.square().sum() * (float("inf") if p.abs().max() > 1e3 else 1.0)

    with pytest.raises(UserError, match=r"Step 1: the loss is inf: the run stopped\. No state was saved yet"):
        train(unet, ["a"], losses, settings(4, learning_rate=1e4), RunFolder(tmp_path))


def test_previews_come_when_asked_and_training_is_the_same_with_them(unet, tmp_path):
    start, shown = weights(unet), []
    train(unet, ["a"], toy_losses(unet), settings(5), RunFolder(tmp_path / "plain"))
    plain = weights(unet)
    reset(unet, start)

    def preview(done):
        shown.append(done)
        torch.rand(7)

    train(unet, ["a"], toy_losses(unet), settings(5, preview_every=2), RunFolder(tmp_path / "shown"), preview)
    assert shown == [2, 4]
    assert all(torch.equal(p, q) for p, q in zip(weights(unet), plain, strict=True))


def test_dropout_is_on_in_the_loop_and_off_after_it(unet, tmp_path):
    seen = []

    def losses(step, generator):
        seen.append(unet.training)
        yield "loss", adapter_parameters(unet, "a")[0].sum()

    unet.eval()
    train(unet, ["a"], losses, settings(1), RunFolder(tmp_path))
    assert seen == [True]
    assert not unet.training


def test_derived_seeds_differ_in_every_part():
    seeds = {derived_seed(seed, what, step) for seed in range(5) for what in ("step", "dropout") for step in range(50)}
    assert len(seeds) == 500


def test_the_log_has_a_row_for_every_step(unet, tmp_path):
    train(unet, ["a"], toy_losses(unet), settings(3), RunFolder(tmp_path))
    head, *rows = Path(tmp_path / "log.csv").read_text().splitlines()
    assert head == "step,first,second,seconds"
    assert [row.split(",")[0] for row in rows] == ["0", "1", "2"]
