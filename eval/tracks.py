"""Points followed through videos: by optical flow, by CoTracker, and as they truly move in the rendered world."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import UserError
from train.shapes import REACH, distance_tables
from train.world import SIZE, Scenes
from weights import read_checkpoint

GRID = 16  # points of a side
ASTRAY = 0.5  # pixels: a point that comes back so far from where it was has been lost
PACKAGE = "git+https://github.com/facebookresearch/co-tracker"
WEIGHTS = "scaled_offline.pth of https://huggingface.co/facebook/cotracker3"
COARSEST = 16  # pixels of a side of the pyramid's smallest picture


@dataclass(frozen=True)
class Tracks:
    """n points followed through f frames.

    Args:
        points: x (to the right) and y (down) in pixels, (n, f, 2); (0, 0) is the centre of the upper left pixel.
        visible: whether the tracker saw the point, (n, f), bool. Where it did not, `points` is its guess.
    """

    points: Tensor
    visible: Tensor


Tracker = Callable[[Tensor], Tracks]  # a video (f, 3, h, w) in [-1, 1]


def grid_points(grid: int, height: int, width: int) -> Tensor:
    """The centres of grid x grid cells of a frame, row by row: x, y in pixels, (grid * grid, 2)."""
    cells = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(cells * height - 0.5, cells * width - 0.5, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def lucas_kanade(grid: int = GRID, window: int | None = None) -> Tracker:
    """Pyramidal Lucas-Kanade (Bouguet 2001) of OpenCV, from frame to frame, on all three colours: no weights needed.

    A point is lost for good when it leaves the frame, when nothing around it tells directions apart, or when tracked
    back it misses its old place by half a pixel or more. From then on it is not visible and stays where it was last.
    Where a subject passes over a still background, points beside it are dragged along: on rendered clips these are two
    in three of the tracks that move. Those that are not soon lost, which `eval.fidelity.moving` drops, go the subject's
    way: the fidelity of what is left to the true tracks is 0.91 on the mean.

    On the rendered world, 40 clips of each motion, 64 x 64 pixels, points on the subject are off by 0.08 pixels in the
    median while they are seen: 0.04 of those going straight, 0.3 circling, 0.5 growing or shrinking. It does not follow
    a turn of 20 degrees a frame: spinning subjects' points are off by 4 pixels, and three in four are lost.

    Args:
        grid: points of a side, spread evenly over the first frame. 12 to 32 tell motions apart equally well.
        window: pixels of a side, odd; None: a sixth of the frame's shorter side, at most 21. From 7 to 15 little
            changes on 64 x 64 pixels; a smaller one loses more points, a larger one drags more of the background.

    Returns:
        A tracker that gives all grid * grid points. It raises UserError for what is no video (f, 3, h, w).

    Raises:
        UserError: OpenCV is not installed, or the grid has no points.
    """
    check_grid(grid)
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "points are tracked by OpenCV, which is not installed: pip install -e '.[eval]'. "
            "Or give the weights of CoTracker."
        ) from error

    def track(video: Tensor) -> Tracks:
        check_video(video)
        height, width = video.shape[-2:]
        shorter = min(height, width)
        side = window or min(21, max(5, shorter // 6 | 1))
        levels = max(0, (shorter // COARSEST).bit_length() - 1)
        frames = ((video.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
        pictures = list(frames.permute(0, 2, 3, 1).contiguous().numpy())
        options: dict[str, Any] = {"nextPts": None, "winSize": (side, side), "maxLevel": levels}

        def flow(before: np.ndarray, after: np.ndarray, points: Tensor) -> tuple[Tensor, Tensor]:
            there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, points.numpy(), **options)
            return torch.from_numpy(there), torch.from_numpy(found)[:, 0].bool()

        start = grid_points(grid, height, width)
        places, seen = [start], [torch.ones(len(start), dtype=torch.bool)]
        edge = torch.tensor([width, height]) - 0.5
        for before, after in pairwise(pictures):
            new, found = flow(before, after, places[-1])
            back, again = flow(after, before, new)
            inside = ((new >= -0.5) & (new <= edge)).all(dim=-1)
            kept = seen[-1] & found & again & inside & ((back - places[-1]).norm(dim=-1) < ASTRAY)
            places.append(torch.where(kept[:, None], new, places[-1]))
            seen.append(kept)
        return Tracks(torch.stack(places, dim=1), torch.stack(seen, dim=1))

    return track


def load_cotracker(weights: str | Path, grid: int = 55, device: str = "cpu") -> Tracker:
    """CoTracker3, offline (Karaev et al. 2024), from given weights.

    Written for version 3.0.0 of the package, which the user installs; it and its weights are CC-BY-NC. The weights are
    read here, without running code, and handed to a model that the package builds empty.

    Args:
        weights: scaled_offline.pth of https://huggingface.co/facebook/cotracker3.
        grid: points of a side, spread evenly over the first frame by CoTracker itself; the published code of motion
            fidelity tracks 55 x 55.
        device: where it runs.

    Returns:
        A tracker that gives all grid * grid points, visible or not. It raises UserError for what is no video.

    Raises:
        UserError: the package is not installed or is of another version, the file is missing, damaged or not of
            these weights, or the grid has no points.
    """
    check_grid(grid)  # CoTracker takes 0 for every pixel
    tensors = read_checkpoint(weights)
    # the package seeds torch anew when it is imported
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            from cotracker.predictor import CoTrackerPredictor
        except ImportError as error:
            raise UserError(
                f"CoTracker is not installed ({error}): pip install {PACKAGE}. Its weights are {WEIGHTS}."
            ) from error
        try:
            predictor = CoTrackerPredictor(checkpoint=None, offline=True, v2=False, window_len=60)
        except TypeError as error:
            raise UserError(
                f"the CoTracker that is installed is not version 3 ({error}): pip install --upgrade {PACKAGE}"
            ) from error
    try:
        predictor.model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{weights} does not hold the weights of CoTracker3, offline ({WEIGHTS}): "
            + " ".join(str(error).split())[:300]
        ) from error
    predictor = predictor.to(device).eval()

    @torch.no_grad()
    def track(video: Tensor) -> Tracks:
        check_video(video)
        frames = (video.float().clamp(-1, 1) + 1) * 127.5
        points, visible = predictor(frames[None].to(device), grid_size=grid)  # (1, f, n, 2), (1, f, n)
        return Tracks(points[0].transpose(0, 1).float().cpu(), visible[0].transpose(0, 1).bool().cpu())

    return track


def check_grid(grid: int) -> None:
    """Raises UserError for a grid without points."""
    if grid < 1:
        raise UserError(f"a grid has at least one point a side, not {grid}")


def check_video(video: Tensor) -> None:
    """Raises UserError for what is no video (f, 3, h, w)."""
    if video.ndim != 4 or video.shape[1] != 3 or not len(video):
        raise UserError(f"points are tracked in a video (f, 3, h, w), not in {tuple(video.shape)}")


def true_tracks(scenes: Scenes, size: int = SIZE, grid: int = GRID) -> list[Tracks]:
    """How points of the subjects truly move in scenes of the rendered world.

    Args:
        scenes: n scenes of f frames.
        size: pixels of a frame's side.
        grid: the points are those of `grid_points` that lie within the subject's outline, in their order.

    Returns:
        The tracks of each scene, (its points, f, 2): a point is fixed to the subject, moves, turns and grows with it,
        and is visible while it is in the frame. The background stands still and is left out.
    """
    start = (grid_points(grid, size, size) + 0.5) / size - 0.5
    own, depth = subject_points(scenes, start)
    x, y, radius, angle = scenes.path[..., None].unbind(-2)  # (n, f, 1) each
    u, v = (t[:, None] for t in own.unbind(-1))
    cos, sin = torch.cos(angle), torch.sin(angle)
    places = torch.stack([x + radius * (cos * u - sin * v), y + radius * (sin * u + cos * v)], dim=-1)
    pixels = ((places + 0.5) * size - 0.5).transpose(1, 2)  # (n, points, f, 2)
    visible = (places.abs() <= 0.5).all(dim=-1).transpose(1, 2)
    return [Tracks(p[d < 0], s[d < 0]) for p, s, d in zip(pixels, visible, depth, strict=True)]


def subject_points(scenes: Scenes, places: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the first frame in the subjects' own axes: x, y in frame widths from the centre (m, 2).

    Returns:
        u, v in radii (n, m, 2), and the distance from the outline, negative inside, in radii (n, m).
    """
    x, y, radius, angle = scenes.path[:, 0, :, None].unbind(1)  # (n, 1) each
    right, down = (places[:, 0] - x) / radius, (places[:, 1] - y) / radius
    cos, sin = torch.cos(angle), torch.sin(angle)
    own = torch.stack([cos * right + sin * down, cos * down - sin * right], dim=-1)
    tables = distance_tables()[scenes.shape]
    depth = F.grid_sample(tables, own[:, None] / REACH, padding_mode="border", align_corners=True)
    return own, depth[:, 0, 0]
