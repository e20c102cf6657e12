"""Pictures and videos in: anything FFmpeg (through PyAV) reads -> float tensors in [-1, 1]. `write.py` is the way out.

Files are judged by content, never by name: they are handed to FFmpeg as nameless streams. That also keeps FFmpeg's
filename patterns and protocols out of reach, and no file may open another one (playlists of strangers).
Colours follow the file's own matrix and range; ICC profiles are ignored, as in most training code.
"""

import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor
from torch.nn import functional as F

from model.errors import UserError

# swscale's BICUBIC, FULL_CHR_H_INT and ACCURATE_RND. Else it doubles chroma by repetition: 4 dB worse on 4:2:0 files.
CONVERSION = 0x4 | 0x2000 | 0x40000
LARGEST_FRAME = 51_000_000  # pixels: 50 megapixels fit, in 1 GB at any depth
ANIMATIONS = ("gif", "apng")  # FFmpeg's names; those of still pictures end in _pipe
HDR = {16: "PQ", 18: "HLG"}  # transfer curves by FFmpeg's number
BESIDE_PICTURES = {".txt", ".md", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".ini", ".db"}

# How stored pixels become upright: (transpose, then mirror left-right, then flip top-bottom), by EXIF orientation.
TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
EXIF_BLOCK = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4})(?=II\*\0|MM\0\*)", re.DOTALL)  # in JPEG and WebP, PNG, WebP


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """Read one picture -> (3, height, width), float32 in [-1, 1].

    Upright by EXIF (all eight orientations), transparency laid on white, any bit depth, grey, palette and CMYK; of an
    animated GIF or PNG the first frame. The largest centred rectangle of the wanted shape is cut out and resized
    (bicubic, antialiased), which is "shortest side, then centre crop" without resizing what is cut off. A picture
    enlarged more than twofold gives a warning. Raises UserError, naming the file, for anything but a whole picture.
    """
    path = Path(path)
    with _opened(path, "picture") as (container, stream):
        if stream.codec_context.name == "mjpeg":  # else a truncated JPEG decodes to a half grey picture
            stream.codec_context.options = {**stream.codec_context.options, "err_detect": "explode"}
        frames = container.decode(stream)
        frame = next(frames, None)
        if frame is None:
            raise UserError(f"{path} holds no picture.")
        still = container.format.name.endswith(("_pipe", "mjpeg"))  # a JPEG with a second one behind it is "mjpeg"
        if not still and container.format.name not in ANIMATIONS and next(frames, None) is not None:
            raise UserError(f"{path} is a video, and a picture was expected here.")
        # FFmpeg reports EXIF as a rotation only, or not at all before version 8: mirrored pictures need the tag itself.
        turn = TURNS[_exif_orientation(path.read_bytes())] if still else _turn(frame)
        size = (frame.width, frame.height) if turn[0] else (frame.height, frame.width)
        enlarged = max(height / size[0], width / size[1])
        if enlarged > 2:
            warnings.warn(
                f"{path} has only {size[1]}x{size[0]} pixels and is enlarged {enlarged:.1f} times to fill "
                f"{width}x{height}: it will look soft.",
                stacklevel=2,
            )
        return _upright(frame, turn, 1.0, height, width)


