"""Settings of all stages, tried on a base before hours of work begin."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import train.absorber
import train.appearance
import train.joint
import train.motion
import train.ttt
from lora import adapter_names, add_adapter, copy_adapter, remove_adapter
from model import UserError
from sampling import ddim_sample
from sampling.generate import GenerateSettings
from train.stage import fresh_adapter
from weights import Base, LoRAEntry, learned_tokens

KIND_OF = {"appearance": "spatial", "motion": "temporal"}


def check_stages(stages: Mapping[str, Any], clips: GenerateSettings, base: Base) -> None:
    """Check each stage's numbers as the stage itself would; the network is left as it was.

    Args:
        stages: settings of absorber, appearance, motion and ttt, or of some of them; ttt needs the two before it. Or
            of joint.
        clips: of what is generated in the end.
        base: that all of them run on.

    Raises:
        UserError: a number out of its range, with the stage's name before it.
    """
    start = torch.Generator().manual_seed(0)  # not the global one, whose state is not ours to change
    entries: dict[str, LoRAEntry] = {}
    if "absorber" in stages:
        with table_named("absorber"):
            check_absorber(train.absorber.with_defaults(stages["absorber"], base), base)
    modules = {"appearance": train.appearance, "motion": train.motion}
    try:
        for name, kind in KIND_OF.items():
            if name not in stages:
                continue
            with table_named(name):
                its = modules[name].with_defaults(stages[name], base)
                its.loop()
                options = {"targets": its.targets, "dropout": its.dropout, "generator": start}
                spec = add_adapter(base.unet, name, kind, its.layers, its.rank, **options)
                entries[name] = LoRAEntry(spec, its.prompt)
        if "ttt" in stages:
            with table_named("ttt"):
                both = train.ttt.with_defaults(stages["ttt"], base, entries)
                both.loop()
                if both.reference == "whole":
                    check_sampling(base, both.reference_steps, both.reference_spacing)
                copy_adapter(base.unet, "motion", "student", both.dropout)
    finally:
        for name in (*entries, "student"):
            if name in adapter_names(base.unet):
                remove_adapter(base.unet, name)
    if "joint" in stages:
        with table_named("joint"):
            its = train.joint.with_defaults(stages["joint"], base)
            its.loop()
            train.joint.check_words(its)
            with train.joint.both_adapters(base.unet, its):
                pass
    with table_named("generate"):
        steps = base.recipe.sampling_steps if clips.steps is None else clips.steps
        check_sampling(base, steps, clips.spacing, clips.eta)


def check_absorber(its: Any, base: Base) -> None:
    """Begin an absorber and stop before the first step; raises UserError where its settings are wrong."""
    train.absorber.check_settings(its)
    its.loop()
    token = [] if its.kind == "lora" else [train.absorber.first_vectors(base, its)]
    with learned_tokens(base, token):
        if its.kind != "token":
            with fresh_adapter(base.unet, train.absorber.NAME, "spatial", its.layers, its.targets, its):
                pass


def check_sampling(base: Base, steps: int, spacing: str, eta: float = 0.0) -> None:
    """Begin to sample and stop before the first step; raises UserError where a number is out of its range."""
    nothing = torch.zeros(1, 1, 1, 1, 1)
    ddim_sample(
        lambda latents, _: latents,
        nothing,
        base.schedule,
        steps,
        spacing=spacing,
        eta=eta,
        step_noise=lambda _: nothing,
        only_first=0,
    )


@contextmanager
def table_named(name: str) -> Iterator[None]:
    """Put the name of a step's table before what is wrong within the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
