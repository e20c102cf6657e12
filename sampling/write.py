"""Videos and pictures out, through PyAV: mp4, gif, png, jpg, or a folder of png frames."""

import json
import math
import os
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from model.errors import UserError
from sampling.media import CONVERSION
from weights.files import atomic_write
from weights.folders import check_folder, replacing

BT709 = 1  # FFmpeg's number for matrix, primaries and transfer curve alike
FRAME_FILE = re.compile(r"\d{4,}\.png")
GAP = 2  # pixels of white between the frames of a contact sheet


def write_media(path: str | Path, frames: Tensor, fps: float = 8.0, metadata: Mapping[str, Any] | None = None) -> None:
    """Write frames (f, 3, h, w) in [-1, 1] (values outside are clamped) to `path`, atomically, by its suffix.

    .mp4: H.264, yuv420p, limited-range bt709, faststart, visually lossless (crf 17), the same bytes every time; even
    sizes only; `metadata` goes into its comment tag as JSON (other kinds have no place for it). .gif: one palette for
    the clip, loops for ever, 50 fps at most. .png, .jpg: exactly one frame. No suffix, or a trailing slash: a folder
    of 0000.png, 0001.png, ..., which replaces such a folder but no other. Raises UserError for other suffixes, frames
    of another shape, NaN, and where the system refuses to write.
    """
    suffix = check_writable(path)
    path = Path(path)
    if not 0.1 <= fps <= 1000:
        raise UserError(f"{path}: fps must lie between 0.1 and 1000, got {fps}.")
    pixels = _to_bytes(path, frames)
    rate = Fraction(fps).limit_denominator(1001)  # a ratio that files can hold
    try:
        if suffix == "folder":
            _write_folder(path, pixels)
        elif suffix == ".mp4":
            _write_mp4(path, pixels, rate, metadata)
        elif suffix == ".gif":
            _write_gif(path, pixels, rate)
        elif len(pixels) > 1:
            raise UserError(f"{path} holds one picture, not {len(pixels)} frames: use .mp4, .gif or a folder.")
        else:
            picture = _png(pixels[0]) if suffix == ".png" else _jpeg(pixels[0])
            with atomic_write(path) as temporary:
                temporary.write_bytes(picture)
    except av.FFmpegError as error:
        raise UserError(f"{path} could not be written: {error.strerror or type(error).__name__}.") from error


def check_writable(path: str | Path) -> str:
    """What `write_media` would write at `path`: its suffix, or "folder".

    Raises UserError for other suffixes, for no name at all, and where nothing can be written.
    """
    suffix = Path(path).suffix.lower()
    if not Path(path).name or Path(path).name == "..":
        raise UserError(f"{str(path)!r} is no name for a file or a folder of frames.")
    check_folder(Path(path).parent, path)
    if is_folder_name(path):
        return "folder"
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, and a file of that name was to be written there.")
    if suffix not in (".mp4", ".gif", ".png", ".jpg", ".jpeg"):
        raise UserError(
            f"{path}: cannot write {suffix!r}. Use .mp4, .gif, .png or .jpg (one frame), or end the name in / for a "
            "folder of frames."
        )
    return suffix


def is_folder_name(path: str | Path) -> bool:
    """Whether a name is that of a folder of frames: without a suffix, or ending in / (which a Path forgets)."""
    return str(path).endswith(("/", os.sep)) or not Path(path).suffix


def contact_sheet(frames: Tensor, columns: int | None = None) -> Tensor:
    """Lay frames (f, 3, h, w) out in rows, thin white gaps between and around -> (3, H, W).

    `columns` defaults to the nearest to a square grid. Write it with `write_media("sheet.png", sheet[None])`.
    """
    count, channels, height, width = frames.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    sheet = frames.new_ones(channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP)
    for i, frame in enumerate(frames):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = frame
    return sheet


