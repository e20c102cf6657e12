"""Pictures and clips to read: smooth waves, four coloured corners, and clips whose frames say which they are."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

NOT_PICTURES = {
    "empty": b"",
    "text": b"a teddy bear sits on a bench\n" * 20,
    "zeros": bytes(4000),
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4599\n",
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"></svg>',
    "half a header": b"\xff\xd8\xff\xe0",
}
HEIGHT, WIDTH = 48, 80
LOSSLESS = {"png": "rgb24", "ffv1": "bgr0"}


def smooth(height=HEIGHT, width=WIDTH) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 30), np.cos(y / 11), np.sin((x + y) / 17)], axis=-1)
    return Image.fromarray((127 + 120 * waves).round().astype(np.uint8))


def quarters() -> np.ndarray:
    """(48, 80, 3) with another colour in each corner: shows any turn."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[:24, :40], picture[:24, 40:] = (250, 10, 10), (10, 250, 10)
    picture[24:, :40], picture[24:, 40:] = (10, 10, 250), (200, 200, 10)
    return picture


def to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """(..., 3, h, w) in [-1, 1] -> (..., h, w, 3), 0 to 255, as floats."""
    return (pixels.movedim(-3, -1).numpy() + 1) * 127.5


def write_clip(path: Path, pictures, times=None, *, tick=Fraction(1, 10), codec="png", setup=None, **options) -> Path:
    """Encode pictures (h, w, 3) uint8, the i-th at `times[i]` ticks."""
    pix_fmt = LOSSLESS.get(codec, "yuv420p")
    front = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=front) as container:
        stream = container.add_stream(codec, rate=1 / tick, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pix_fmt
        stream.codec_context.time_base = tick
        if setup:
            setup(stream)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = i if times is None else times[i], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def greys(count: int) -> list[np.ndarray]:
    """Plain pictures (h, w, 3), the i-th of value 20 + 4 i."""
    return [np.full((HEIGHT, WIDTH, 3), 20 + 4 * i, np.uint8) for i in range(count)]


def numbers(frames: torch.Tensor) -> list[int]:
    """Which of `greys` each frame is."""
    return ((to_bytes(frames).mean((1, 2, 3)) - 20) / 4).round().astype(int).tolist()
