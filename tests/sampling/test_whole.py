"""Whole clips at their own size: against the frames that were written."""

import numpy as np
import pytest
import torch
from clips import HEIGHT, NOT_PICTURES, WIDTH, greys, numbers, quarters, to_bytes, write_clip
from PIL import Image

from model import UserError
from sampling import read_video, whole, write_media
from sampling.whole import read_whole


@pytest.mark.parametrize("name", ["clip.mov", "clip.mp4", "clip.gif", "clip"])
def test_all_frames_come_at_their_own_size_and_rate(tmp_path, name):
    path = tmp_path / name
    if name == "clip.mov":
        write_clip(path, greys(25))
    else:
        frames = torch.from_numpy(np.stack(greys(25))).permute(0, 3, 1, 2).float() / 127.5 - 1
        write_media(path, frames, fps=10)
    video, fps = read_whole(path)
    assert video.shape == (25, 3, HEIGHT, WIDTH)
    assert numbers(video) == list(range(25))
    assert fps == (None if name == "clip" else pytest.approx(10, rel=0.01))
    assert torch.equal(video, read_video(path, 25, HEIGHT, WIDTH))


@pytest.mark.parametrize("fps", [1, 3, 4, 7.5, 10, 25])
def test_another_rate_takes_the_frames_on_show(tmp_path, fps):
    times = [0, 1, 2, 5, 6, 9, 10, 14, 15, 19]  # tenths of a second; the last frame lasts one
    path = write_clip(tmp_path / "uneven.mov", greys(10), times)
    video, rate = read_whole(path, fps=fps)
    moments = [i / fps for i in range(1000) if i / fps < 2.0 - 1e-9]
    assert rate == fps
    assert numbers(video) == [max(j for j, t in enumerate(times) if t / 10 <= m + 1e-9) for m in moments]
    assert torch.equal(video, read_video(path, len(video), HEIGHT, WIDTH, fps=fps))


def test_turned_pictures_and_oblong_pixels_come_upright(tmp_path):
    def wide(stream):
        stream.codec_context.sample_aspect_ratio = 2

    path = write_clip(tmp_path / "wide.mov", [quarters()] * 2, setup=wide)
    assert read_whole(path)[0].shape == (2, 3, HEIGHT, 2 * WIDTH)
    (tmp_path / "turned").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        Image.fromarray(quarters()).save(tmp_path / "turned" / f"{i}.png", exif=exif)
    video, _ = read_whole(tmp_path / "turned")
    assert video.shape == (2, 3, WIDTH, HEIGHT)
    assert (to_bytes(video).round() == np.rot90(quarters(), -1)).all()


@pytest.mark.parametrize("name", list(NOT_PICTURES))
def test_what_is_no_video_is_named(tmp_path, name):
    path = tmp_path / "clip.mp4"
    path.write_bytes(NOT_PICTURES[name])
    with pytest.raises(UserError, match=r"clip\.mp4"):
        read_whole(path)


def test_bad_input_is_refused_before_memory_is_full(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mov", greys(6))
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="fps must be positive"):
            read_whole(path, fps=bad)
    with pytest.raises(UserError, match="2000 frames are read at most"):
        read_whole(path, fps=1e9)
    monkeypatch.setattr(whole, "LONGEST", 5)
    with pytest.raises(UserError, match=r"clip.mov is too long .* 5 frames"):
        read_whole(path)
    monkeypatch.setattr(whole, "LARGEST", 4 * HEIGHT * WIDTH)
    with pytest.raises(UserError, match=r"of 80x48 pixels 4 frames"):
        read_whole(path)
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        read_whole(folder)
    for i, picture in enumerate([quarters(), quarters()[:24]]):
        Image.fromarray(picture).save(folder / f"{i}.png")
    with pytest.raises(UserError, match=r"0\.png has 80x48, 1\.png has 80x24"):
        read_whole(folder)
    with pytest.raises(UserError, match="no clock"):
        read_whole(folder, fps=8)
    with pytest.raises(UserError, match="cannot be opened"):
        read_whole(tmp_path / "missing.mp4")
