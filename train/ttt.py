"""Stage 3 of CustomTTT: test-time training, which makes an appearance and a motion LoRA work together.

python -m train.ttt --base sd15.safetensors --motion_module v3_sd15_mm.ckpt --appearance runs/teddy --motion runs/guitar
    --prompt "a teddy bear is playing guitar on the snow" --out runs/teddy-guitar
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora import adapter_parameters, adapters, copy_adapter, remove_adapter
from model import UserError
from sampling import derived_seed, encode, sample_latents
from train.folder import RunFolder
from train.losses import motion_loss, noise_loss
from train.report import movement
from train.settings import TrainSettings, filled
from train.stage import normal, predict, run_stage
from weights import (
    Base,
    LoRAEntry,
    load_lora,
    lora_path,
    open_base,
    parse_settings,
    read_lora_header,
    run_command,
    with_source,
)

KIND_OF = {"appearance": "spatial", "motion": "temporal"}
# Adapters of the one UNet: these stay as they were trained, the student's copies have the plain names.
REFERENCE_OF = {"appearance": "appearance_reference", "motion": "motion_reference"}


@dataclass(kw_only=True)
class TTTSettings(TrainSettings):
    """Stage 3: both LoRAs, trained on for a few steps on the very prompt to be generated.

    Args:
        appearance: run folder or file of the appearance LoRA.
        motion: run folder or file of the motion LoRA.
        prompt: what will be generated ("a teddy bear is playing guitar on the snow").
        appearance_prompt: of the appearance references; not given: the one its LoRA was trained with.
        motion_prompt: of the motion references; not given: the one its LoRA was trained with.
        reference_steps: f, the DDIM steps of a reference; not given: the base's (5).
        reference: whole: references are sampled to the end by a coarse schedule (our reading); partial: the first f of
            the sampling steps, then noised by one step, as the paper's figure is drawn (timestep_skew has no say then).
        reference_spacing: which diffusion steps a whole reference visits.
        reference_every: draw new references every so many steps; 0 is once.
        guidance_scale: of the references; not given: the base's (9).
        shared_noise: all frames of an appearance reference start from the same noise.
        debiased: add MotionDirector's appearance-debiased term to the temporal preservation loss.
    """

    appearance: str
    motion: str
    save_every: int = 5
    appearance_prompt: str | None = None
    motion_prompt: str | None = None
    reference_steps: int | None = None
    reference: Literal["whole", "partial"] = "whole"
    reference_spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    reference_every: int = 1
    guidance_scale: float | None = None
    shared_noise: bool = False
    debiased: bool = False


def train_ttt(settings: TTTSettings, base: Base | None = None) -> Path:
    """Train copies of both LoRAs on data that the two single-LoRA networks invent (CustomTTT, section 3.3, figure 4).

    Args:
        settings: of the run.
        base: one that is loaded already; None loads what the settings name.

    Returns:
        The LoRA file with both adapters; at once, if the run was finished before.

    Raises:
        UserError: bad settings or files, an --out of another run, or a loss that is not finite.
    """
    folder, inputs = RunFolder(settings.out), {role: lora_path(getattr(settings, role)) for role in KIND_OF}
    settings = with_source(settings, base)
    if folder.is_done(settings, inputs):
        return folder.lora

    base = base or open_base(settings)
    trained = {role: the_one(inputs[role], role) for role in KIND_OF}
    full = with_defaults(settings, base, {role: entry for role, (_, entry) in trained.items()})
    prompts = {
        "appearance": full.appearance_prompt,
        "motion": full.motion_prompt,
        "student": full.prompt,
        "negative": "",
    }
    text = {role: encode(base, [prompt]) for role, prompt in prompts.items()}
    drawn = lru_cache(maxsize=1)(lambda step: references(base, full, text, step))
    student = partial_prediction if full.reference == "partial" else whole_prediction

    def losses(step: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        z_s, z_t = drawn(step - step % full.reference_every if full.reference_every else 0)
        yield "appearance_loss", noise_loss(*student(base, full, z_s, text["student"], generator))
        pair = student(base, full, z_t, text["student"], generator)
        yield "motion_loss", motion_loss(*pair, generator, debiased=full.debiased)

    words = {role: (entry.prompt, entry.trigger) for role, (_, entry) in trained.items()}
    measure = partial(movement, base, REFERENCE_OF, lambda: drawn(0)[1], text["student"], full.seed)
    with students(base, {role: (inputs[role], name) for role, (name, _) in trained.items()}, full.dropout):
        return run_stage(base, words, losses, full, folder, inputs, measure)


def references(base: Base, settings: Any, text: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
    """What the two single-LoRA networks invent at `step`: z^s with the looks, z^t with the motion, (1, c, f, h, w).

    Each comes from noise of its own, by f DDIM steps with guidance. z^s is sampled with the motion modules bypassed:
    as many unrelated pictures as the clip has frames, unless they share their noise.
    """
    whole = {"steps": settings.reference_steps, "spacing": settings.reference_spacing}
    stopped = {"steps": base.recipe.sampling_steps, "only_first": settings.reference_steps}
    options: dict[str, Any] = {
        "num_frames": settings.num_frames,
        "height": settings.height,
        "width": settings.width,
        "guidance_scale": settings.guidance_scale,
        **(stopped if settings.reference == "partial" else whole),
    }
    sampled = {}
    for role, reference in REFERENCE_OF.items():
        seed = derived_seed(settings.seed, role, step)
        looks = {"motion": False, "shared_noise": settings.shared_noise} if role == "appearance" else {}
        with adapters(base.unet, {reference: 1.0}):
            sampled[role] = sample_latents(base, text[role], text["negative"], [seed], **options, **looks)
    return sampled["appearance"], sampled["motion"]


def whole_prediction(
    base: Base, settings: Any, latents: Tensor, text: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The student's prediction and its target where references are clean latents: noised at a random t."""
    return predict(base.unet, base.schedule, latents, text, generator, skew=settings.timestep_skew)


