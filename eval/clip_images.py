"""What CLIP sees of a frame: the same pixels as from transformers' CLIPImageProcessor, which has Pillow resize."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import UserError
from weights import read_json

Triple = tuple[float, float, float]

FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers of them, which processors' files hold
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5, with more in it
ONE = 2**22  # Pillow weighs pixels in integers, of which so many make 1


@dataclass(frozen=True)
class ImageNumbers:
    """What is done to an image before a CLIP sees it, in this order; the defaults are those of OpenAI's CLIPs.

    Args:
        resize: pixels of the shorter side, or (height, width); None: left as it is.
        crop: (height, width) of what is cut from the centre, black where the image is smaller; None: all of it.
        filter: what resizes, "bicubic" or "bilinear", antialiased, as Pillow does it.
        scale: what pixels of 0 to 255 are multiplied by.
        mean: of red, green and blue: taken off after that.
        std: of red, green and blue: divided by in the end.
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    filter: str = "bicubic"
    scale: float = 1 / 255
    mean: Triple = (0.48145466, 0.4578275, 0.40821073)
    std: Triple = (0.26862954, 0.26130258, 0.27577711)


def preprocess(frames: Tensor, numbers: ImageNumbers) -> Tensor:
    """Frames (n, 3, h, w) in [-1, 1] to what CLIP sees (n, 3, height, width), as transformers' CLIPImageProcessor does.

    Frames become images of 8 bits first, so that a clip scores the same from memory and from a lossless file. They are
    resized to the bit as Pillow does, as in OpenAI's own preprocessing; torch's resizing of 8-bit images, which
    transformers takes where torchvision is installed, is up to 2 of 255 grey levels off.

    Raises:
        UserError: no frames, another shape, or numbers that are not finite.
    """
    check_frames(frames)
    pixels = ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if numbers.resize is not None:
        size = _resized(pixels.shape[-2], pixels.shape[-1], numbers.resize)
        pixels = torch.cat([_resize(part, size, numbers.filter) for part in pixels.split(8)])
    if numbers.crop is not None:
        pixels = _centre(pixels, *numbers.crop)
    shape = (3, 1, 1)
    mean, std = (
        torch.tensor(of, device=frames.device).view(shape) / numbers.scale for of in (numbers.mean, numbers.std)
    )
    return (pixels - mean) / std


def read_numbers(folder: Path, side: int) -> ImageNumbers:
    """The numbers of a folder's image processor; what is not said there is OpenAI's, at `side` pixels.

    Raises:
        UserError: a file that is damaged, or that asks for what is not done here.
    """
    path = next((folder / name for name in PROCESSORS if (folder / name).is_file()), None)
    content = {} if path is None else read_json(path)
    try:
        table: dict[str, Any] = content.get("image_processor", content)
        done = {step: table.get(f"do_{step}", True) for step in ("resize", "center_crop", "rescale", "normalize")}
        resize = _size(table.get("size", side), square=False) if done["resize"] else None
        crop = _size(table.get("crop_size", side), square=True) if done["center_crop"] else None
        default = ImageNumbers()
        return ImageNumbers(
            resize=resize,
            crop=crop if isinstance(crop, tuple) else None,
            filter=FILTERS[table.get("resample", 3)],
            scale=float(table.get("rescale_factor", default.scale)) if done["rescale"] else 1.0,
            mean=_triple(table.get("image_mean", default.mean)) if done["normalize"] else (0.0, 0.0, 0.0),
            std=_triple(table.get("image_std", default.std)) if done["normalize"] else (1.0, 1.0, 1.0),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no CLIP's image processor, or asks for what is not done here ({error!r}): take the file that "
            "came with this CLIP; sizes may be a number, a shortest_edge, or height and width, resample 2 or 3"
        ) from error


def check_frames(frames: Tensor) -> None:
    """Raise UserError unless these are frames (n, 3, h, w) of finite numbers, n at least 1."""
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel() or not frames.is_floating_point():
        raise UserError(f"frames must be a float tensor (n, 3, h, w), n at least 1, not {tuple(frames.shape)}")
    if not frames.isfinite().all():
        raise UserError("there are numbers in the frames that are not finite (NaN or infinity): they cannot be scored")


def _resized(height: int, width: int, size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(size, tuple):
        return size
    return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)


def _resize(pixels: Tensor, size: tuple[int, int], kind: str) -> Tensor:
    """Images (n, 3, h, w) of 8 bits to (n, 3, *size): across, rounded, then down, rounded again."""
    for dim, new in ((-1, size[1]), (-2, size[0])):
        if pixels.shape[dim] != new:
            # integers below 2^53 are exact in float64, in which matrices multiply fast
            weights = _weights(pixels.shape[dim], new, kind).to(pixels.device)
            sums = pixels.double() @ weights.T if dim == -1 else weights @ pixels.double()
            pixels = ((sums + ONE // 2) / ONE).floor_().clamp_(0, 255).to(torch.uint8)
    return pixels


def _weights(old: int, new: int, kind: str) -> Tensor:
    """How much of each of `old` pixels in a row is in each of `new`, in units of 1 / ONE: (new, old)."""
    curve, reach = CURVES[kind]
    stretch = max(old / new, 1.0)  # a smaller image takes in more of the old pixels: antialiasing
    centre = ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new))[:, None]
    pixel = torch.arange(old, dtype=torch.float64)
    first, end = ((centre + side * reach * stretch + 0.5).floor() for side in (-1, 1))
    near = (pixel >= first) & (pixel < end)
    weights = curve(((pixel + 0.5 - centre) / stretch).abs()) * near
    weights = weights / weights.sum(dim=1, keepdim=True) * ONE
    return weights.sign() * (weights.abs() + 0.5).floor()  # halves go away from 0, as in C


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic at distances x of 0 or more, with a = -1/2 as in Pillow (torch's unfiltered bicubic has -3/4)."""
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return inner.where(x < 1, outer.where(x < 2, torch.zeros_like(x)))


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x).clamp_min(0)


CURVES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {"bicubic": (_bicubic, 2), "bilinear": (_bilinear, 1)}


def _centre(pixels: Tensor, height: int, width: int) -> Tensor:
    tall, wide = (max(wanted - given, 0) for wanted, given in zip((height, width), pixels.shape[-2:], strict=True))
    pixels = F.pad(pixels, (wide - wide // 2, wide // 2, tall - tall // 2, tall // 2))
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _size(value: Any, square: bool) -> int | tuple[int, int]:
    """A size in any of the ways that processors' files have said it."""
    if isinstance(value, dict):
        value = {name: side for name, side in value.items() if side is not None}
        sides = [value["shortest_edge"]] if set(value) == {"shortest_edge"} else [value["height"], value["width"]]
    else:
        sides = [value]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"a size of {value}")
    return (sides[0], sides[-1]) if square or len(sides) == 2 else sides[0]


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
