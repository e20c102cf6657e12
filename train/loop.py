"""The training loop: one function, with everything a long run needs around the loss.

All randomness of a step comes from (seed, step) alone. A run that was stopped, or killed, goes on from its last state
and ends with the same weights, bit for bit on the CPU.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.random import fork_rng
from tqdm import tqdm

from lora import adapter_parameters, adapters
from model import UNet3D, UserError
from sampling import derived_seed
from train.folder import RunFolder

# (step, its CPU generator) -> named losses, each backpropagated before the next one is computed; None is one that the
# step leaves out, which the log calls nan
Losses = Callable[[int, torch.Generator], Iterator[tuple[str, Tensor | None]]]

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class LoopSettings:
    """How the loop runs; see the flags of the same names in `train.settings`.

    `rates` are learning rates of adapters, by name, that have one of their own.
    """

    steps: int
    learning_rate: float
    weight_decay: float
    seed: int
    save_every: int
    preview_every: int
    rates: Mapping[str, float] = field(default_factory=dict)


def train(
    unet: UNet3D,
    names: Sequence[str],
    losses: Losses,
    settings: LoopSettings,
    folder: RunFolder,
    preview: Callable[[int], None] | None = None,
    further: Sequence[dict[str, Any]] = (),
) -> None:
    """Train the adapters `names`, switched on together at scale 1, with Lion (Chen et al. 2023).

    Args:
        unet: the network; nothing but those adapters' parameters and `further` ones may require gradients.
        names: the adapters.
        losses: gives the losses of a step, from its number and a CPU generator that depends on seed and step.
        settings: steps, rates, seed, and how often to save and show.
        folder: where state, log and previews go; a state in it is taken up.
        preview: called after every `preview_every` steps with their number.
        further: groups of other parameters, each with rates of its own, as torch's optimizers take them.

    Raises:
        UserError: a loss or its gradient stopped being finite; the last good state stays on disk.
        KeyboardInterrupt: the run was asked to stop; its state is saved.
    """
    rates = [settings.rates.get(name, settings.learning_rate) for name in names]
    own = [adapter_parameters(unet, name) for name in names]
    groups = [*({"params": its, "lr": lr} for its, lr in zip(own, rates, strict=True)), *further]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = Lion(groups, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay)
    # Gradients of half-precision activations underflow in float16 alone; elsewhere the scaler does nothing.
    scaler = torch.amp.GradScaler(unet.device.type, enabled=unet.dtype == torch.float16)
    done = start = folder.restore(parameters, optimizer, scaler)

    def backward(step: int) -> dict[str, float]:
        """Leave the step's gradients in the parameters, and return its losses."""
        torch.manual_seed(derived_seed(settings.seed, "dropout", step))
        generator = torch.Generator().manual_seed(derived_seed(settings.seed, "step", step))
        values = {}
        given = losses(step, generator)
        try:
            for name, loss in given:
                if loss is None:
                    values[name] = math.nan
                    continue
                values[name] = loss.item()
                if not math.isfinite(values[name]):
                    raise UserError(f"the {name} is {values[name]}")
                scaler.scale(loss).backward()
        finally:
            if isinstance(given, Generator):
                given.close()  # an error would keep it alive, and with it what its blocks switched
        gradients = [p.grad for p in parameters if p.grad is not None]
        # Lion takes signs: a gradient of NaN would not show in the weights, only end their training.
        if not scaler.is_enabled() and not torch.isfinite(get_total_norm(gradients)):
            raise UserError("the gradient is not finite")
        return values

    def move(step: int) -> dict[str, float]:
        """Take the step; where gradients overflow float16, again with smaller ones, until it moves something."""
        while True:
            scale = scaler.get_scale()
            try:
                values = backward(step)
            except UserError as error:
                raise UserError(folder.lost(f"step {step}: {error}")) from error
            if step > start and step % settings.save_every == 0:
                folder.save(step, parameters, optimizer, scaler)  # only now are the steps before known to be good
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() >= scale:
                return values
            if scaler.get_scale() < 1:
                raise UserError(folder.lost(f"step {step}: the gradient is not finite"))

    cuda = [unet.device] if unet.device.type == "cuda" else []
    with training(unet), adapters(unet, dict.fromkeys(names, 1.0)), fork_rng(cuda), stop_requests() as stop:
        bar = tqdm(range(done, settings.steps), desc=folder.path.name, initial=done, total=settings.steps)
        for step in bar:
            started = time.perf_counter()
            values = move(step)
            done = step + 1
            folder.log(step, values, time.perf_counter() - started)
            bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
            if preview is not None and settings.preview_every and done % settings.preview_every == 0:
                preview(done)
            if stop.is_set():
                folder.save(done, parameters, optimizer, scaler)
                raise KeyboardInterrupt(
                    f"{done} of {settings.steps} steps are saved; the same command goes on from there"
                )


@contextmanager
def training(unet: UNet3D) -> Iterator[None]:
    """Within the block dropout is on (the frozen base has none: this is for adapters)."""
    unet.train()
    try:
        yield
    finally:
        unet.eval()


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Within the block Ctrl-C and SIGTERM set the event once, so that a step is never cut in two; again, they act."""
    event, old = threading.Event(), {}

    def request(number: int, frame: object) -> None:
        event.set()
        tqdm.write("stopping after this step (once more: at once)")
        signal.signal(number, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
