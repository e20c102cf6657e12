"""Reading pictures and folders, with Pillow as the oracle."""

import io

import numpy as np
import pytest
import torch
from clips import HEIGHT, NOT_PICTURES, WIDTH, greys, quarters, smooth, to_bytes, write_clip
from PIL import Image, ImageOps

from model.errors import UserError
from sampling.media import image_files, read_image


@pytest.mark.parametrize(
    ("name", "mode", "options", "tolerance"),
    [
        ("a.png", "RGB", {}, 0),
        ("a.png", "L", {}, 0),
        ("a.png", "P", {}, 0),
        ("a.png", "1", {}, 0),
        ("a.bmp", "RGB", {}, 0),
        ("a.tiff", "RGB", {}, 0),
        ("a.gif", "RGB", {}, 0),
        ("a.webp", "RGB", {"lossless": True}, 0),
        ("a.webp", "RGB", {"quality": 95}, 6),
        ("a.jpg", "RGB", {"quality": 95}, 6),
        ("a.jpg", "RGB", {"quality": 95, "progressive": True, "subsampling": 0}, 3),
        ("a.jpg", "L", {"quality": 95}, 1),
        ("a.jpg", "CMYK", {"quality": 95}, 3),
    ],
)
def test_pictures_read_as_pillow_reads_them(tmp_path, name, mode, options, tolerance):
    smooth().convert(mode).save(tmp_path / name, **options)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"), float)
    pixels = read_image(tmp_path / name, HEIGHT, WIDTH)
    assert pixels.shape == (3, HEIGHT, WIDTH)
    assert pixels.dtype == torch.float32
    assert np.abs(to_bytes(pixels) - expected).max() <= tolerance + 1e-3


def test_16_bit_grey_keeps_its_range(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, WIDTH).astype(np.uint16), (HEIGHT, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert (
        np.abs(to_bytes(read_image(tmp_path / "a.png", HEIGHT, WIDTH)) - ramp[..., None] / 257).max() < 2
    )  # swscale floors


@pytest.mark.parametrize("name", ["teddy.jpg", "teddy.png", "teddy.mp4", "teddy"])
@pytest.mark.parametrize("kind", ["WEBP", "PNG", "JPEG", "GIF"])
def test_the_name_does_not_matter(tmp_path, name, kind):
    with open(tmp_path / name, "wb") as file:
        smooth().save(file, kind)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"), float)
    assert np.abs(to_bytes(read_image(tmp_path / name, HEIGHT, WIDTH)) - expected).mean() < 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path, orientation, kind, order):
    exif = Image.Exif()
    exif.endian = order
    exif[0x0112] = orientation
    Image.fromarray(quarters()).save(tmp_path / "a.jpg", kind, exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB"), float)
    pixels = to_bytes(read_image(tmp_path / "a.jpg", *expected.shape[:2]))
    assert np.abs(pixels - expected).mean() < 2


def test_exif_of_a_second_picture_behind_the_first_is_not_its_own(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    first, second = io.BytesIO(), io.BytesIO()
    Image.fromarray(quarters()).save(first, "JPEG", quality=95, subsampling=0)
    Image.fromarray(quarters()).save(second, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(first.getvalue() + second.getvalue())
    assert np.abs(to_bytes(read_image(tmp_path / "a.jpg", HEIGHT, WIDTH)) - quarters()).mean() < 3


def test_phone_jpegs_with_a_second_picture_inside_are_pictures(tmp_path):
    smooth().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[smooth().rotate(180)])
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"), float)
    assert np.abs(to_bytes(read_image(tmp_path / "a.jpg", HEIGHT, WIDTH)) - expected).mean() < 1


@pytest.mark.parametrize("damage", [lambda exif: exif[:20], lambda exif: exif[:14] + b"\xff\xff" + exif[16:]])
def test_broken_exif_is_no_reason_to_refuse(tmp_path, damage):
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.fromarray(quarters()).save(tmp_path / "a.jpg", exif=damage(exif.tobytes()), subsampling=0)
    assert np.abs(to_bytes(read_image(tmp_path / "a.jpg", HEIGHT, WIDTH)) - quarters()).mean() < 3


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [("a.png", "RGBA", {}), ("a.png", "LA", {}), ("a.png", "P", {}), ("a.webp", "RGBA", {"lossless": True})],
)
def test_transparency_is_laid_on_white(tmp_path, name, mode, options):
    picture = smooth().convert("RGBA")
    picture.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))))
    (picture.quantize(64) if mode == "P" else picture.convert(mode)).save(tmp_path / name, **options)
    stored = np.asarray(Image.open(tmp_path / name).convert("RGBA"), float)
    opacity = stored[..., 3:] / 255
    expected = stored[..., :3] * opacity + 255 * (1 - opacity)
    pixels = to_bytes(read_image(tmp_path / name, HEIGHT, WIDTH))
    assert expected[:, 0].min() > 245
    assert np.abs(pixels - expected).max() <= 0.51


