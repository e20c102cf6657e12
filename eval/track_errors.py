"""How far trackers go astray on the rendered world, where the truth is known: `python -m eval.track_errors`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.fidelity import motion_fidelity, moving
from eval.reading import load_judge
from eval.rendered import judge_tracker
from eval.report import Table, markdown_table
from eval.tracks import GRID, Tracker, Tracks, lucas_kanade, true_tracks
from model import UserError
from sampling import derived_seed
from train.world import MOTIONS, Scenes, make_scenes, random_scenes, render
from weights import parse_settings, run_command


@dataclass(kw_only=True)
class TrackErrorSettings:
    """How much is tracked.

    Args:
        clips: of each motion.
        seed: of the scenes.
    """

    clips: int = 40
    seed: int = 0


def scenes_in(motion: str, settings: TrackErrorSettings) -> Scenes:
    """Random subjects of the world, all in one of MOTIONS."""
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "track errors", motion))
    drawn = random_scenes(settings.clips, generator)
    number = torch.full((settings.clips,), list(MOTIONS).index(motion))
    return make_scenes(drawn.shape, drawn.texture, drawn.colour, None, drawn.background, number, generator)


def strays(found: Tracks, true: Tracks) -> tuple[Tensor, Tensor]:
    """Distances in pixels of the tracks that start on the subject from where its points are, and whether each is seen.

    Two of (n, f - 1). Both trackers start from the same grid, so that points belong together by where they start.
    """
    starts = torch.cdist(true.points[:, 0], found.points[:, 0]).argmin(dim=1)
    its = Tracks(found.points[starts], found.visible[starts])
    return (its.points - true.points).norm(dim=-1)[:, 1:], its.visible[:, 1:]


def fidelity(track: Tracker, videos: Tensor, truths: Sequence[Tracks]) -> tuple[float, int]:
    """The mean motion fidelity to the true tracks, and of how many of the clips (n, f, 3, h, w) something is seen."""
    values = []
    for video, true in zip(videos, truths, strict=True):
        ours, theirs = moving(track(video)), moving(true)
        if len(ours.points) and len(theirs.points):
            values.append(motion_fidelity(ours, theirs))
    return (sum(values) / len(values) if values else float("nan")), len(values)


def measure(settings: TrackErrorSettings) -> Table:
    """A row for each motion: errors of Lucas-Kanade, and the fidelity of its and of the judge's tracks to the truth.

    Raises:
        UserError: no clips, or OpenCV is not installed.
    """
    if settings.clips < 1:
        raise UserError(f"clips must be at least 1, and is {settings.clips}")
    flow, judge = lucas_kanade(), judge_tracker(load_judge())
    rows = []
    for motion in MOTIONS:
        scenes = scenes_in(motion, settings)
        videos, truths = render(scenes)[0].transpose(1, 2), true_tracks(scenes, grid=GRID)
        off, seen = zip(*(strays(flow(v), t) for v, t in zip(videos, truths, strict=True)), strict=True)
        distance, kept = torch.cat(off), torch.cat(seen)
        errors = distance[kept]
        row = [f"{errors.mean():.2f}", f"{errors.median():.2f}", f"{errors.quantile(0.9):.2f}"]
        row.append(f"{100 * (1 - kept.float().mean()):.0f} %")
        for track in (flow, judge):
            value, count = fidelity(track, videos, truths)
            row.append(f"{value:.2f} ({count})" if count else "-")
        rows.append([motion, *row])
    head = ["motion", "mean, px", "median", "90 %", "lost", "Lucas-Kanade's fidelity", "the judge's"]
    return Table(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m eval.track_errors`."""
    about = "Trackers against the rendered world's truth: errors of points on the subject, and fidelity of all tracks."
    settings = parse_settings(TrackErrorSettings, argv, prog="python -m eval.track_errors", description=about)
    print(markdown_table(measure(settings)))


if __name__ == "__main__":
    run_command(main)
