"""Prompt influence (CustomTTT, section 3.2): which layers' text decides what is seen, and how it moves.

python -m eval.layers --out layers.json
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.reading import ClipReading, Judge, check_readable, digest, judge_file, load_judge, read_clip
from model import UNet3D, UserError
from sampling import decode, derived_seed, encode, sample_latents
from train.world import WORLD_MOTIONS, WORLD_SHAPES, WORLD_TEXTURES, Scenes, caption, random_scenes
from weights import Base, BaseSettings, open_base, parse_settings, read_json, run_command, write_json

# What differs between a pair's two prompts, and by which of the judge's answers the second one is recognised.
KINDS = {"subject": ("shape", "colour", "texture"), "motion": ("motion",)}
FREE = ("out", "device", "batch_size", "judge")  # settings that change nothing about the scores

Scores = dict[str, dict[str, dict[str, float]]]  # by kind, row, and attribute or "score", their mean


@dataclass(kw_only=True)
class LayersSettings(BaseSettings):
    """How prompt influence is measured.

    Args:
        out: JSON file of the scores; rows that it holds already, of the same settings, are not measured again.
        pairs: of prompts, for subjects and for motions each.
        steps: of DDIM.
        guidance_scale: not given: the base's.
        combined: layers that are also injected into together with each other layer (the paper's 6 and 2).
        batch_size: clips sampled at once.
        judge: file of the judge; not given: the tiny base's.
        seed: of prompts and noise, which all rows share.
    """

    out: str
    pairs: int = 24
    steps: int = 10
    guidance_scale: float | None = None
    combined: list[int] | None = None
    batch_size: int = 8
    judge: str | None = None
    seed: int = 0


def text_layers(unet: UNet3D) -> list[int]:
    """The layers with cross-attention: all of the nine but 3 and 5."""
    return [index for index, layer in enumerate(unet.layers) if len(layer.spatial)]


def injected(text: Tensor, other: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """One embedding (b, n, d) for each of the nine layers: `other` in `layers`, `text` elsewhere."""
    return [other if index in layers else text for index in range(9)]


def injected_videos(
    base: Base,
    prompts: Sequence[str],
    others: Sequence[str],
    layers: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float | None = None,
) -> Tensor:
    """Clips of `prompts`, with what `others` say in `layers`; the rest as the base's recipe has it.

    Args:
        base: the network and its companions.
        prompts: b of them.
        others: b of them.
        layers: where the others go.
        seeds: b of them; the noise depends on nothing else.
        steps: of DDIM.
        guidance_scale: None: the base's.

    Returns:
        Frames (b, f, 3, h, w) in [-1, 1] on the CPU.
    """
    texts = injected(encode(base, prompts), encode(base, others), layers)
    negative = encode(base, [""] * len(prompts))
    return decode(base, sample_latents(base, texts, negative, seeds, steps=steps, guidance_scale=guidance_scale))


def prompt_pairs(kind: str, count: int, seed: int) -> tuple[Scenes, Scenes]:
    """`count` pairs of scenes that differ in the subject alone (shape, colour and texture all change) or the motion.

    What the first lacks and the second has tells where its text arrived; backgrounds are the same.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "pairs", kind))
    shared = ("motion",) if kind == "subject" else ("shape", "texture", "colour", "second")
    drawn, picked = 40 * count, torch.empty(0)
    while len(picked) < count:
        firsts, seconds = random_scenes(drawn, generator), random_scenes(drawn, generator)
        fitting = firsts.background == seconds.background
        for name in KINDS[kind]:
            fitting &= getattr(firsts, name) != getattr(seconds, name)
        for name in shared:
            getattr(seconds, name).copy_(getattr(firsts, name))
        picked = (fitting & ~spins_unseen(seconds)).nonzero().flatten()[:count]
        drawn *= 2
    return firsts[picked], seconds[picked]


def spins_unseen(scenes: Scenes) -> Tensor:
    """Whether a scene's subject is a plain or ringed circle that spins: nobody sees it do so. (n,)"""
    plain, ringed = (WORLD_TEXTURES.index(name) for name in ("plain", "ringed"))
    round_ = (scenes.shape == WORLD_SHAPES.index("circle")) & torch.isin(scenes.texture, torch.tensor([plain, ringed]))
    return round_ & (scenes.motion == WORLD_MOTIONS.index("spinning"))


