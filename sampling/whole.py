"""Whole clips in, at their own size: all frames of a video that FFmpeg reads, or of a folder of pictures."""

import math
from pathlib import Path

import torch
from torch import Tensor

from model.errors import UserError
from sampling.media import TURNS, _exif_orientation, _on_show, _opened, _turn, _upright, image_files, read_image

LONGEST = 2000  # frames
LARGEST = 2**28  # pixels of all frames together: 3.2 GB as float32


def read_whole(path: str | Path, fps: float | None = None) -> tuple[Tensor, float | None]:
    """Read all frames of a clip -> ((f, 3, h, w) float32 in [-1, 1], frames a second).

    Read as `read_video` does, upright and with square pixels, and cut to nothing: the size is the clip's own. A file is
    decoded once.

    Args:
        path: a video, an animated GIF or PNG, or a folder of pictures of one size, in natural order.
        fps: take the frames on show at 0, 1 / fps, 2 / fps, ... seconds by the file's time stamps; None: every frame.

    Returns:
        The frames, and their rate: `fps` where it is given, else the file's mean rate; None for a folder of pictures,
        which has no clock, and for files that do not say.

    Raises:
        UserError: a missing or damaged file, one without frames, a folder whose pictures differ in size, `fps` for a
            folder, or more than 2000 frames or 2**28 pixels, which are not held in memory.
    """
    path = Path(path)
    if fps is not None and not (fps > 0 and math.isfinite(fps)):
        raise UserError(f"fps must be positive, and is {fps}")
    if path.is_dir():
        if fps is not None:
            raise UserError(f"{path} is a folder of pictures, which has no clock: its frames cannot be taken by fps")
        return _read_folder(path), None
    frames: list[Tensor] = []
    with _opened(path, "video") as (container, stream):
        aspect, rate = float(stream.sample_aspect_ratio or 1), stream.average_rate
        turn, height, width = TURNS[1], 0, 0
        for frame, begin, end in _on_show(container, stream, path, 0.0):
            if not frames:
                turn = _turn(frame)
                height, width = frame.height, max(1, round(frame.width * aspect))
                height, width = (width, height) if turn[0] else (height, width)
            # As in read_video: time stamps are rounded to the file's ticks.
            last = end - min(float(stream.time_base), (end - begin) / 4)
            repeats = 1 if fps is None else max(0, math.ceil(last * fps) - len(frames))
            if repeats:
                _check_length(path, len(frames) + repeats, height, width)
                frames += [_upright(frame, turn, aspect, height, width)] * repeats
    if not frames:
        raise UserError(f"{path} holds no frames: it is cut short, or no video")
    return torch.stack(frames), fps or (float(rate) if rate else None)


def _read_folder(path: Path) -> Tensor:
    files = image_files(path)
    sizes = {_size(file): file for file in files[:LONGEST]}
    if len(sizes) > 1:
        told = ", ".join(f"{file.name} has {width}x{height}" for (height, width), file in sizes.items())
        raise UserError(f"the frames of a clip are of one size, and the pictures in {path} are not: {told}")
    ((height, width),) = sizes
    _check_length(path, len(files), height, width)
    return torch.stack([read_image(file, height, width) for file in files])


def _size(file: Path) -> tuple[int, int]:
    """Height and width of a picture as it is shown, from its header."""
    with _opened(file, "picture") as (container, stream):
        height, width = stream.codec_context.height, stream.codec_context.width
        still = container.format.name.endswith(("_pipe", "mjpeg"))
    if not height or not width:
        raise UserError(f"{file} holds no picture.")
    turned = still and TURNS[_exif_orientation(file.read_bytes())][0]
    return (width, height) if turned else (height, width)


def _check_length(path: Path, count: int, height: int, width: int) -> None:
    if count > LONGEST or count * height * width > LARGEST:
        allowed = min(LONGEST, LARGEST // (height * width))
        raise UserError(
            f"{path} is too long to be held in memory: of {width}x{height} pixels {allowed} frames are read at most. "
            "Cut it, or make it smaller"
        )
