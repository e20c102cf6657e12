"""Stage 3 of CustomTTT: test-time training, which makes an appearance and a motion LoRA work together.

python -m train.ttt --base sd15.safetensors --motion_module v3_sd15_mm.ckpt --appearance runs/teddy --motion runs/guitar
    --prompt "a teddy bear is playing guitar on the snow" --out runs/teddy-guitar
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora import adapter_modules, adapter_parameters, adapters, copy_adapter, remove_adapter
from model import UserError
from sampling import draw_noise, encode, evaluating, sample_latents
from train.folder import RunFolder
from train.loop import derived_seed
from train.losses import motion_loss, noise_loss
from train.settings import TrainSettings, filled
from train.stage import normal, predict, run_stage
from weights import Base, load_lora, lora_path, open_base, parse_settings, read_lora_header, run_command

KINDS = {"appearance": "spatial", "motion": "temporal"}
# Adapters of the one UNet: these stay as they were trained, the student's copies have the plain names.
REFERENCES = {"appearance": "appearance_reference", "motion": "motion_reference"}


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
            the sampling steps, then noised by one step, as the paper's figure is drawn.
        reference_spacing: which diffusion steps a whole reference visits.
        reference_every: draw new references every so many steps; 0 is once.
        guidance_scale: of the references; not given: the base's (9).
        shared_noise: all frames of an appearance reference start from the same noise.
        debiased: add MotionDirector's appearance-debiased term to the temporal preservation loss.
    """

    appearance: str
    motion: str
    prompt: str
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
    folder, inputs = RunFolder(settings.out), {kind: lora_path(getattr(settings, kind)) for kind in KINDS}
    if folder.is_done(settings, inputs):
        return folder.lora

    base = base or open_base(settings)
    full = with_defaults(settings, base)
    prompts = {"appearance": full.appearance_prompt, "motion": full.motion_prompt, "student": full.prompt}
    text = {role: encode(base, [prompt]) for role, prompt in {**prompts, "negative": ""}.items()}
    student = partial_prediction if full.reference == "partial" else whole_prediction
    drawn = lru_cache(maxsize=1)(lambda step: references(base, full, text, step))

    def losses(step: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        z_s, z_t = drawn(step - step % full.reference_every if full.reference_every else 0)
        yield "appearance_loss", noise_loss(*student(base, full, z_s, text["student"], generator))
        prediction, target = student(base, full, z_t, text["student"], generator)
        yield "motion_loss", motion_loss(prediction, target, generator, debiased=full.debiased)

    words = dict.fromkeys(KINDS, (full.prompt, ""))
    with students(base, full):
        return run_stage(base, words, losses, full, folder, inputs, lambda: movement(base, full, text["student"]))


def references(base: Base, settings: Any, text: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor]:
    """What the two single-LoRA networks invent at `step`: z^s with the looks, z^t with the motion, (1, c, f, h, w).

    Each comes from noise of its own, by f DDIM steps with guidance. z^s is sampled with the motion modules bypassed:
    as many unrelated pictures as the clip has frames, unless they share their noise.
    """
    whole = {"steps": settings.reference_steps, "spacing": settings.reference_spacing}
    partial = {"steps": base.recipe.sampling_steps, "only_first": settings.reference_steps}
    options: dict[str, Any] = {
        "num_frames": settings.num_frames,
        "height": settings.height,
        "width": settings.width,
        "guidance_scale": settings.guidance_scale,
        **(partial if settings.reference == "partial" else whole),
    }
    sampled = {}
    for kind, reference in REFERENCES.items():
        seed = derived_seed(settings.seed, kind, step)
        looks = {"motion": False, "shared_noise": settings.shared_noise} if kind == "appearance" else {}
        with adapters(base.unet, {reference: 1.0}):
            sampled[kind] = sample_latents(base, text[kind], text["negative"], [seed], **options, **looks)
    return sampled["appearance"], sampled["motion"]


def whole_prediction(
    base: Base, settings: Any, latents: Tensor, text: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The student's prediction and its target where references are clean latents: noised at a uniform t."""
    return predict(base.unet, base.schedule, latents, text, generator)


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
def students(base: Base, settings: Any) -> Iterator[None]:
    """Within the block both LoRAs are in the network, frozen, and beside them the student's trainable copies.

    Raises:
        UserError: a file that does not load, or holds no LoRA of the kind it was given as.
    """
    added = []
    try:
        for kind, reference in REFERENCES.items():
            path = getattr(settings, kind)
            load_lora(base.unet, path, {single(path, kind): reference}, fingerprint=base.fingerprint)
            added.append(reference)
            for parameter in adapter_parameters(base.unet, reference):
                parameter.requires_grad_(False)
            copy_adapter(base.unet, reference, kind, settings.dropout)
            added.append(kind)
        yield
    finally:
        for name in added:
            remove_adapter(base.unet, name)


def single(path: str, kind: str) -> str:
    """The name of the one adapter of the right kind in a LoRA file.

    Raises:
        UserError: there is none, or more than one.
    """
    entries = read_lora_header(path).adapters
    fitting = [name for name, entry in entries.items() if entry.spec.kind == KINDS[kind]]
    if len(fitting) != 1:
        held = ", ".join(f"{name} ({entry.spec.kind})" for name, entry in entries.items())
        raise UserError(f"--{kind} wants a file with one {KINDS[kind]} LoRA, and {path} holds {held}")
    return fitting[0]


@torch.no_grad()
def movement(base: Base, settings: Any, text: Tensor) -> dict[str, Any]:
    """How far the student went from the LoRAs it started as: in its weights, and in what the network predicts.

    Returns:
        For each adapter the largest change of an element of A and of B, and the change of all B A relative to their
        size; for the prediction at t = 500 the relative change by test-time training, and by both LoRAs for scale.
    """
    report: dict[str, Any] = {}
    for kind, reference in REFERENCES.items():
        pairs = [
            (module, adapter_modules(base.unet, reference)[path])
            for path, module in adapter_modules(base.unet, kind).items()
        ]
        changed = sum((new.delta() - old.delta()).square().sum() for new, old in pairs)
        size = sum(old.delta().square().sum() for _, old in pairs)
        report[kind] = {
            "largest change of A": max((new.A - old.A).abs().max().item() for new, old in pairs),
            "largest change of B": max((new.B - old.B).abs().max().item() for new, old in pairs),
            "relative change of B A": float(changed / size) ** 0.5 if size else 0.0,
        }
    shape = (base.unet.config.in_channels, settings.num_frames, settings.height // 8, settings.width // 8)
    noise = draw_noise(settings.seed, shape).to(base.unet.device, base.unet.dtype)
    predictions = []
    for names in ((), REFERENCES.values(), KINDS):
        with evaluating(base.unet), adapters(base.unet, dict.fromkeys(names, 1.0)):
            predictions.append(base.unet(noise, 500, text).float())
    plain, together, trained = predictions
    report["prediction"] = {
        "relative change by test-time training": ((trained - together).norm() / together.norm()).item(),
        "relative change by both LoRAs": ((together - plain).norm() / plain.norm()).item(),
    }
    return report


def with_defaults(settings: TTTSettings, base: Base) -> Any:
    """The settings with the base's recipe, and the LoRAs' own prompts, wherever nothing was asked for.

    Raises:
        UserError: a LoRA file without a prompt, where none was given, or a number out of its range.
    """
    trained = {}
    for kind in KINDS:
        path = getattr(settings, kind)
        trained[f"{kind}_prompt"] = read_lora_header(path).adapters[single(path, kind)].prompt or None
        if (getattr(settings, f"{kind}_prompt") or trained[f"{kind}_prompt"]) is None:
            raise UserError(f"{path} does not say which prompt it was trained with: give --{kind}_prompt")
    recipe = base.recipe
    full = filled(settings, recipe, steps=recipe.ttt_steps, learning_rate=recipe.ttt_learning_rate, **trained)
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
