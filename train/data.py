"""What a run trains on: a folder of pictures with their captions, or frames of a clip."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.errors import UserError
from sampling.media import check_size, image_files, read_image, read_video


def read_subject(
    images: str | Path | Sequence[str | Path], prompt: str, height: int, width: int
) -> tuple[Tensor, list[str]]:
    """Read a subject's pictures -> ((n, 3, height, width) float32 in [-1, 1], n captions).

    `images` is a folder (all its pictures in natural order, see `image_files`), one file, or a list of files (in that
    order). A .txt of the same name beside a picture is its caption; elsewhere it is `prompt`. A .txt in the folder
    that belongs to no picture gives a warning. Raises UserError for a missing or empty folder, for any file that is
    not a picture, empty captions, and sizes not divisible by 8.
    """
    check_size(height, width)
    if not isinstance(images, str | Path):
        files = [Path(image) for image in images]
        if not files:
            raise UserError("No pictures were given: name a folder or files.")
    elif Path(images).is_file():
        files = [Path(images)]
    else:
        files = image_files(images)
        captioned = {file.stem for file in files}
        strays = sorted(file.name for file in Path(images).glob("*.txt") if file.stem not in captioned)
        if strays:
            warnings.warn(f"{images}: no picture goes with {', '.join(strays)}, which is ignored.", stacklevel=2)
    captions = [_caption(file.with_suffix(".txt"), prompt) for file in files]
    return torch.stack([read_image(file, height, width) for file in files]), captions


def subject_files(images: str | Path) -> dict[str, Path]:
    """The files that `read_subject` reads from a folder, or one picture, by name: pictures and their captions.

    Raises UserError for a missing or empty folder.
    """
    pictures = [Path(images)] if Path(images).is_file() else image_files(images)
    captions = [file.with_suffix(".txt") for file in pictures]
    return {file.name: file for file in [*pictures, *captions] if file.is_file()}


def clip_files(video: str | Path) -> dict[str, Path]:
    """The files that `read_clip` reads, by name: the video, or the frames in a folder.

    Raises UserError for a missing file or an empty folder.
    """
    if not Path(video).exists():
        raise UserError(f"{video} does not exist.")
    files = image_files(video) if Path(video).is_dir() else [Path(video)]
    return {file.name: file for file in files}


def read_clip(
    video: str | Path,
    num_frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    frame_step: int = 1,
    start: float = 0.0,
) -> Tensor:
    """Read the frames of a reference video -> (num_frames, 3, height, width) in [-1, 1]; see `read_video`.

    Raises UserError as `read_video` does, and for sizes not divisible by 8.
    """
    check_size(height, width)
    return read_video(video, num_frames, height, width, fps, frame_step, start)


def _caption(file: Path, prompt: str) -> str:
    if not file.is_file():
        return prompt
    try:
        caption = " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file in UTF-8, and a caption was expected there.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be opened: {error.strerror}.") from error
    if not caption:
        raise UserError(f"{file} is empty: write the caption of its picture in it, or delete it to use the prompt.")
    return caption
