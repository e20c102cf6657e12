"""Subjects and clips as a run gets them."""

import numpy as np
import pytest
import torch
from clips import greys, numbers, smooth, write_clip
from PIL import Image

from model.errors import UserError
from sampling.media import check_size, read_image
from train.data import clip_files, read_clip, read_subject, subject_files


def write_subject(folder, count=11):
    """Grey pictures 1.png, 2.png, ...: the i-th says i."""
    for i, grey in enumerate(greys(count)):
        Image.fromarray(grey).save(folder / f"{i + 1}.png")


def test_a_folder_is_read_in_natural_order_with_one_prompt(tmp_path):
    write_subject(tmp_path)
    images, captions = read_subject(tmp_path, "a teddy bear", 32, 48)
    assert images.shape == (11, 3, 32, 48)
    assert images.dtype == torch.float32
    assert numbers(images) == list(range(11))
    assert captions == ["a teddy bear"] * 11


def test_a_text_beside_a_picture_is_its_caption(tmp_path):
    write_subject(tmp_path, 3)
    (tmp_path / "2.txt").write_text("\ufeff a teddy bear\n  on a fence \n", encoding="utf-8")
    _, captions = read_subject(tmp_path, "a bear", 32, 32)
    assert captions == ["a bear", "a teddy bear on a fence", "a bear"]
    assert read_subject([tmp_path / "2.png"], "a bear", 32, 32)[1] == ["a teddy bear on a fence"]


def test_a_caption_without_a_picture_gives_a_warning(tmp_path):
    write_subject(tmp_path, 2)
    (tmp_path / "02.txt").write_text("a teddy bear")
    with pytest.warns(UserWarning, match=r"02\.txt"):
        assert read_subject(tmp_path, "a bear", 32, 32)[1] == ["a bear", "a bear"]


@pytest.mark.parametrize(
    ("content", "says"), [(b" \n", r"1\.txt is empty"), (b"\xff\xfe\x00b", r"1\.txt is not a text")]
)
def test_broken_captions_are_refused(tmp_path, content, says):
    write_subject(tmp_path, 1)
    (tmp_path / "1.txt").write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_subject(tmp_path, "a bear", 32, 32)


def test_files_come_in_the_order_given(tmp_path):
    write_subject(tmp_path, 5)
    images, _ = read_subject([str(tmp_path / "4.png"), tmp_path / "1.png"], "a bear", 32, 32)
    assert numbers(images) == [3, 0]
    assert numbers(read_subject(tmp_path / "5.png", "a bear", 32, 32)[0]) == [4]


def test_pictures_of_all_sizes_and_kinds_make_one_batch(tmp_path, recwarn):
    for i, (size, kind) in enumerate([((90, 60), "PNG"), ((64, 200), "WEBP"), ((70, 70), "JPEG")]):
        with open(tmp_path / f"{i}.jpg", "wb") as file:
            smooth(*size).save(file, kind)
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "README.md").write_text("my bear")
    (tmp_path / "masks").mkdir()
    images, captions = read_subject(tmp_path, "a bear", 40, 56)
    assert images.shape == (3, 3, 40, 56)
    assert len(captions) == 3
    assert not recwarn
    for i in range(3):
        assert torch.equal(images[i], read_image(tmp_path / f"{i}.jpg", 40, 56))


@pytest.mark.parametrize("name", ["bear.pdf", "bear.jpg", "bear"])
def test_files_that_are_no_pictures_are_refused_by_name(tmp_path, name):
    write_subject(tmp_path, 2)
    (tmp_path / name).write_text("not a picture")
    with pytest.raises(UserError, match=name):
        read_subject(tmp_path, "a bear", 32, 32)


def test_a_video_among_the_pictures_is_refused_by_name(tmp_path):
    write_clip(tmp_path / "bear.mov", greys(3))
    with pytest.raises(UserError, match=r"bear\.mov is a video"):
        read_subject(tmp_path, "a bear", 32, 32)


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        read_subject(tmp_path, "a bear", 32, 32)
    with pytest.raises(UserError, match="does not exist"):
        read_subject(tmp_path / "teddy", "a bear", 32, 32)
    with pytest.raises(UserError, match="No pictures"):
        read_subject([], "a bear", 32, 32)


@pytest.mark.parametrize(
    ("height", "width", "says"),
    [
        (250, 256, r"height 250 \(nearest: 248 or 256\)\.$"),
        (256, 257, r"width 257 \(nearest: 256 or 264\)\.$"),
        (100, 4, r"height 100 .*width 4 \(nearest: 8\)\.$"),
        (0, 64, r"height 0 \(nearest: 8\)"),
        (-8, 64, r"height -8"),
    ],
)
def test_sizes_must_be_multiples_of_8(tmp_path, height, width, says):
    write_subject(tmp_path, 1)
    for read in (lambda: read_subject(tmp_path, "a", height, width), lambda: read_clip(tmp_path, 1, height, width)):
        with pytest.raises(UserError, match=says):
            read()
    for size in (8, 64, 72, 512):
        check_size(size, size)


def test_a_clip_is_read_with_its_settings(tmp_path):
    write_clip(tmp_path / "a.mov", greys(20))
    assert numbers(read_clip(tmp_path / "a.mov", 4, 32, 32, frame_step=3, start=0.5)) == [5, 8, 11, 14]
    assert numbers(read_clip(tmp_path / "a.mov", 4, 32, 32, fps=5)) == [0, 2, 4, 6]
    frames = read_clip(tmp_path / "a.mov", 20, 32, 40)
    assert frames.shape == (20, 3, 32, 40)
    assert np.allclose(frames.mean((1, 2, 3)), [(20 + 4 * i) / 127.5 - 1 for i in range(20)], atol=1e-6)


def test_the_files_a_run_depends_on_are_those_it_reads(tmp_path):
    write_subject(tmp_path, 3)
    for name in ("2.txt", "notes.md", ".DS_Store"):
        (tmp_path / name).write_text("x")
    assert sorted(subject_files(tmp_path)) == ["1.png", "2.png", "2.txt", "3.png"]
    assert subject_files(tmp_path / "2.png") == {name: tmp_path / name for name in ("2.png", "2.txt")}
    assert sorted(clip_files(tmp_path)) == ["1.png", "2.png", "3.png"]
    assert clip_files(tmp_path / "1.png") == {"1.png": tmp_path / "1.png"}
    for files in (subject_files, clip_files):
        with pytest.raises(UserError, match="does not exist"):
            files(tmp_path / "none")
