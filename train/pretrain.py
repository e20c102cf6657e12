"""The loop that trains the tiny base's networks from nothing: AdamW, a cosine, a state to go on from."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import UserError
from sampling import derived_seed
from train.loop import stop_requests
from train.states import add_row, cut_log, restore_state, save_state, state_before
from weights import write_json

DONE = "done.json"  # steps, seconds and device of a stage that is done
WARMUP = 100  # steps
SAVE_SECONDS = 60.0
LOG_EVERY = 50  # steps
REMEDY = "The last state before it is kept in {}; with another --seed and --out the steps are others"


def pretrain(
    network: nn.Module,
    loss: Callable[[torch.Generator], dict[str, Tensor]],
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    seed: int = 0,
    trained: Sequence[tuple[Iterable[nn.Parameter], float]] | None = None,
) -> None:
    """Train `network` to the end, or go on from the state in `folder`.

    All randomness of a step comes from (seed, folder's name, step) alone, so that a run that was stopped ends as one
    that was not.

    Args:
        network: what is saved in the state; on its device, in float32.
        loss: gives a step's losses from its CPU generator; the sum is minimised.
        folder: for `state.pt` and `log.csv`.
        steps: in all; the learning rate rises over the first 100 and falls along a cosine to zero.
        learning_rate: at its highest.
        weight_decay: AdamW's, as in Loshchilov and Hutter 2019.
        seed: of the steps.
        trained: the parameters that move, in groups with the share of the learning rate that each has; None: all.

    Raises:
        UserError: a loss that is not finite, or a damaged state.
        KeyboardInterrupt: the run was asked to stop; its state is saved.
    """
    groups = [{"params": list(p)} for p, _ in trained or [(network.parameters(), 1.0)]]
    shares = [share for _, share in trained or [((), 1.0)]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    state = folder / "state.pt"
    seconds = 0.0

    def take_up(saved: dict[str, Any]) -> None:
        nonlocal seconds
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        seconds = float(saved["seconds"])

    done = restore_state(state, take_up)
    cut_log(folder / "log.csv", done)
    if done < steps:
        (folder / DONE).unlink(missing_ok=True)  # of a stage whose state was deleted since
    started = saved = time.monotonic()

    def save() -> None:
        so_far = seconds + time.monotonic() - started
        moved = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        save_state(state, {"done": done, "seconds": so_far, **moved})

    network.train()
    with stop_requests() as stop:
        bar = tqdm(range(done, steps), desc=folder.name, initial=done, total=steps, mininterval=5)
        for step in bar:
            rise, fall = min(1.0, (step + 1) / WARMUP), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = share * learning_rate * rise * fall
            generator = torch.Generator().manual_seed(derived_seed(seed, folder.name, step))
            losses = loss(generator)
            total = torch.stack(list(losses.values())).sum()
            if not math.isfinite(total.item()):
                raise UserError(f"{folder.name}: the loss of step {step} is {total.item()}. {REMEDY.format(state)}")
            total.backward()
            if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, 1.0)):
                raise UserError(f"{folder.name}: the gradient of step {step} is not finite. {REMEDY.format(state)}")
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if done % LOG_EVERY == 0:
                add_row(folder / "log.csv", done, {name: f"{value.item():.6g}" for name, value in losses.items()})
                bar.set_postfix({name: f"{value.item():.4f}" for name, value in losses.items()})
            if stop.is_set() or time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
            if stop.is_set():
                raise KeyboardInterrupt(f"{done} of {steps} steps are saved; the same command goes on from there")
    if not (folder / DONE).is_file():
        save()
        took = seconds + time.monotonic() - started
        write_json(folder / DONE, {"steps": done, "seconds": round(took), "device": device_name(parameters[0])})
    state_before(state).unlink(missing_ok=True)
    network.eval().requires_grad_(False)


def device_name(parameter: Tensor) -> str:
    """What a model card calls the device: the card's name, or the CPU with its threads."""
    if parameter.device.type == "cuda":
        return torch.cuda.get_device_name(parameter.device)
    return f"CPU, {torch.get_num_threads()} threads"
