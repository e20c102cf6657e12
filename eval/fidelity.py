"""Motion fidelity (Yatim et al. 2024, arXiv 2311.17009, "Space-Time Diffusion Features for Zero-Shot Text-Driven
Motion Transfer").

It compares the tracks of two videos by their directions alone: speed, and where in the frame a track lies, do not
count. Whether a point is visible does not either, as in the published code: a tracker's guess counts in full.
"""

import math
from functools import cache

import torch
from torch import Tensor

from eval.tracks import Tracks
from model import UserError

ROWS = 1024  # tracks that are compared with all others at a time
WORK = 50_000_000  # random directions that a chance level may cost


def moving(tracks: Tracks, still: float = 0.5, seen: float = 0.5) -> Tracks:
    """The tracks that move, to be taken of both videos.

    The jitter of a tracker on a still background has directions too, and as many tracks as the background is large.
    A track's displacement is the largest distance from its first position: the distance from the first to the last is
    0 for a subject that comes back, and the length of the path adds up jitter.

    Our reading: tracks that were lost for most of the clip say little of it, and are dropped as well. Of 36 clips of
    the rendered world, each against one of the same motion but another subject, tracked by `lucas_kanade`, the mean
    fidelity so rises from 0.7 to 0.9; against other motions it is below 0.3 either way.

    Args:
        tracks: of one video.
        still: pixels; a track with a smaller displacement is dropped.
        seen: a track that is visible in a smaller share of the frames is dropped; 0 keeps them all.
    """
    displacement = (tracks.points - tracks.points[:, :1]).norm(dim=-1).amax(dim=1)
    kept = (displacement >= still) & (tracks.visible.float().mean(dim=1) >= seen)
    return Tracks(tracks.points[kept], tracks.visible[kept])


def motion_fidelity(tracks: Tracks, reference: Tracks, eps: float = 1e-8) -> float:
    """How alike two videos move: 1 for the same directions throughout, -1 for opposite ones.

    Yatim et al., "Motion-Fidelity-Score", and CustomTTT, supplement, equation 1: half of the mean over the generated
    tracks of the best-matching reference track's correlation, plus the mean over the reference tracks of the
    best-matching generated one's. The formula as printed omits the half, and then reaches to 2: the published tables
    lie below 1. Two tracks correlate by the mean over time of the cosine between their steps from frame to frame.

    The best match of many is good by chance: see `chance_level`.

    Args:
        tracks: of the generated video, (n, f, 2).
        reference: of the reference video, (m, f, 2); n and m may differ.
        eps: pixels; a shorter step has no direction, and its cosine with any other is 0.

    Raises:
        UserError: different numbers of frames, fewer than two, or no tracks in one of the videos.
    """
    check(tracks, reference)
    ours, theirs = directions(tracks, eps), directions(reference, eps)
    best_theirs = torch.full((len(theirs),), -math.inf, dtype=theirs.dtype)
    best_ours = []
    for part in ours.split(ROWS):
        similarity = part @ theirs.T
        best_ours.append(similarity.amax(dim=1))
        best_theirs = torch.maximum(best_theirs, similarity.amax(dim=0))
    return (torch.cat(best_ours).mean().item() + best_theirs.mean().item()) / 2


def published_fidelity(tracks: Tracks, reference: Tracks, eps: float = 0.0) -> float:
    """The value that the code published with Yatim et al. gives, for comparison with numbers that came from it.

    It differs from the paper in three ways. Only the generated tracks look for a match. 1 is taken off the correlation
    of tracks with the same number, so that a track cannot match the one that started at the same place: a video of
    unrelated tracks scores less than 1 against itself (0.62 for 3025 tracks and 15 steps, the chance level). And one
    track that stands still for one step makes the whole score NaN.

    Args:
        tracks: of the generated video, (n, f, 2), unfiltered: the published code keeps still tracks.
        reference: of the reference video, (n, f, 2), from the same places.
        eps: pixels; a shorter step's cosine is 0. 0 divides as the published code does, and may give NaN.

    Raises:
        UserError: different numbers of frames or tracks, fewer than two frames, or no tracks.
    """
    check(tracks, reference)
    if len(tracks.points) != len(reference.points):
        raise UserError(
            "the published motion fidelity compares as many tracks as the reference has: "
            f"{len(tracks.points)} are given for {len(reference.points)}"
        )
    ours, theirs = directions(tracks, eps), directions(reference, eps)
    best = []
    for first, part in zip(range(0, len(ours), ROWS), ours.split(ROWS), strict=True):
        similarity = part @ theirs.T
        rows = torch.arange(len(part))
        similarity[rows, first + rows] -= 1
        best.append(similarity.amax(dim=1))
    return torch.cat(best).mean().item()


def chance_level(n: int, m: int, steps: int, seed: int = 0, draws: int = 1000) -> float:
    """What `motion_fidelity` gives on the mean for n and m tracks whose every step has a random direction.

    It rises with the number of tracks and falls with that of steps: 0.62 for 3025 tracks each and 15 steps. Tracks
    that go smoothly, or all alike, are fewer independent ones than they number, and unrelated smooth ones match better.

    Args:
        n: generated tracks.
        m: reference tracks.
        steps: frames - 1.
        seed: of the simulation.
        draws: how often the best match is drawn; less often where more than 50 million directions were needed.

    Raises:
        UserError: one of n, m, steps or draws is not positive.
    """
    if min(n, m, steps, draws) < 1:
        raise UserError(f"a chance level takes at least one track, step and draw, not {n}, {m}, {steps} and {draws}")
    return (best_by_chance(m, steps, seed, draws) + best_by_chance(n, steps, seed, draws)) / 2


@cache
def best_by_chance(count: int, steps: int, seed: int, draws: int) -> float:
    """The mean correlation of any track with the best of `count` random ones."""
    generator = torch.Generator().manual_seed(seed)
    draws = max(1, min(draws, WORK // (count * steps)))
    total = 0.0
    for _ in range(draws):
        # whatever direction a step has, the angle between it and a random one is uniform
        angles = 2 * math.pi * torch.rand((count, steps), generator=generator)
        total += angles.cos_().mean(dim=1).amax().item()
    return total / draws


def directions(tracks: Tracks, eps: float) -> Tensor:
    """Unit steps (n, (f - 1) * 2), so scaled that a product of two rows is the mean cosine over time."""
    steps = tracks.points.double().diff(dim=1)
    length = steps.norm(dim=-1, keepdim=True)
    unit = torch.where(length >= eps, steps / length.clamp_min(eps), 0.0)
    return unit.flatten(1) / math.sqrt(steps.shape[1])


def check(tracks: Tracks, reference: Tracks) -> None:
    """Raises UserError for tracks that cannot be compared."""
    for its, video in ((tracks, "the generated video"), (reference, "the reference video")):
        if not len(its.points):
            raise UserError(f"{video} has no tracks: nothing moves in it, or the tracker found no points to follow")
    frames = tracks.points.shape[1], reference.points.shape[1]
    if frames[0] != frames[1]:
        raise UserError(
            "motions are compared frame by frame: "
            f"the generated video has {frames[0]} frames, the reference {frames[1]}"
        )
    if frames[0] < 2:
        raise UserError("a motion needs two frames or more, and there is one")
