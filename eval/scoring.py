"""All scores of clips in one go: every frame goes through CLIP once, and photos and reference clip but once for all."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor
from tqdm import tqdm

from eval.clip import clip_i, clip_t, temporal_consistency
from eval.distances import diversity, frame_distance
from eval.fidelity import chance_level, motion_fidelity, moving, published_fidelity
from eval.rendered import in_world, rendered_scores
from eval.scorers import TITLES, Scorers, ScorerSettings, described, open_scorers
from eval.tracks import Tracks
from model import UserError

__all__ = [
    "TITLES",
    "ScorerSettings",
    "Scorers",
    "described",
    "open_scorers",
    "score_clips",
    "score_diversity",
    "together",
]

EPS = 1e-8  # pixels: the published code divides by 0, and one point that stands still would make its value NaN
DRAWS = 200  # for a chance level: its error is below 0.003


def score_clips(
    scorers: Scorers,
    videos: Sequence[Tensor],
    prompts: Sequence[str],
    images: Sequence[Tensor] | Tensor | None = None,
    reference: Tensor | None = None,
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> list[dict[str, float]]:
    """Every score of every clip that can be taken; what was left out or cut is said in warnings.

    Args:
        scorers: what scores.
        videos: clips (f, 3, h, w) in [-1, 1], of any sizes, two frames or more each.
        prompts: one for each clip; "" is none: no CLIP-T then.
        images: photos of the subject, each (3, h, w) in [-1, 1]: for CLIP-I and, in the rendered world, identity.
        reference: the clip whose motion they should have (f, 3, h, w): for motion fidelity and, in the rendered world,
            path error and leaks. Clip and reference are both cut to the first frames of the shorter one.
        names: of the clips, for warnings.
        progress: show a bar.

    Returns:
        For each clip, by name (see `described`), what could be taken: clip_t, clip_i, temporal_consistency,
        frame_distance, motion_fidelity, chance (of motion fidelity) and published_fidelity; in the rendered world
        identity, path_error, and leak_shape, leak_colour, leak_texture and leak_background where these can leak.

    Raises:
        UserError: no clips, clips of one frame, a reference in which nothing moves, or clips that are to be of the
            rendered world and are not.
    """
    names = [f"clip {i + 1}" for i in range(len(videos))] if names is None else names
    check_clips(videos, prompts, names)
    world = scorers.judge is not None and (scorers.world or in_world(videos))
    features = clip_features(scorers, videos, progress)
    told = sorted({prompt for prompt in prompts if prompt})
    texts = dict(zip(told, scorers.clip.texts(told), strict=True)) if told else {}
    photos = None if images is None else torch.cat([scorers.clip.images(image[None]) for image in images])
    motions = fidelities(scorers, videos, reference, names, progress)
    scores: list[dict[str, float]] = []
    for video, prompt, its, motion in zip(videos, prompts, features, motions, strict=True):
        found = {}
        if prompt:
            found["clip_t"] = clip_t(its, texts[prompt]) * (100 if scorers.protocol == "loveu" else 1)
        if photos is not None:
            found["clip_i"] = clip_i(its, photos)
        found["temporal_consistency"] = temporal_consistency(
            its, "all" if scorers.protocol == "loveu" else "consecutive"
        )
        if scorers.by_features:
            found["frame_distance"] = 1 - temporal_consistency(its)
        else:
            found["frame_distance"] = frame_distance(video, scorers.distance)
        scores.append(found | motion)
    if world and scorers.judge is not None:
        pictures = None if images is None else list(images)
        rows = rendered_scores(scorers.judge, videos, prompts, pictures, reference)
        scores = [found | row for found, row in zip(scores, rows, strict=True)]
    return scores


def score_diversity(scorers: Scorers, videos: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, float]:
    """How much the samples of each prompt differ from each other: by prompt, where there are two samples or more.

    The mean distance over pairs of samples and their frames of the same number; of samples that differ in length, the
    first frames of the shortest.

    Args:
        scorers: what scores.
        videos: clips (f, 3, h, w) in [-1, 1]; those of one prompt of one size.
        prompts: one for each clip; clips without one ("") are left out.
    """
    found = {}
    for prompt in dict.fromkeys(prompt for prompt in prompts if prompt):
        samples = [video for video, its in zip(videos, prompts, strict=True) if its == prompt]
        length = min(map(len, samples))
        samples = [video[:length] for video in samples]
        if len(samples) < 2:
            continue
        if len({video.shape for video in samples}) > 1:
            warnings.warn(f"the samples of {prompt!r} are of several sizes: no diversity", stacklevel=2)
        elif scorers.by_features:
            features = clip_features(scorers, samples)
            pairs = [1 - (a * b).sum(dim=-1).mean() for a, b in combinations(features, 2)]
            found[prompt] = torch.stack(pairs).mean().item()
        else:
            found[prompt] = diversity(samples, scorers.distance)
    return found


def clip_features(scorers: Scorers, videos: Sequence[Tensor], progress: bool = False) -> list[Tensor]:
    """CLIP's features of every frame of every clip, (f, d) each: frames of one size share batches."""
    waiting: list[Tensor] = []
    parts: list[Tensor] = []

    def flush() -> None:
        if waiting:
            parts.append(scorers.clip.images(torch.cat(waiting), scorers.batch_size))
            waiting.clear()

    for video in bar(videos, "CLIP", progress):
        if waiting and (waiting[0].shape[1:] != video.shape[1:] or sum(map(len, waiting)) >= scorers.batch_size):
            flush()
        waiting.append(video)
    flush()
    return list(torch.cat(parts).split([len(video) for video in videos]))