@pytest.mark.parametrize("wanted", [(24, 24), (16, 40), (32, 8), (96, 96), (88, 104), (40, 72)])
@pytest.mark.parametrize("stored", [(48, 80), (97, 61), (61, 61)])
def test_the_largest_centred_rectangle_is_resized_as_pillow_does(tmp_path, stored, wanted):
    picture = smooth(*stored)
    picture.save(tmp_path / "a.png")
    # Cut in fractions of pixels here, in whole pixels there: on this smooth picture half a pixel is a few levels.
    expected = np.asarray(ImageOps.fit(picture, wanted[::-1], Image.Resampling.BICUBIC), float)
    pixels = to_bytes(read_image(tmp_path / "a.png", *wanted))
    assert pixels.shape == (*wanted, 3)
    assert np.abs(pixels - expected).mean() < 3
    assert np.abs(pixels - expected).max() < 14


@pytest.mark.parametrize("wanted", [(32, 32), (60, 60), (128, 128), (200, 200)])
def test_noise_is_averaged_as_pillow_does(tmp_path, wanted):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8))
    noise.save(tmp_path / "a.png")
    expected = np.asarray(noise.resize(wanted, Image.Resampling.BICUBIC), float)
    assert np.abs(to_bytes(read_image(tmp_path / "a.png", *wanted)) - expected).max() < 1.01


@pytest.mark.parametrize("shape", [(1, 1), (2, 900), (900, 2)])
def test_extreme_shapes_fill_the_frame(tmp_path, shape):
    Image.new("RGB", shape, (200, 100, 50)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="enlarged"):
        pixels = to_bytes(read_image(tmp_path / "a.png", 16, 24))
    assert np.abs(pixels - (200, 100, 50)).max() < 1


def test_a_picture_enlarged_more_than_twofold_gives_a_warning(tmp_path, recwarn):
    smooth(30, 40).save(tmp_path / "a.png")
    read_image(tmp_path / "a.png", 60, 80)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"a\.png has only 40x30 pixels"):
        read_image(tmp_path / "a.png", 64, 64)


@pytest.mark.parametrize("content", NOT_PICTURES.values(), ids=NOT_PICTURES)
def test_what_is_no_picture_is_refused_by_name(tmp_path, content):
    (tmp_path / "teddy.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"teddy\.jpg"):
        read_image(tmp_path / "teddy.jpg", 32, 32)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
def test_truncated_pictures_are_refused(tmp_path, kind, options, share):
    buffer = io.BytesIO()
    smooth(200, 300).save(buffer, kind, **options)
    (tmp_path / "teddy.jpg").write_bytes(buffer.getvalue()[: int(share * buffer.tell())])
    with pytest.raises(UserError, match=r"teddy\.jpg"):
        read_image(tmp_path / "teddy.jpg", 32, 32)


def test_missing_files_folders_and_videos_are_refused(tmp_path):
    clip = write_clip(tmp_path / "clip.mov", greys(3))
    for path, says in ((tmp_path / "none.jpg", "No such file"), (tmp_path, "is a folder"), (clip, "is a video")):
        with pytest.raises(UserError, match=says):
            read_image(path, 32, 32)


def test_a_playlist_cannot_open_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(quarters()).save(tmp_path / "secret.png")
    (tmp_path / "a.jpg").write_text("ffconcat version 1.0\nfile secret.png\n")
    with pytest.raises(UserError, match=r"a\.jpg"):
        read_image(tmp_path / "a.jpg", 32, 32)


def test_files_are_listed_in_natural_order_without_what_lies_beside(tmp_path):
    pictures = ["1.jpg", "2.PNG", "10.webp", "10b.jpg", "a1.jpg", "a02.jpg", "A3.jpg", "x²", "x²1"]
    for name in [*reversed(pictures), ".DS_Store", "Thumbs.db", "1.txt", "README.md", "meta.JSON", "desktop.ini"]:
        (tmp_path / name).touch()
    (tmp_path / "masks").mkdir()
    assert [file.name for file in image_files(tmp_path)] == pictures


def test_folders_that_are_missing_or_empty_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    for folder, says in ((tmp_path, "holds no pictures"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=says):
            image_files(folder)
    with pytest.raises(UserError, match="is not a folder"):
        image_files(tmp_path / "notes.txt")
