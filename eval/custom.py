"""What customisation does for the tiny base: held-out subjects doing held-out motions, with and without each stage."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.demo_inputs import BACKGROUND, PHOTOGRAPHED, photos
from eval.measures import crossed_interval, identity, in_sight, path_error
from eval.page import demo_sheet
from eval.reading import Judge, read_clip, read_path
from sampling import derived_seed, sample_videos, write_media
from sampling.generate import loaded_loras
from train.appearance import AppearanceSettings, train_appearance
from train.motion import MotionSettings, train_motion
from train.ttt import TTTSettings, train_ttt
from train.vocabulary import SPARE_WORDS
from train.world import (
    BACKGROUNDS,
    HELD_OUT_MOTIONS,
    MOTIONS,
    NUM_FRAMES,
    SIZE,
    Scenes,
    caption,
    make_scenes,
    random_scenes,
    render,
)
from weights import Base

ARMS = ("base", "appearance", "motion", "both", "both+ttt")
STILL = "standing still"  # beside the arms: what a subject that does not move scores
# Differences that tell whether a stage is worth it: the second arm minus the first.
COMPARED = (("base", "both"), ("base", "both+ttt"), ("appearance", "both"), ("motion", "both"), ("both", "both+ttt"))


@dataclass(frozen=True)
class Custom:
    """Sizes of the measurement.

    Args:
        pairs: of the 25 pairs of a subject and a motion, so many; see `pair`.
        seeds: clips of each pair and arm.
        steps: of the appearance and the motion LoRAs; None: the base's.
        ttt_steps: of test-time training; None: the base's.
        seed: of everything random.
    """

    pairs: int = 25
    seeds: int = 2
    steps: int | None = None
    ttt_steps: int | None = None
    seed: int = 0


def pair(index: int) -> tuple[int, int]:
    """The subject and the motion, each from 0 to 4, of pair `index`: any five in a row hold each of them once."""
    return index % 5, (index % 5 + index // 5) % 5


def subject_prompt(subject: int) -> str:
    """What a held-out subject is called: nothing in the vocabulary means it, so a spare word comes to."""
    return f"a {SPARE_WORDS[subject]}"


def motion_word(motion: int) -> str:
    """What a held-out motion is called. Two may share a word, since no two are ever in the network together."""
    return SPARE_WORDS[5 + motion % 3]


def pair_prompt(subject: int, motion: int) -> str:
    """What is generated: "a zor is wug over the road"."""
    return f"{subject_prompt(subject)} is {motion_word(motion)} over the {BACKGROUND}"


def reference(motion: int, seed: int, frames: int = NUM_FRAMES) -> Scenes:
    """One scene of so many frames: a random subject of the training world does a held-out motion."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "reference", motion))
    world = random_scenes(1, generator)
    number = torch.tensor([list(MOTIONS).index(HELD_OUT_MOTIONS[motion])])
    times = torch.linspace(0, 1, frames)[None]
    return make_scenes(world.shape, world.texture, world.colour, None, world.background, number, generator, times)


def reference_prompt(scene: Scenes, motion: int) -> str:
    """What a reference clip shows: "a striped red star is wug"."""
    return f"{caption(scene, 0, motion=False, background=False)} is {motion_word(motion)}"


def trained(base: Base, folder: Path, index: int, sizes: Custom) -> dict[str, list[str]]:
    """The LoRAs that each of ARMS has switched on for pair `index`, trained under `folder` unless they are there."""
    subject, motion = pair(index)
    images, video = folder / f"photos-{subject}", folder / f"reference-{motion}"
    if not images.exists():
        write_media(images, photos(subject, SIZE, sizes.seed)[0])
    scene = reference(motion, sizes.seed, base.recipe.num_frames)
    if not video.exists():
        write_media(video, render(scene)[0][0].transpose(0, 1))  # a folder of frames: nothing is lost in it
    looks = AppearanceSettings(
        images=str(images),
        prompt=f"{subject_prompt(subject)} {PHOTOGRAPHED}",
        trigger=SPARE_WORDS[subject],
        out=str(folder / f"appearance-{subject}"),
        steps=sizes.steps,
        seed=sizes.seed,
    )
    moves = MotionSettings(
        video=str(video),
        prompt=reference_prompt(scene, motion),
        out=str(folder / f"motion-{motion}"),
        steps=sizes.steps,
        seed=sizes.seed,
    )
    train_appearance(looks, base)
    train_motion(moves, base)
    both = TTTSettings(
        appearance=looks.out,
        motion=moves.out,
        prompt=pair_prompt(subject, motion),
        out=str(folder / f"ttt-{subject}-{motion}"),
        steps=sizes.ttt_steps,
        seed=sizes.seed,
    )
    train_ttt(both, base)
    arms: list[list[str]] = [[], [looks.out], [moves.out], [looks.out, moves.out], [both.out]]
    return dict(zip(ARMS, arms, strict=True))