def fidelities(
    scorers: Scorers, videos: Sequence[Tensor], reference: Tensor | None, names: Sequence[str], progress: bool = False
) -> list[dict[str, float]]:
    """motion_fidelity, chance and published_fidelity of each clip, or nothing where they cannot be taken.

    Raises:
        UserError: a reference in which nothing moves.
    """
    if reference is None:
        return [{} for _ in videos]
    if scorers.tracker is None:
        warnings.warn("no motion fidelity: OpenCV, which tracks, is missing: pip install -e '.[eval]'", stacklevel=3)
        return [{} for _ in videos]
    for length in sorted({len(video) for video in videos} - {len(reference)}):
        its_names = [name for video, name in zip(videos, names, strict=True) if len(video) == length]
        warnings.warn(
            f"{together(its_names)} {'has' if len(its_names) == 1 else 'have'} {length} frames and the reference "
            f"{len(reference)}: the first {min(length, len(reference))} of both are compared",
            stacklevel=3,
        )
    theirs: dict[int, Tracks] = {}
    rows: list[dict[str, float]] = []
    for video, name in bar(list(zip(videos, names, strict=True)), "tracks", progress):
        length = min(len(video), len(reference))
        if length not in theirs:
            theirs[length] = reference_tracks(scorers, reference[:length])
        tracks = scorers.tracker(video[:length])
        ours, its = moving(tracks, scorers.still), moving(theirs[length], scorers.still)
        if not len(ours.points):
            warnings.warn(
                f"{name} has no motion fidelity: {scorers.tracker_name} followed no point in it that goes "
                f"{scorers.still:g} pixels or more and is seen half of the time",
                stacklevel=3,
            )
            rows.append({})
            continue
        row = {
            "motion_fidelity": motion_fidelity(ours, its),
            "chance": chance_level(len(ours.points), len(its.points), length - 1, draws=DRAWS),
        }
        if len(tracks.points) == len(theirs[length].points):
            row["published_fidelity"] = published_fidelity(tracks, theirs[length], EPS)
        rows.append(row)
    return rows


def reference_tracks(scorers: Scorers, reference: Tensor) -> Tracks:
    """All tracks of a reference clip (f, 3, h, w), some of which move.

    Raises:
        UserError: nothing moves in it.
    """
    assert scorers.tracker is not None
    tracks = scorers.tracker(reference)
    if not len(moving(tracks, scorers.still).points):
        raise UserError(
            f"nothing moves in the reference clip: {scorers.tracker_name} followed no point that goes "
            f"{scorers.still:g} pixels or more and is seen half of the time. Lower --still, or score without "
            "--reference"
        )
    return tracks


def check_clips(videos: Sequence[Tensor], prompts: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for what cannot be scored."""
    if not len(videos) or not len(videos) == len(prompts) == len(names):
        raise UserError(f"{len(videos)} clips, {len(prompts)} prompts and {len(names)} names do not go together")
    for video, name in zip(videos, names, strict=True):
        if video.ndim != 4 or video.shape[1] != 3 or len(video) < 2:
            raise UserError(f"{name} is no clip of two frames or more (f, 3, h, w), but {tuple(video.shape)}")


def together(names: Sequence[str]) -> str:
    """One name, or the first and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def bar(items: Sequence, label: str, shown: bool) -> Iterator:
    """The items, with a progress bar while they are many."""
    return iter(tqdm(items, desc=label, leave=False, disable=not shown or len(items) < 4))
