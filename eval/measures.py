"""What clips are compared by: where a subject is, how far two paths are apart, how alike two subjects look."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = (0.5, 2.0)  # how much smaller or larger the same motion may be
BINS = 5  # of each colour channel
LOST = 0.03  # a subject smaller than this, in frame widths, is not to be seen
ANGLES = 24  # silhouettes are compared at so many angles
ALIGNED = 32  # pixels of a side of an aligned subject
REACH = 1.1  # an aligned subject's picture reaches so many of its sizes from its centroid


def mean(values: Sequence[float]) -> float:
    """Of one or more numbers."""
    return sum(values) / len(values)


def placement(masks: Tensor) -> Tensor:
    """Where subjects are: masks (n, 1, h, w) in [0, 1], square -> (n, 3).

    Centroid x and y in frame widths from the centre (x to the right, y down), and size, the square root of the area in
    frame widths. An empty mask lies in the centre with size 0.
    """
    height, width = masks.shape[-2:]
    # what a network leaves everywhere would pull the centroid to the frame's centre
    weight = masks[:, 0] * (masks[:, 0] > 0.3)
    x = (torch.arange(width, device=masks.device) + 0.5) / width - 0.5
    y = (torch.arange(height, device=masks.device) + 0.5) / height - 0.5
    total = weight.sum(dim=(1, 2))
    divisor = total.clamp_min(1e-6)
    across, down = (weight * x).sum(dim=(1, 2)) / divisor, (weight * y[:, None]).sum(dim=(1, 2)) / divisor
    return torch.stack([across, down, (total / (height * width)).sqrt()], dim=-1)


def aligned(pictures: Tensor, places: Tensor, angle: float = 0.0) -> Tensor:
    """Subjects moved to the centre, brought to one size and turned.

    Args:
        pictures: (n, c, h, w).
        places: (n, 3) as of `placement`.
        angle: radians, clockwise on the screen.

    Returns:
        (n, c, 32, 32), black (0) beyond the frame.
    """
    x, y, size = places.unbind(-1)
    reach = 2 * REACH * size.clamp_min(0.02)  # grid_sample counts from -1 to 1 across the frame
    cos, sin = math.cos(angle) * reach, math.sin(angle) * reach
    theta = torch.stack([torch.stack([cos, sin, 2 * x], -1), torch.stack([-sin, cos, 2 * y], -1)], dim=1)
    grid = F.affine_grid(theta, [len(pictures), pictures.shape[1], ALIGNED, ALIGNED], align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def path_error(path: Tensor, reference: Tensor) -> Tensor:
    """How far paths are from the references', frame by frame: 0 is the same motion.

    Both are shifted to start at 0, and the path is scaled by the factor within 0.5 and 2 that brings it nearest in
    least squares. The mean distance is given in units of the reference's extent, the diagonal of the box around it.
    Time is not shifted: the reference is one clip. Standing still scores 0.3 to 0.6, depending on the reference.

    Args:
        path: x, y, and, if given, the subject's size as of `placement`, in frame widths, (n, f, 2 or more). A frame
            where the subject is lost (smaller than 0.03) counts as far off as the reference is wide, 1, and for nothing
            else: paths are shifted by the first frame where it is seen.
        reference: (n, f, 2 or more) of subjects that are seen throughout.

    Returns:
        (n,).
    """
    found = in_sight(path) if path.shape[-1] > 2 else torch.ones_like(path[..., 0], dtype=torch.bool)
    first = found.int().argmax(dim=1)[:, None, None].expand(-1, 1, 2)
    path, reference = (p[..., :2] - p[..., :2].gather(1, first) for p in (path, reference))
    counted = path * found[..., None]
    square = counted.square().sum(dim=(1, 2)).clamp_min(1e-9)
    scale = ((counted * reference).sum(dim=(1, 2)) / square).clamp(*SCALES)
    extent = (reference.amax(dim=1) - reference.amin(dim=1)).norm(dim=-1).clamp_min(1e-6)
    distance = (scale[:, None, None] * path - reference).norm(dim=-1) / extent[:, None]
    return distance.where(found, torch.ones_like(distance)).mean(dim=1)


def in_sight(path: Tensor) -> Tensor:
    """Whether there is a subject: paths (n, f, 3: x, y, size) -> (n, f)."""
    return path[..., 2] >= LOST


def colour_histogram(pictures: Tensor, masks: Tensor) -> Tensor:
    """Shares of 5 x 5 x 5 colours among the pixels of `pictures` (n, 3, h, w) in [-1, 1] that `masks` (n, 1, h, w)
    cover: (n, 125), which sum to 1, or to 0 for an empty mask. A colour between bins counts in its neighbours.
    """
    levels = (pictures.clamp(-1, 1) + 1) / 2 * (BINS - 1)
    centres = torch.arange(BINS, device=pictures.device, dtype=pictures.dtype)
    near = (1 - (levels.flatten(2)[..., None] - centres).abs()).clamp_min(0)  # (n, 3, h * w, bins)
    weighted = near[:, 0] * masks.flatten(1)[..., None]
    counts = torch.einsum("npr,npg,npb->nrgb", weighted, near[:, 1], near[:, 2]).flatten(1)
    return counts / counts.sum(dim=1, keepdim=True).clamp_min(1e-6)


def silhouette_overlap(masks: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of silhouettes (n, 1, h, w) with each of (m, 1, h, w): (n, m).

    Place and size are aligned, and of 24 angles the best one counts.
    """
    still = aligned(masks, placement(masks)).flatten(1)[:, None]
    best = torch.zeros(len(masks), len(others), device=masks.device)
    for i in range(ANGLES):
        turned = aligned(others, placement(others), 2 * math.pi * i / ANGLES).flatten(1)[None]
        overlap = torch.minimum(still, turned).sum(-1) / torch.maximum(still, turned).sum(-1).clamp_min(1e-6)
        best = torch.maximum(best, overlap)
    return best