def partial_prediction(
    base: Base, settings: Any, latents: Tensor, text: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The student's prediction and its target where references stopped after f sampling steps: z_{f+1} = z_f + eps'.

    z_f is noised back up by the one step that led to it; the target is the noise of that step alone (figure 4).
    """
    schedule, steps = base.schedule, base.recipe.sampling_steps
    timestep = schedule.timesteps(steps)[: settings.reference_steps][-1]
    before = timestep - schedule.num_train_timesteps // steps
    kept = schedule.alpha(torch.tensor([timestep]), latents) / schedule.alpha(torch.tensor([before]), latents)
    noise = normal(latents, generator)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    return base.unet(noisy.to(base.unet.dtype), timestep, text), noise


@contextmanager
def students(base: Base, trained: dict[str, tuple[Path, str]], dropout: float) -> Iterator[None]:
    """Within the block both LoRAs are in the network, frozen, and beside them the student's trainable copies.

    Args:
        base: the network and its companions.
        trained: for each role the file of its LoRA, and the adapter's name in it.
        dropout: on the copies' inputs while training.

    Raises:
        UserError: a file that does not load.
    """
    added = []
    try:
        for role, (path, name) in trained.items():
            reference = REFERENCE_OF[role]
            load_lora(base.unet, path, {name: reference}, fingerprints=base.fingerprints)
            added.append(reference)
            for parameter in adapter_parameters(base.unet, reference):
                parameter.requires_grad_(False)
            copy_adapter(base.unet, reference, role, dropout)
            added.append(role)
        yield
    finally:
        for name in added:
            remove_adapter(base.unet, name)


def the_one(path: Path, role: str) -> tuple[str, LoRAEntry]:
    """Name and description of the one adapter of the role's kind in a LoRA file.

    Raises:
        UserError: there is none, or more than one.
    """
    entries = read_lora_header(path).adapters
    fitting = [(name, entry) for name, entry in entries.items() if entry.spec.kind == KIND_OF[role]]
    if len(fitting) != 1:
        held = ", ".join(f"{name} ({entry.spec.kind})" for name, entry in entries.items())
        raise UserError(f"--{role} wants a file with one {KIND_OF[role]} LoRA, and {path} holds {held or 'none'}")
    return fitting[0]


def with_defaults(settings: TTTSettings, base: Base, entries: dict[str, LoRAEntry]) -> Any:
    """The settings with the base's recipe, and the LoRAs' own prompts, wherever nothing was asked for.

    Raises:
        UserError: a LoRA file without a prompt, where none was given, or a number out of its range.
    """
    recipe = base.recipe
    prompts = {f"{role}_prompt": entry.prompt or None for role, entry in entries.items()}
    full = filled(settings, base, steps=recipe.ttt_steps, learning_rate=recipe.ttt_learning_rate, **prompts)
    for role in entries:
        if getattr(full, f"{role}_prompt") is None:
            file = getattr(settings, role)
            raise UserError(f"{file} does not say which prompt it was trained with: give --{role}_prompt")
    most = recipe.sampling_steps if full.reference == "partial" else base.schedule.num_train_timesteps
    if not 1 <= full.reference_steps <= most or full.reference_every < 0:
        raise UserError(f"reference_steps must be from 1 to {most}, and reference_every at least 0")
    return full


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt ttt`."""
    about = "Stage 3: test-time training of an appearance and a motion LoRA together, on the prompt to be generated."
    settings = parse_settings(TTTSettings, argv, prog="customttt ttt", description=about)
    print(f"both LoRAs: {train_ttt(settings)}")


if __name__ == "__main__":
    run_command(main)