def read_video(
    path: str | Path,
    num_frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    frame_step: int = 1,
    start: float = 0.0,
) -> Tensor:
    """Read `num_frames` frames of a video from `start` (seconds) on -> (num_frames, 3, height, width) in [-1, 1].

    Every `frame_step`-th frame is taken, or, with `fps`, the frames on show at start, start + 1/fps, ... by the file's
    time stamps (so variable frame rates come out even). `path` may also be an animated GIF or PNG, or a folder of
    pictures in natural order, which has no clock: `fps` and `start` are refused. Rotation (phones), mirroring and
    oblong pixels are honoured. Frames are cut and resized as `read_image` does, each as soon as it is decoded, and
    decoding stops at the last one. Raises UserError for damaged files, files without pictures, and clips too short,
    naming the settings to lower.
    """
    path = Path(path)
    if num_frames < 1 or frame_step < 1 or not 0 <= start < float("inf") or (fps is not None and not fps > 0):
        raise UserError(
            f"num_frames, frame_step and fps must be positive and start not negative: got num_frames {num_frames}, "
            f"frame_step {frame_step}, fps {fps}, start {start}."
        )
    if fps is not None and frame_step != 1:
        raise UserError(f"fps {fps} and frame_step {frame_step} contradict each other: give one of them.")
    if path.is_dir():
        if fps is not None or start:
            raise UserError(f"{path} is a folder of pictures, which has no clock: use frame_step, not fps or start.")
        files = image_files(path)
        wanted = files[::frame_step][:num_frames]
        _check_length(path, len(wanted), num_frames, f"{len(files)} pictures", frame_step, fps, start)
        return torch.stack([read_image(file, height, width) for file in wanted])

    frames: list[Tensor] = []
    turn, passed, end = None, 0, start
    with _opened(path, "video") as (container, stream):
        aspect = float(stream.sample_aspect_ratio or 1)
        for frame, begin, end in _on_show(container, stream, path, start):
            if fps is None:
                repeats = int(passed % frame_step == 0)
            else:
                # Time stamps are rounded to the file's ticks; a frame that starts within one is already on show.
                last = end - min(float(stream.time_base), (end - begin) / 4)
                repeats = sum(start + i / fps < last for i in range(len(frames), num_frames))
            # Once a clip: PyAV's side data keeps its frame alive until the garbage collector runs (12 MB in 4K).
            turn = turn or _turn(frame)
            if repeats:
                frames += [_upright(frame, turn, aspect, height, width)] * repeats
            passed += 1
            if len(frames) == num_frames:
                break
        found = f"{passed} frames" if fps is None else f"{max(end - start, 0.0) if passed else 0.0:.3g} s"
        if start:
            found += f" from {start:g} s on"
        if stream.frames > passed and not start:
            found += f" (of the {stream.frames} frames it announces: it may be cut short)"
    _check_length(path, len(frames), num_frames, found, frame_step, fps, start)
    return torch.stack(frames)


def image_files(folder: str | Path) -> list[Path]:
    """The pictures of a folder in natural order (2.jpg before 10.jpg).

    Hidden files, subfolders and what commonly lies beside pictures (captions, notes, settings, Windows' thumbnails)
    are left out; every other file is taken for a picture, so that reading a stray one fails by name instead of
    passing in silence. Raises UserError for a missing or empty folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder." if folder.exists() else f"{folder} does not exist.")
    files = [
        file
        for file in folder.iterdir()
        if not file.name.startswith(".") and file.suffix.lower() not in BESIDE_PICTURES and not file.is_dir()
    ]
    if not files:
        raise UserError(f"{folder} holds no pictures (its subfolders are not searched).")
    return sorted(files, key=natural_order)


def check_size(height: int, width: int) -> None:
    """Raise UserError, naming the nearest sizes that work, unless both are positive multiples of 8 (the VAE's step)."""
    wrong = [
        f"{name} {size} (nearest: {' or '.join(str(near) for near in (size // 8 * 8, size // 8 * 8 + 8) if near > 0)})"
        for name, size in (("height", height), ("width", width))
        if size < 8 or size % 8
    ]
    if wrong:
        raise UserError(f"Sizes must be divisible by 8: {', '.join(wrong)}.")


def natural_order(path: Path) -> tuple[list[Any], str]:
    """A key to sort files by, numbers in their names by value: 2.jpg before 10.jpg."""
    # Odd places of the split are the numbers, so that only like is compared with like.
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _check_length(
    path: Path, got: int, num_frames: int, found: str, frame_step: int, fps: float | None, start: float
) -> None:
    if got >= num_frames:
        return
    pace = f" at {fps:g} fps" if fps else f" with frame_step {frame_step}" if frame_step > 1 else ""
    lower = " or ".join(["num_frames"] + ["frame_step"] * (frame_step > 1) + ["start"] * (start > 0))
    raise UserError(
        f"{path} is too short: it has {found}, enough for {got} of the {num_frames} frames asked for{pace}. "
        f"Lower {lower}{', or raise fps' if fps else ''}."
    )


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Any, Any]]:
    """Open `path` -> (container, its main video stream); what FFmpeg objects to inside the block is a UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; a {kind} file was expected here.")
    try:
        # Opened by descriptor, the file has no name that FFmpeg could guess a format from.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb") as file:
            if not file.peek(1):
                raise UserError(f"{path} is empty (0 bytes).")
            with av.open(file, options={"protocol_whitelist": "none", "max_pixels": str(LARGEST_FRAME)}) as container:
                stream = container.streams.best("video")
                if stream is None:
                    raise UserError(f"{path} holds no pictures, only sound or text.")
                if stream.codec_context is None:  # PyAV 17 would crash
                    raise UserError(f"{path} holds pictures of a format that FFmpeg cannot decode, or is damaged.")
                codec = stream.codec_context
                if (size := codec.width * codec.height) > LARGEST_FRAME:
                    raise UserError(f"{path} has {size:,} pixels a frame, and up to {LARGEST_FRAME:,} are read.")
                codec.options = {**codec.options, "max_pixels": str(LARGEST_FRAME)}  # a stream may change its size
                yield container, stream
    except (av.FFmpegError, UnicodeDecodeError) as error:  # the second where a damaged file's notes are no text
        raise UserError(
            f"{path} cannot be read as a {kind}: it is damaged, cut short, or of a format that FFmpeg does not read "
            f"({getattr(error, 'strerror', None) or type(error).__name__})."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror or error}.") from error


def _on_show(container: Any, stream: Any, path: Path, start: float) -> Iterator[tuple[Any, float, float]]:
    """Frames from the one on show at `start` on -> (frame, begin, end), in seconds from the clip's beginning."""
    stream.thread_type = "SLICE"  # frame threads swallow the errors of a clip's last frames
    tick = float(stream.time_base)
    usual = 1 / float(stream.average_rate or 25)
    origin = stream.start_time or 0
    # Only these have an index to trust; elsewhere a seek may land late or between frames that build on each other.
    if start > 0 and container.format.name.startswith(("mov", "matroska")):
        container.seek(int(start / tick) + origin, stream=stream)

    held, begin = None, -usual
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise UserError(f"{path} is damaged at {max(begin + usual, 0.0):.2f} s: FFmpeg cannot decode that frame.")
        time = begin + usual if frame.pts is None else (frame.pts - origin) * tick
        if held is None and frame.color_trc in HDR:
            warnings.warn(f"{path} is HDR ({HDR[frame.color_trc]}), read without tone mapping: pale.", stacklevel=3)
        if held is not None and time - min(tick, (time - begin) / 4) > start:
            yield held, begin, time
        held, begin = frame, time
    if held is not None:
        end = begin + (held.duration * tick if held.duration else usual)
        if end > start:
            yield held, begin, end


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """How to turn a frame upright by its display matrix, as in TURNS; oblique angles go to the nearest right one."""
    try:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(frame.side_data["DISPLAYMATRIX"]))
    except KeyError:
        return TURNS[1]
    except ValueError:  # a kind of side data that this PyAV cannot name hides the matrix: no mirroring then
        return TURNS[{-90: 6, 90: 8, 180: 3, -180: 3}.get(frame.rotation, 1)]
    return (True, c < 0, b < 0) if abs(b) > abs(a) else (False, a < 0, d < 0)


