"""Clips from prompts, seeds and LoRAs: `python -m sampling.generate`."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora import adapter_layers, adapter_names, adapters, remove_adapter, switch_adapters
from model import UserError
from sampling.ddim import AtStep
from sampling.origins import Clip, batches, left_open, origins
from sampling.sample import sample_videos
from sampling.write import check_writable, is_folder_name, write_media
from weights import (
    Base,
    BaseSettings,
    LoRAArgument,
    Record,
    atomic_write,
    complete,
    json_text,
    learned_tokens,
    load_lora,
    lora_path,
    open_base,
    parse_given,
    parse_lora,
    read_embeddings,
    record_file,
    run_command,
    settings_from,
    unused_tokens,
    versions,
    with_source,
)
from weights.lora import say_what_adds

# Called once, with LoRAs and embeddings loaded and what `loaded_loras` gives -> further options of `sample_latents`
Start = Callable[[AtStep | None], dict[str, Any]]


@dataclass(kw_only=True)
class GenerateSettings(BaseSettings):
    """What to generate.

    Args:
        prompt: one or several prompts: a clip for each of them with each seed.
        out: .mp4, .gif, or a folder of frames (no suffix); several clips get numbers behind the name.
        lora: run folders, or LoRA files of any tool, each with a strength behind a colon if not 1 (runs/teddy:0.8). One
            for each of some of the layers 0 to 8, the others being off: jog:2=0.5,6=1. For a part of denoising:
            jog:0.8@0-0.6, on from 0 (pure noise) inclusive to 0.6 exclusive, where 1 is the end. One adapter of a run
            with several: runs/both#motion:0.8.
        embedding: textual-inversion files, or run folders of absorbers with a token, whose tokens the prompts may then
            hold; for another token than the file's own, it stands behind a colon (cat.pt:<my-cat>).
        allow_partial: use what fits of LoRA files that do not fit wholly.
        seed: one or several seeds.
        negative_prompt: what to keep away from.
        num_frames: frames of a clip; not given: the base's (16).
        height: pixels, divisible by 8; not given: the base's (256).
        width: pixels, divisible by 8; not given: the base's (256).
        fps: frames a second; not given: the base's (8).
        steps: DDIM steps; not given: the base's (25).
        guidance_scale: how strongly the prompt is followed; 1 is not at all beyond it; not given: the base's (9).
        eta: 0 is deterministic DDIM, 1 has the variance of DDPM.
        spacing: which diffusion steps are visited.
        batch_size: clips sampled at once.
    """

    prompt: list[str]
    out: str
    lora: list[str] = field(default_factory=list)
    embedding: list[str] = field(default_factory=list)
    allow_partial: bool = False
    seed: list[int] = field(default_factory=lambda: [0])
    negative_prompt: str = ""
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    eta: float = 0.0
    spacing: Literal["leading", "linspace", "trailing"] = "leading"
    batch_size: int = 1


def generate_files(settings: GenerateSettings, base: Base | None = None, start: Start | None = None) -> list[Path]:
    """Generate every prompt with every seed and write the clips.

    Args:
        settings: what, how and where to.
        base: one that is loaded already; None loads what the settings name.
        start: where sampling starts, if not from noise, see `Start`.

    Returns:
        The files written, prompts outermost.

    Raises:
        UserError: bad settings or files, or sampling that failed; clips written before it are whole.
    """
    settings = with_source(settings, base)
    jobs = clip_files(settings)
    base = base or open_base(settings)
    make_clips(settings, base, batches(jobs, settings.batch_size), left_open(settings, base), start)
    return [file for _, _, file in jobs]


def make_clips(
    settings: GenerateSettings,
    base: Base,
    batched: Sequence[Sequence[Clip]],
    filled: Mapping[str, Any],
    start: Start | None = None,
) -> None:
    """Sample the clips of each batch at once and write those that have a file, each with its record.

    Args:
        settings: as they were given, which is how they are recorded.
        base: what the settings name.
        batched: the clips.
        filled: what takes the place of settings, see `left_open`.
        start: where sampling starts, if not from noise.

    Raises:
        UserError: as `generate_files`.
    """
    # checked, and of one type each: 8 and 8.0 are one number, and two records
    settings = settings_from(type(settings), asdict(settings), "settings")
    its = settings_from(type(settings), {**asdict(settings), **filled}, "settings")
    folder = is_folder_name(its.out)
    if check_writable(its.out) in (".png", ".jpg", ".jpeg") and its.num_frames != 1:
        raise UserError(
            f"{its.out} holds one picture, not {its.num_frames} frames: use .mp4, .gif or a folder, or one frame"
        )
    if base.unet.config.motion is None and its.num_frames != 1:
        warnings.warn(f"without --motion_module nothing ties the {its.num_frames} frames together", stacklevel=3)
    names = ("num_frames", "height", "width", "steps", "guidance_scale", "negative_prompt", "eta", "spacing")
    options = {name: getattr(its, name) for name in names}
    assert its.fps is not None  # it is filled in
    told = origins(settings, batched)
    now = versions(base.device)
    environment = {
        "customttt": now.pop("customttt"),
        "filled": {name: getattr(its, name) for name in filled},
        "base": base.name,
        "fingerprints": base.fingerprints,
        "versions": now,
        "threads": torch.get_num_threads(),
    }
    embeddings = read_embeddings(settings.embedding)
    source = getattr(its, "source_prompt", "")  # an edit's
    for token in unused_tokens(embeddings, [*its.prompt, its.negative_prompt, source]):
        warnings.warn(f"no prompt contains {token!r}: its embedding has no effect", stacklevel=3)
    total, done = sum(map(len, batched)), 0
    with loaded_loras(base, settings.lora, settings.allow_partial) as at_step, learned_tokens(base, embeddings):
        options |= {"at_step": at_step} | (start(at_step) if start is not None else {})
        warn_of_idle(settings.lora, options["steps"], options.get("only_last"))
        for batch in batched:
            prompts, seeds, files = zip(*batch, strict=True)
            label = f"clip {done + 1} to {done + len(batch)} of {total}" if total > 1 else "sampling"
            done += len(batch)
            for file, video in zip(files, sample_videos(base, prompts, seeds, progress=label, **options), strict=True):
                if file is not None:
                    record = asdict(Record(**told[file], **environment))
                    with atomic_write(record_file(file)) as temporary:  # both are replaced, or neither
                        temporary.write_text(json_text(record), encoding="utf-8")
                        write_media(f"{file}/" if folder else file, video, fps=its.fps, metadata=record)
                    print(f"wrote {file}")


def clip_files(settings: GenerateSettings) -> list[tuple[str, int, Path]]:
    """The clips that settings ask for: prompt, seed, and the file it goes to.

    Raises:
        UserError: nothing to generate, the same seed twice, a LoRA that is not there or its strength makes no sense,
            an embedding that cannot be read, or an output that cannot be written.
    """
    if not settings.prompt or not settings.seed or settings.batch_size < 1:
        raise UserError("give at least one prompt and one seed, and a batch size of at least 1")
    if len(set(settings.seed)) < len(settings.seed) or len(set(settings.prompt)) < len(settings.prompt):
        raise UserError("a prompt or a seed is given twice: the clips would be the same")
    for argument in settings.lora:
        lora_path(parse_lora(argument).path)
    read_embeddings(settings.embedding)
    if settings.fps is not None and not 0.1 <= settings.fps <= 1000:
        raise UserError(f"fps must be from 0.1 to 1000, and is {settings.fps}")
    check_writable(settings.out)
    return numbered(settings.prompt, settings.seed, settings.out)


def numbered(prompts: Sequence[str], seeds: Sequence[int], out: str) -> list[tuple[str, int, Path]]:
    """A clip for each prompt with each seed: both, and its file; of several, with numbers behind the name of `out`."""
    path = Path(out)
    if len(prompts) * len(seeds) == 1:
        return [(prompts[0], seeds[0], path)]
    stem, suffix = (path.name, "") if is_folder_name(out) else (path.stem, path.suffix)
    return [
        (prompt, seed, path.with_name(f"{stem}-{number}-seed{seed}{suffix}"))
        for number, prompt in enumerate(prompts, start=1)
        for seed in seeds
    ]


@contextmanager
def loaded_loras(base: Base, arguments: Sequence[str], allow_partial: bool = False) -> Iterator[AtStep | None]:
    """Within the block the LoRAs named as in `--lora` are in the networks and on; afterwards they are gone.

    Args:
        base: its UNet gets them, and its text encoder where a file has a part for it: at the same strength.
        arguments: as `parse_lora` reads them.
        allow_partial: of other tools' files, whatever fits will do.

    Yields:
        What `sample_latents` takes as `at_step` where strengths change in the course of denoising, before which they
        are those of its first step; None where none do.

    Raises:
        UserError: a file that does not load, see `weights.load_lora`, or has nothing in a layer with a strength.
    """
    unet, text = base.unet, base.text.clip
    given: dict[str, LoRAArgument] = {}
    loras: dict[str, list[str]] = {}

    def present(network: nn.Module) -> dict[str, LoRAArgument]:
        names = adapter_names(network)
        return {name: its for name, its in given.items() if name in names}

    def at_step(step: int, steps: int) -> None:
        switch_adapters(unet, {name: its.scale for name, its in present(unet).items() if its.on(step, steps)})

    options: dict[str, Any] = {"fingerprints": base.fingerprints, "text": text, "allow_partial": allow_partial}
    try:
        for argument in arguments:
            its = parse_lora(argument)
            if argument in loras:
                raise UserError(f"{argument} is given twice: for more of it, raise its strength")
            given |= dict.fromkeys(added := load_lora(unet, its.path, only=its.adapter, **options), its)
            loras[argument] = list(added)
            _check_layers(unet, its, present(unet).keys() & added.keys())
            if (its.scheduled or its.layers is not None) and present(text).keys() & added.keys():
                warnings.warn(
                    f"{argument}: its part for the text encoder, which reads the prompt once and has other layers, is "
                    f"on all the way at strength {its.strength:g}",
                    stacklevel=3,
                )
        say_what_adds((unet, text), loras)
        constant = {name: its.strength for name, its in present(text).items()}
        with adapters(unet, {name: its.scale for name, its in present(unet).items()}), adapters(text, constant):
            changing = any(its.scheduled for its in given.values())
            if changing:
                at_step(0, 1)
            yield at_step if changing else None
    finally:
        for network in (unet, text):
            for name in present(network):
                remove_adapter(network, name)


def _check_layers(unet: nn.Module, its: LoRAArgument, names: Iterable[str]) -> None:
    known = {layer for name in names for layer in adapter_layers(unet, name)}
    if wrong := sorted((its.layers or {}).keys() - known):
        raise UserError(
            f"{its.text}: the LoRA has nothing in layer {', '.join(map(str, wrong))}: "
            f"it has layers {', '.join(map(str, sorted(known))) or 'none'}"
        )


def warn_of_idle(arguments: Sequence[str], steps: int, only_last: int | None) -> None:
    """Say which LoRAs no step has on: in a range between two steps, or before the first that is taken."""
    taken = range(0 if only_last is None else steps - only_last, steps)
    for its in map(parse_lora, arguments):
        if not any(its.on(step, steps) for step in taken):
            begin = f", the first at {taken[0] / steps:g} of denoising," if taken else ""
            warnings.warn(
                f"{its.text} has no effect: none of the {len(taken)} steps{begin} begins in its range", stacklevel=4
            )


def main(argv: Sequence[str] | None = None) -> None:
    """`customttt generate`."""
    about = "Generate clips, with any number of LoRAs; or make one again (--from, which needs neither prompt nor out)."
    source = {"from": "a clip of this program, or the .record.json beside it: made again; flags win over its settings"}
    given = parse_given(GenerateSettings, argv, prog="customttt generate", description=about, sources=source)
    video = given.pop("from", None)
    if video is None:
        generate_files(complete(GenerateSettings, given))
    else:
        from sampling.again import generate_again  # it builds on this module

        generate_again(video, **given)


if __name__ == "__main__":
    run_command(main)
