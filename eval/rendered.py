"""What only the rendered world has, where a judge sees what is in a clip: likeness, path, leaks, and tracks."""

import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.measures import identity, in_sight, path_error
from eval.reading import ClipReading, Judge, read_clip
from eval.tracks import Tracker, Tracks
from eval.words import LEAKING, SUBJECTS, leaks
from train.world import SIZE


def in_world(videos: Sequence[Tensor]) -> bool:
    """Whether all clips (f, 3, h, w) have the rendered world's size."""
    return all(video.shape[-2:] == (SIZE, SIZE) for video in videos)


def rendered_scores(
    judge: Judge,
    videos: Sequence[Tensor],
    prompts: Sequence[str],
    images: Sequence[Tensor] | None,
    reference: Tensor | None,
) -> list[dict[str, float]]:
    """identity, path_error, and leak_shape, leak_colour, leak_texture, leak_background of each clip, where they can be
    taken; see `measures` and `words.leaks`.

    Args:
        judge: what sees.
        videos: clips (f, 3, 64, 64) in [-1, 1] of two frames or more.
        prompts: one for each; "" is none.
        images: photos of the subject (3, h, w) in [-1, 1]; others than 64x64 are cut to their centre and resized.
        reference: the clip whose motion they should have (f, 3, h, w); where it is not 64x64, or the judge sees no
            subject in it, a warning says that path error and leaks are left out.

    Raises:
        UserError: clips of another size.
    """
    pictures = photos = None
    if images is not None:
        pictures = torch.stack([squared(image) for image in images])
        photos = read_stills(judge, pictures)
    seen = [read_clip(judge, video.transpose(0, 1)[None]) for video in videos]
    shown = None
    if reference is not None and reference.shape[-2:] == (SIZE, SIZE) and len(reference) > 1:
        shown = read_clip(judge, reference.transpose(0, 1)[None])
    if reference is not None and (shown is None or not in_sight(shown.path).all()):
        why = f"it is not {SIZE}x{SIZE}" if shown is None else "the judge loses sight of its subject"
        warnings.warn(f"no path error and no leaks from the reference clip: {why}", stacklevel=3)
        shown = None
    rows = []
    for video, prompt, its in zip(videos, prompts, seen, strict=True):
        row: dict[str, float] = {}
        if pictures is not None and photos is not None:
            masks = photos.masks[0].transpose(0, 1)[: len(pictures)]
            row["identity"] = identity(video.transpose(0, 1)[None], its.masks, pictures, masks).item()
        if shown is not None:
            length = min(its.path.shape[1], shown.path.shape[1])
            row["path_error"] = path_error(its.path[:, :length], shown.path[:, :length]).item()
            found = leaks(prompt, classes(its), classes(shown), None if photos is None else classes(photos))
            row |= {f"leak_{name}": value for name, value in found.items()}
        rows.append(row)
    return rows


def judge_tracker(judge: Judge) -> Tracker:
    """Points of the subject as the judge sees it: its centre and eight places around it, which grow with it.

    Of clips that flicker, as the tiny base's do, optical flow soon loses every point; the judge finds the subject in
    each frame by itself. It does not see a turn, and whatever else moves.

    Returns:
        A tracker of videos (f, 3, 64, 64). A point is not visible, and stays where it was, while the judge sees no
        subject; there are none where it never does.
    """
    around = torch.tensor([(x, y) for y in (-0.5, 0.0, 0.5) for x in (-0.5, 0.0, 0.5)])

    def track(video: Tensor) -> Tracks:
        path = read_clip(judge, video.transpose(0, 1)[None]).path[0]
        seen = in_sight(path[None])[0]
        if not seen.any():
            return Tracks(path.new_zeros(0, len(path), 2), seen.new_zeros(0, len(path)))
        first = int(seen.int().argmax())
        last_seen = torch.where(seen, torch.arange(len(seen)), first).cummax(dim=0).values
        held = path[last_seen]
        places = held[:, None, :2] + held[:, None, 2:] * around  # (f, 9, 2) in frame widths from the centre
        return Tracks(((places + 0.5) * SIZE - 0.5).transpose(0, 1), seen.expand(len(around), -1))

    return track


def classes(reading: ClipReading) -> Mapping[str, int]:
    """The class of each attribute that the judge sees in the one clip of a reading; where it never sees a subject, the
    background's alone.
    """
    names = LEAKING if in_sight(reading.path).any() else tuple(name for name in LEAKING if name not in SUBJECTS)
    return {name: int(getattr(reading, name)[0].argmax()) for name in names}


def read_stills(judge: Judge, pictures: Tensor) -> ClipReading:
    """What the judge sees in pictures (n, 3, 64, 64) of one subject, as if they were a clip; one is shown twice."""
    frames = pictures if len(pictures) > 1 else pictures.repeat(2, 1, 1, 1)
    return read_clip(judge, frames.transpose(0, 1)[None])


def squared(image: Tensor) -> Tensor:
    """The largest centred square of a picture (3, h, w), 64x64."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = image[:, top : top + side, left : left + side]
    if side == SIZE:
        return cut
    return F.interpolate(cut[None], (SIZE, SIZE), mode="bicubic", antialias=True)[0].clamp(-1, 1)