def _exif_orientation(data: bytes) -> int:
    """The EXIF orientation (1 to 8) of a JPEG, PNG, WebP or TIFF file; 1 where it has none."""
    # In a JPEG only before its pixels: after them may come another picture's EXIF (burst, gain map).
    block = EXIF_BLOCK.search(data.partition(b"\xff\xda")[0] if data.startswith(b"\xff\xd8") else data)
    tiff = data[block.end() :] if block else data
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (table,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, table)
        entries = [struct.unpack_from(order + "HHIH", tiff, table + 2 + 12 * i) for i in range(count)]
    except struct.error:
        return 1
    # (tag 0x0112, of kind 3 = short, one of them)
    return next((value for *head, value in entries if head == [0x0112, 3, 1] and value in TURNS), 1)


def _upright(frame: Any, turn: tuple[bool, bool, bool], aspect: float, height: int, width: int) -> Tensor:
    """Pixels of a decoded frame, turned, laid on white, cut and resized -> (3, height, width) in [-1, 1].

    `aspect` is the width of a stored pixel over its height.
    """
    alpha = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
    stored = frame.reformat(format="rgba" if alpha else "rgb24", interpolation=CONVERSION).to_ndarray()
    pixels = torch.from_numpy(stored).permute(2, 0, 1)
    transpose, mirror, flip = turn
    if transpose:
        pixels, aspect = pixels.transpose(1, 2), 1 / aspect
    rows, columns = pixels.shape[1:]
    scale = min(rows / height, columns * aspect / width)  # stored rows for one row of the result
    cut = max(1, round(height * scale)), max(1, round(width * scale / aspect))
    top, left = (rows - cut[0]) // 2, (columns - cut[1]) // 2
    pixels = pixels[:, top : top + cut[0], left : left + cut[1]].flip([2] * mirror + [1] * flip)
    if alpha:
        pixels = torch.cat([_on_white(strip) for strip in pixels.split(256, dim=1)], dim=1)  # whole, floats fill memory
    if cut != (height, width):  # in whole bytes, as Pillow does: six times faster than in floats on 4K frames
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    return pixels.float().contiguous() / 127.5 - 1


def _on_white(pixels: Tensor) -> Tensor:
    """(4, h, w) bytes with transparency -> (3, h, w) bytes."""
    opacity = pixels[3:].float() / 255
    return (pixels[:3] * opacity + 255 * (1 - opacity)).round().to(torch.uint8)