def measure_pair(
    base: Base, judge: Judge, folder: Path, index: int, sizes: Custom
) -> dict[str, dict[str, list[float]]]:
    """What every clip of pair `index` scores, by arm; all arms start from the same noise.

    Beside identity and path error: "background", 1 where the judge sees the prompt's, and "seen", the share of frames
    with a subject. Below STILL is the path error of a subject that stays where it is. A contact sheet goes into
    `folder`: the photos, the reference clip, and a clip of each arm.
    """
    subject, motion = pair(index)
    shots, shot_masks = photos(subject, SIZE, sizes.seed)
    truth, truth_masks = render(reference(motion, sizes.seed, base.recipe.num_frames))
    path, _ = read_path(truth, truth_masks)
    prompts = [pair_prompt(subject, motion)] * sizes.seeds
    seeds = [derived_seed(sizes.seed, "clips", index, i) for i in range(sizes.seeds)]
    found, shown = {}, []
    for arm, loras in trained(base, folder, index, sizes).items():
        with loaded_loras(base, loras):
            videos = sample_videos(base, prompts, seeds)
        clips = videos.transpose(1, 2)
        seen = read_clip(judge, clips)
        ground = seen.background.argmax(dim=1) == list(BACKGROUNDS).index(BACKGROUND)
        found[arm] = {
            "identity": identity(clips, seen.masks, shots, shot_masks).tolist(),
            "path_error": path_error(seen.path, path.expand(len(clips), -1, -1)).tolist(),
            "background": ground.float().tolist(),
            "seen": in_sight(seen.path).float().mean(dim=1).tolist(),
        }
        shown.append(videos[0])
    found[STILL] = {"path_error": path_error(torch.zeros_like(path[..., :2]), path).tolist()}
    sheet = demo_sheet(list(shots), truth[0].transpose(0, 1), shown)
    write_media(folder / f"pair-{subject}-{motion}.png", sheet[None])
    return found


def measure_custom(
    base: Base, judge: Judge, folder: Path, sizes: Custom, found: dict[str, Any], save: Callable[[], None]
) -> None:
    """Measure all pairs into `found`, which may hold some of them already, and call `save` after each.

    Args:
        base: the network and its companions; its LoRAs are switched by arm.
        judge: reads masks and paths of what is generated.
        folder: for runs and contact sheets.
        sizes: of the measurement.
        found: gets "pairs" ("subject-motion" -> arm -> measure -> a number a clip), and what `summary` says of them.
        save: writes `found` down.
    """
    pairs = found.setdefault("pairs", {})
    for index in range(sizes.pairs):
        name = "-".join(map(str, pair(index)))
        if name not in pairs:
            pairs[name] = measure_pair(base, judge, folder, index, sizes)
            save()
    found |= summary(pairs)
    save()


def summary(pairs: dict[str, dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Means of the arms and of standing still, and paired differences between arms with 95 % intervals.

    Pairs share subjects and motions, hence `crossed_interval`; a single pair has no interval (None).
    """
    subjects, motions = zip(*(map(int, name.split("-")) for name in pairs), strict=True)

    def by_pair(arm: str, measure: str) -> Tensor:
        return torch.tensor([sum(p[arm][measure]) / len(p[arm][measure]) for p in pairs.values()])

    first = next(iter(pairs.values()))
    means = {arm: {name: by_pair(arm, name).mean().item() for name in first[arm]} for arm in (*ARMS, STILL)}
    differences: dict[str, dict[str, dict[str, Any]]] = {}
    for before, after in COMPARED:
        rows = differences.setdefault(f"{after} - {before}", {})
        for measure in ("identity", "path_error"):
            values = by_pair(after, measure) - by_pair(before, measure)
            rows[measure] = {"mean": values.mean().item(), "interval": crossed_interval(values, subjects, motions)}
    return {"means": means, "differences": differences}