def scores(reading: ClipReading, wanted: Scenes, kind: str) -> dict[str, list[bool]]:
    """For each clip, whether the judge saw what `wanted` says, by attribute."""
    return {name: (getattr(reading, name).argmax(dim=1) == getattr(wanted, name)).tolist() for name in KINDS[kind]}


def influence(base: Base, judge: Judge, settings: LayersSettings, found: Scores, save: Callable[[], None]) -> None:
    """Fill `found[kind][row]` with the share of clips that show what p* says, by attribute, and their mean.

    Rows are "none" (p* nowhere: chance), a layer's number, two layers' ("2+6"), and "all". `save` is called after each.
    """
    usable = text_layers(base.unet)
    rows: dict[str, list[int]] = {"none": []}
    rows |= {str(layer): [layer] for layer in usable}
    for layer in settings.combined or []:
        rows |= {f"{layer}+{other}": [layer, other] for other in usable if other != layer}
    rows["all"] = usable
    for kind in KINDS:
        first, second = prompt_pairs(kind, settings.pairs, settings.seed)
        prompts, others = ([caption(scenes, i) for i in range(settings.pairs)] for scenes in (first, second))
        seeds = [derived_seed(settings.seed, "noise", i) for i in range(settings.pairs)]
        for row, layers in tqdm(rows.items(), desc=f"{kind}: p* in layers"):
            if row in found.setdefault(kind, {}):
                continue
            right: dict[str, list[bool]] = {name: [] for name in KINDS[kind]}
            for start in range(0, settings.pairs, settings.batch_size):
                part = slice(start, start + settings.batch_size)
                videos = injected_videos(
                    base,
                    prompts[part],
                    others[part],
                    layers,
                    seeds[part],
                    settings.steps,
                    settings.guidance_scale,
                )
                seen = scores(read_clip(judge, videos.transpose(1, 2)), second[part], kind)
                for name, values in seen.items():
                    right[name] += values
            shares = {name: sum(values) / len(values) for name, values in right.items()}
            found[kind][row] = {"score": sum(shares.values()) / len(shares), **shares}
            tqdm.write(f"{kind:8} p* in {row:5} {found[kind][row]['score']:.3f}")
            save()


def measure_layers(settings: LayersSettings, base: Base | None = None) -> Scores:
    """Measure prompt influence, or what is left to measure of it, and write `settings.out` as it goes.

    Raises:
        UserError: settings out of range, a base of another size of clips, a file that holds something else, or missing
            files.
    """
    if settings.pairs < 1 or settings.batch_size < 1:
        raise UserError("pairs and batch_size must be at least 1")
    base = base or open_base(settings)
    check_readable(base)
    judge = load_judge(settings.judge)
    combined = set(settings.combined or [])
    if not combined <= set(text_layers(base.unet)):
        raise UserError(f"layers with text are {text_layers(base.unet)}: --combined {sorted(combined)} is not of them")
    out = Path(settings.out)
    wanted = {name: value for name, value in asdict(settings).items() if name not in FREE}
    weights = {"base": base.fingerprints, "judge": digest(judge_file(settings.judge))}
    record: dict[str, Any] = {"settings": wanted, **weights, "scores": {}}
    if out.is_file():
        before = read_json(out)
        if not isinstance(before, dict) or {**before, "scores": {}} != record:
            raise UserError(f"{out} holds scores of other settings, another base or judge: give --out a new name")
        record = before
    found: Scores = record["scores"]
    influence(base, judge, settings, found, lambda: write_json(out, record))
    return found


def table(found: Scores) -> str:
    """The scores as text, a row for each choice of layers."""
    lines = []
    for kind, rows in found.items():
        names = list(next(iter(rows.values())))
        lines.append(f"{kind:12}" + "".join(f"{name:>10}" for name in names))
        lines += [f"{row:12}" + "".join(f"{rows[row][name]:10.3f}" for name in names) for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m eval.layers`."""
    about = "Prompt influence: inject a second prompt into single layers, and see how much of it arrives."
    print(table(measure_layers(parse_settings(LayersSettings, argv, prog="python -m eval.layers", description=about))))


if __name__ == "__main__":
    run_command(main)