def _to_bytes(path: Path, frames: Tensor) -> np.ndarray:
    """(f, 3, h, w) in [-1, 1] -> (f, h, w, 3) uint8, or UserError."""
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel() or not frames.is_floating_point():
        raise UserError(
            f"{path}: frames must be a float tensor (f, 3, h, w), got {tuple(frames.shape)} of {frames.dtype}."
        )
    finite = frames.detach().isfinite().flatten(1).all(1)
    if not finite.all():
        broken = (~finite).nonzero().flatten().tolist()
        raise UserError(f"{path} was not written: NaN or infinity in frames {broken} of {len(frames)}.")
    pixels = [((frame.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8) for frame in frames]
    return torch.stack(pixels).permute(0, 2, 3, 1).contiguous().numpy()


def _write_mp4(path: Path, pixels: np.ndarray, rate: Fraction, metadata: Mapping[str, Any] | None) -> None:
    height, width = pixels.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"{path}: mp4 needs even sizes, and the frames are {width}x{height} pixels.")
    if "libx264" not in av.codecs_available:
        raise UserError("This build of PyAV has no libx264: install PyAV's own wheel (pip install av), or write .gif.")
    # file: keeps FFmpeg from taking a colon in the name for a protocol.
    with (
        atomic_write(path) as temporary,
        av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        if metadata:
            container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False)
        # x264's macroblock tree reads memory that nobody wrote at widths such as 64: other bytes from run to run
        options = {"crf": "17", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1  # the number of threads changes x264's decisions, and so the bytes
        codec.color_range = ColorRange.MPEG
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        for i, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=CONVERSION,
            )
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_gif(path: Path, pixels: np.ndarray, rate: Fraction) -> None:
    if rate > 50:
        raise UserError(f"{path}: gif shows 50 fps at most (a frame lasts 2 hundredths of a second or more).")
    # GIF counts in hundredths of a second: 8 fps is 12, 13, 12, 13, ..., so that the whole lasts what it should.
    starts = [round(i * 100 / rate) for i in range(len(pixels) + 1)]
    hundredth = Fraction(1, 100)
    height, width = pixels.shape[1:3]

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=hundredth)
    split, palette, dither = graph.add("split"), graph.add("palettegen"), graph.add("paletteuse")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(dither, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(dither, 0, 1)
    dither.link_to(sink)
    graph.configure()
    for i, picture in enumerate(pixels):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = starts[i], hundredth
        source.push(frame)
    source.push(None)

    options = {"loop": "0", "final_delay": str(starts[-1] - starts[-2])}
    with (
        atomic_write(path) as temporary,
        av.open(f"file:{temporary}", "w", format="gif", options=options) as container,
    ):
        stream = container.add_stream("gif", rate=100)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for i in range(len(pixels)):
            frame = sink.pull()
            frame.pts, frame.time_base = starts[i], hundredth
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_folder(path: Path, pixels: np.ndarray) -> None:
    """Write a folder beside the old one and put it in its place, so that frames of two clips never mix."""
    if path.exists() and not (path.is_dir() and all(FRAME_FILE.fullmatch(file.name) for file in path.iterdir())):
        raise UserError(f"{path} exists and is not a folder of numbered frames alone: give another name.")
    with replacing([path]) as fresh:
        fresh[path].mkdir()
        for i, picture in enumerate(pixels):
            (fresh[path] / f"{i:04d}.png").write_bytes(_png(picture))


def _png(picture: np.ndarray) -> bytes:
    return _encode(av.VideoFrame.from_ndarray(picture, format="rgb24"), "png", {})


def _jpeg(picture: np.ndarray) -> bytes:
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuvj444p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.JPEG,
        interpolation=CONVERSION,
    )
    return _encode(frame, "mjpeg", {"qmin": "2", "qmax": "2"})


def _encode(frame: Any, codec: str, options: dict[str, str]) -> bytes:
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.pix_fmt = frame.width, frame.height, frame.format.name
    context.time_base = Fraction(1, 25)
    context.sample_aspect_ratio = Fraction(1)  # else the picture states that its pixels are 0:1
    context.options = options
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
