"""The figures of the tiny base's model card: `python -m eval.tiny --out figures`."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from eval.custom import Custom, measure_custom
from eval.judge import judge_accuracy, through_vae
from eval.page import spread
from eval.reading import Judge, check_readable, digest, judge_file, load_judge, read_clip
from model import UserError
from sampling import contact_sheet, derived_seed, sample_videos, write_media
from train.tiny_parts import single_frames
from train.world import WORLD_MOTIONS, caption, random_scenes, render
from weights import Base, BaseSettings, open_base, parse_settings, read_json, run_command, write_json
from weights.load import TINY

PARTS = ("judge", "vae", "clip", "prompts", "custom", "speed")
CHOICES = 32  # captions that CLIP picks the right one from
SHOWN = 16  # of the sampled clips are on contact sheets
SAMPLED = ("shape", "colour", "texture", "background", "motion")


@dataclass(kw_only=True)
class FiguresSettings(BaseSettings):
    """What is measured, and how much of it.

    Args:
        out: folder for figures.json and contact sheets; parts that are done in it are not measured again.
        parts: judge, vae, clip, prompts, custom, speed: some or all of them.
        quick: few frames, prompts and steps: to see that it works, not how well the base does.
        prompts: clips sampled from prompts; not given: 200.
        pairs: of the 25 held-out pairs of a subject and a motion; not given: all.
        seeds: clips of each pair and arm; not given: 2.
        batch_size: clips sampled at once.
        judge: file of the judge; not given: the tiny base's.
        clip: folder of the CLIP that the text encoder was trained in; not given: the tiny base's.
        seed: of everything random.
    """

    out: str
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    quick: bool = False
    prompts: int | None = None
    pairs: int | None = None
    seeds: int | None = None
    batch_size: int = 8
    judge: str | None = None
    clip: str | None = None
    seed: int = 0


class Measurement:
    """Settings, networks (loaded when first asked for) and the figures found so far.

    Args:
        settings: what is measured.
        base: one that is loaded already; None loads what the settings name.

    Raises:
        UserError: settings out of range, a base of another size of clips, or an --out that holds figures of others.
    """

    def __init__(self, settings: FiguresSettings, base: Base | None = None) -> None:
        if unknown := set(settings.parts) - set(PARTS):
            raise UserError(f"--parts {' '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
        for name in ("batch_size", "prompts", "pairs", "seeds"):
            asked = getattr(settings, name)
            if asked is not None and not 1 <= asked <= (25 if name == "pairs" else asked):
                raise UserError(f"{name} must be {'from 1 to 25' if name == 'pairs' else 'at least 1'}, and is {asked}")
        self.settings, self.folder, self.file = settings, Path(settings.out), Path(settings.out) / "figures.json"
        if base is not None:
            self.base = base
        check_readable(self.base)
        kept = ("quick", "prompts", "pairs", "seeds", "seed")
        about = {
            "settings": {name: getattr(settings, name) for name in kept},
            "base": self.base.fingerprints,
            "judge": digest(judge_file(settings.judge)),
            "clip": digest(self.clip_folder / "model.safetensors"),
        }
        self.figures: dict[str, Any] = read_json(self.file) if self.file.is_file() else about
        if not isinstance(self.figures, dict) or any(self.figures.get(name) != value for name, value in about.items()):
            raise UserError(
                f"{self.file} holds figures of other settings, another base, judge or CLIP: give --out a new name"
            )

    @property
    def clip_folder(self) -> Path:
        """Of the CLIP that the text encoder was trained in."""
        return TINY / "clip" if self.settings.clip is None else Path(self.settings.clip)

    @cached_property
    def base(self) -> Base:
        """The base that is measured."""
        return open_base(self.settings)

    @cached_property
    def judge(self) -> Judge:
        """What reads the clips."""
        return load_judge(self.settings.judge)

    def size(self, full: int, quick: int, asked: int | None = None) -> int:
        """What was asked for, else the full or the quick number."""
        return asked if asked is not None else quick if self.settings.quick else full

    def generator(self, part: str) -> torch.Generator:
        """Fresh scenes of a part come from here, whichever parts were measured before."""
        return torch.Generator().manual_seed(derived_seed(self.settings.seed, "figures", part))

    def save(self) -> None:
        """Write the figures found so far."""
        write_json(self.file, self.figures)


def measure_judge(run: Measurement, found: dict[str, Any]) -> None:
    """How often the judge is right about rendered clips that went through the autoencoder: the error that it brings to
    the figures of prompts, where nothing else is wrong with a clip.
    """
    count = run.size(96, 2)
    found |= judge_accuracy(run.judge, count, run.settings.seed, lambda videos: through_vae(run.base, videos))
    found["clips"] = count


@torch.no_grad()
def measure_vae(run: Measurement, found: dict[str, Any]) -> None:
    """PSNR in dB of fresh frames through the autoencoder, of all pixels together and of those inside subjects."""
    count = run.size(512, 16)
    videos, masks = render(single_frames(count, run.generator("vae")))
    error = (through_vae(run.base, videos) - videos).square().mean(dim=1, keepdim=True)
    decibels = {"psnr": error.mean(), "psnr_subject": error[masks > 0.5].mean()}
    found |= {name: 10 * math.log10(4 / value.item()) for name, value in decibels.items()}  # the range is 2 wide
    found["frames"] = count


@torch.no_grad()
def measure_clip(run: Measurement, found: dict[str, Any]) -> None:
    """How often CLIP gives a frame its own caption among 32 that all differ; a single frame's motion is left out."""
    folder = run.clip_folder
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no CLIP: name its folder with --clip")
    clip = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
    length = clip.config.text_config.max_position_embeddings
    generator, right, count = run.generator("clip"), 0, run.size(512, CHOICES)
    for _ in range(count // CHOICES):
        scenes = single_frames(4 * CHOICES, generator)
        frames = render(scenes)[0][:, :, 0]
        captions = [caption(scenes, i, motion=False) for i in range(len(scenes))]
        firsts = [captions.index(words) for words in dict.fromkeys(captions)][:CHOICES]
        words = [captions[i] for i in firsts]
        tokens = run.base.tokenizer(
            words, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )["input_ids"]
        logits = clip(input_ids=tokens, pixel_values=frames[firsts]).logits_per_image
        right += int((logits.argmax(dim=1) == torch.arange(CHOICES)).sum())
    found |= {"image_to_caption": right / (count // CHOICES * CHOICES), "choices": CHOICES, "frames": count}


def measure_prompts(run: Measurement, found: dict[str, Any]) -> None:
    """How often clips sampled from fresh prompts show what the prompt says, as the judge sees it."""
    count = run.size(200, 2, run.settings.prompts)
    scenes = random_scenes(count, run.generator("prompts"))
    prompts = [caption(scenes, i) for i in range(count)]
    seeds = [derived_seed(run.settings.seed, "prompts", i) for i in range(count)]
    answers: list[dict[str, int]] = found.setdefault("answers", [])
    for start in range(len(answers), count, run.settings.batch_size):
        part = slice(start, start + run.settings.batch_size)
        videos = sample_videos(run.base, prompts[part], seeds[part], progress=f"prompts from {start} of {count}")
        seen = read_clip(run.judge, videos.transpose(1, 2))
        classes = {name: getattr(seen, name).argmax(dim=1).tolist() for name in SAMPLED}
        answers += [dict(zip(classes, row, strict=True)) for row in zip(*classes.values(), strict=True)]
        if start < SHOWN:
            sheet = contact_sheet(torch.cat([spread(video) for video in videos]), columns=8)
            write_media(run.folder / f"prompts-{start:03}.png", sheet[None])
        run.save()
    right = {name: torch.tensor([answer[name] for answer in answers]) == getattr(scenes, name) for name in SAMPLED}
    found |= {name: values.float().mean().item() for name, values in right.items()}
    found["all_right"] = torch.stack(list(right.values())).all(dim=0).float().mean().item()
    found["clips"] = count
    pairs = zip(scenes.motion.tolist(), (answer["motion"] for answer in answers), strict=True)
    found["motion_confusion"] = confusion(list(pairs))
    found["on_sheets"] = prompts[:SHOWN]


def confusion(pairs: Sequence[tuple[int, int]]) -> dict[str, dict[str, int]]:
    """For each motion that was asked for, how often each motion was seen, most often first."""
    table: dict[str, dict[str, int]] = {}
    for asked, _ in sorted(pairs):
        seen = [other for number, other in pairs if number == asked]
        ranked = sorted(set(seen), key=seen.count, reverse=True)
        table[WORLD_MOTIONS[asked]] = {WORLD_MOTIONS[number]: seen.count(number) for number in ranked}
    return table


def measure_held_out(run: Measurement, found: dict[str, Any]) -> None:
    """Customisation on held-out subjects and motions, see `eval.custom`."""
    sizes = Custom(
        pairs=run.size(25, 2, run.settings.pairs),
        seeds=run.size(2, 2, run.settings.seeds),
        steps=3 if run.settings.quick else None,
        ttt_steps=1 if run.settings.quick else None,
        seed=run.settings.seed,
    )
    measure_custom(run.base, run.judge, run.folder / "custom", sizes, found, run.save)


def measure_speed(run: Measurement, found: dict[str, Any]) -> None:
    """Seconds that loading takes (all imports done), and one guided clip of the base's own size."""
    started = time.perf_counter()
    base = open_base(run.settings)
    found["load_seconds"] = time.perf_counter() - started
    steps = run.size(25, 2)
    sample_videos(base, ["a red circle"], [0], steps=1)  # what only a first call does is not a clip's
    started = time.perf_counter()
    sample_videos(base, ["a red circle is moving left"], [0], steps=steps)
    found |= {"clip_seconds": time.perf_counter() - started, "steps": steps, "threads": torch.get_num_threads()}


MEASURES: dict[str, Callable[[Measurement, dict[str, Any]], None]] = {
    "judge": measure_judge,
    "vae": measure_vae,
    "clip": measure_clip,
    "prompts": measure_prompts,
    "custom": measure_held_out,
    "speed": measure_speed,
}


def measure_tiny(run: Measurement) -> dict[str, Any]:
    """Measure the parts that were asked for and are not done, and return all figures found so far.

    Raises:
        UserError: settings out of range, a missing file, or training or sampling that failed; what was measured before
            is kept.
    """
    parts = run.figures.setdefault("parts", {})
    for name in run.settings.parts:
        found = parts.setdefault(name, {})
        if not found.get("done"):
            MEASURES[name](run, found)
            found["done"] = True
            run.save()
    return run.figures


def table(parts: dict[str, dict[str, Any]]) -> str:
    """The figures as text, a line each; lists, and what is said clip by clip, are in the file alone."""
    lines = []
    for part, found in parts.items():
        for name, value in found.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                lines.append(f"{part:8} {name:24} {value:.3f}".removesuffix(".000"))
        for asked, seen in found.get("motion_confusion", {}).items():
            lines.append(f"{part:8} {asked:24} {', '.join(f'{other} {count}' for other, count in seen.items())}")
        for arm, means in found.get("means", {}).items():
            lines.append(f"{part:8} {arm:24} " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))
        for which, measures in found.get("differences", {}).items():
            for name, row in measures.items():
                ends = "" if row["interval"] is None else "  [{:+.3f}, {:+.3f}]".format(*row["interval"])
                lines.append(f"{part:8} {which:24} {name} {row['mean']:+.3f}{ends}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m eval.tiny`."""
    about = "Measure the figures of the tiny base's model card."
    run = Measurement(parse_settings(FiguresSettings, argv, prog="python -m eval.tiny", description=about))
    print(table(measure_tiny(run)["parts"]))


if __name__ == "__main__":
    run_command(main)