def identity(videos: Tensor, masks: Tensor, photos: Tensor, photo_masks: Tensor) -> Tensor:
    """How much the subjects of clips look like that of some photos, in [0, 1].

    The mean of two: the intersection of colour histograms inside the masks, and the silhouettes' overlap with the
    photo that fits best. Both are means over the frames. A subject that has nothing to do with the photos' scores about
    0.4, not 0: every outline overlaps every other, and colours recur.

    Args:
        videos: n clips (n, 3, f, h, w) in [-1, 1].
        masks: their subjects (n, 1, f, h, w) in [0, 1]; an empty one scores 0.
        photos: m photos of the one subject (m, 3, h, w).
        photo_masks: (m, 1, h, w).

    Returns:
        (n,).
    """
    frames, covers = (t.transpose(1, 2).flatten(0, 1) for t in (videos, masks))
    wanted = colour_histogram(photos, photo_masks).mean(dim=0)
    colours = torch.minimum(colour_histogram(frames, covers), wanted).sum(dim=1)
    outline = silhouette_overlap(covers, photo_masks).amax(dim=1)
    return ((colours + outline) / 2).unflatten(0, (len(videos), -1)).mean(dim=1)


def crossed_interval(
    values: Tensor, subjects: Sequence[int], motions: Sequence[int], seed: int = 0, draws: int = 10000
) -> tuple[float, float] | None:
    """The 95 % interval of the mean over pairs of a subject and a motion, each of which serves in several pairs.

    Such pairs are not independent: subjects and motions are drawn anew, each with replacement, and a pair counts as
    often as both together were drawn (the bootstrap for crossed factors: Owen 2007, "The pigeonhole bootstrap"). Draws
    that hold none of the pairs are left out.

    Args:
        values: one for each pair, (n,).
        subjects: the n pairs' subjects.
        motions: the n pairs' motions.
        seed: of the draws.
        draws: how many.

    Returns:
        Its ends; None for one pair, which tells nothing about others.
    """
    if len(values) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    weight = torch.ones(draws, len(values), dtype=torch.float64)
    for factor in (subjects, motions):
        levels, which = torch.tensor(factor).unique(return_inverse=True)
        drawn = torch.randint(len(levels), (draws, len(levels)), generator=generator)
        weight *= F.one_hot(drawn, len(levels)).sum(dim=1)[:, which]
    total = weight.sum(dim=1)
    means = (weight @ values.double())[total > 0] / total[total > 0]
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
