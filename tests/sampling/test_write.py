"""What is written, judged by Pillow, by the video's own planes and headers, and by reading it back."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from clips import smooth, to_bytes
from PIL import Image

from model.errors import UserError
from sampling.media import read_image, read_video
from sampling.write import check_writable, contact_sheet, write_media


def moving(count: int = 16, height: int = 48, width: int = 80) -> torch.Tensor:
    """Smooth waves that travel: (count, 3, height, width) in [-1, 1]."""
    picture = np.asarray(smooth(height, width))
    pixels = np.stack([np.roll(picture, 3 * i, axis=1) for i in range(count)])
    return torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1


def plain(count: int, *rgb: int) -> torch.Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(count, 3, 32, 48) / 127.5 - 1


# -- mp4


@pytest.mark.parametrize(
    ("count", "fps", "rate"), [(16, 8, 8), (1, 8, 8), (33, 24.0, 24), (5, 29.97, Fraction(2997, 100))]
)
def test_mp4_is_h264_that_browsers_play_with_every_frame_and_the_exact_duration(tmp_path, count, fps, rate):
    write_media(tmp_path / "a.mp4", moving(count), fps)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate, stream.duration * stream.time_base) == (
            count,
            rate,
            count / Fraction(rate),
        )
        frames = list(container.decode(stream))
    assert [frame.pts * frame.time_base for frame in frames] == [i / Fraction(rate) for i in range(count)]
    assert {(frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries) for frame in frames} == {
        (1, 1, 1, 1)
    }


def test_mp4_frames_come_back_in_order_and_nearly_as_they_were(tmp_path):
    frames = moving()
    write_media(tmp_path / "a.mp4", frames, 8)
    back = read_video(tmp_path / "a.mp4", 16, 48, 80)
    error = np.abs(to_bytes(back) - to_bytes(frames))
    assert error.mean() < 4  # chroma is stored at half size
    distances = (back[:, None] - frames[None]).abs().mean((2, 3, 4))
    assert distances.argmin(1).tolist() == list(range(16))


def test_repeated_frames_are_kept(tmp_path):
    for name in ("a.mp4", "a.gif", "a"):
        write_media(tmp_path / name, plain(16, 90, 120, 60), 8)
        assert len(read_video(tmp_path / name, 16, 32, 48)) == 16


@pytest.mark.parametrize("rgb", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_mp4_colours_are_bt709_in_limited_range(tmp_path, rgb):
    write_media(tmp_path / "a.mp4", plain(3, *rgb), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        planes = next(container.decode(video=0)).to_ndarray()
    red, green, blue = np.array(rgb) / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = 16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748
    stored = planes[:32].mean(), planes[32:40].mean(), planes[40:].mean()
    assert np.abs(np.subtract(stored, expected)).max() < 1.5
    assert np.abs(to_bytes(read_video(tmp_path / "a.mp4", 3, 32, 48)) - rgb).max() < 4


def test_metadata_is_in_the_comment(tmp_path):
    metadata = {"prompt": "a teddy bear — ギター", "seed": "1"}
    write_media(tmp_path / "a.mp4", moving(2), 8, metadata)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert json.loads(container.metadata["comment"]) == metadata


def test_odd_sizes_are_refused_for_mp4_only(tmp_path):
    with pytest.raises(UserError, match=r"even sizes.*47x31"):
        write_media(tmp_path / "a.mp4", moving(2, 31, 47), 8)
    write_media(tmp_path / "a.gif", moving(2, 31, 47), 8)
    assert Image.open(tmp_path / "a.gif").size == (47, 31)


# -- gif


@pytest.mark.parametrize(("count", "fps", "duration"), [(16, 8, 2000), (10, 25, 400), (30, 30, 1000), (1, 8, 120)])
def test_gif_has_every_frame_the_exact_duration_and_loops_for_ever(tmp_path, count, fps, duration):
    frames = moving(count)
    write_media(tmp_path / "a.gif", frames, fps)
    durations, errors = [], []
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (count, 0)
        for i in range(count):
            gif.seek(i)
            durations.append(gif.info["duration"])
            dithered = np.asarray(gif.convert("RGB"), float)
            blocks = dithered - to_bytes(frames[i])
            errors.append(np.abs(blocks.reshape(6, 8, 10, 8, 3).mean((1, 3))).mean())
    assert sum(durations) == duration
    assert max(durations) - min(durations) <= 10
    assert max(errors) < 6  # dithering is right on the average of 8x8 pixels


def test_gif_cannot_be_faster_than_50_fps(tmp_path):
    with pytest.raises(UserError, match="50 fps"):
        write_media(tmp_path / "a.gif", moving(2), 60)


# -- pictures and folders


def test_png_is_exact_and_jpg_is_close(tmp_path):
    frame = moving(1)
    for name, tolerance in (("a.png", 0), ("a.jpg", 8), ("b.JPEG", 8)):
        write_media(tmp_path / name, frame)
        with Image.open(tmp_path / name) as picture:
            assert picture.format == ("PNG" if name == "a.png" else "JPEG")
            assert np.abs(np.asarray(picture, float) - to_bytes(frame[0])).max() <= tolerance + 1e-3
    assert torch.equal(read_image(tmp_path / "a.png", 48, 80), frame[0])


@pytest.mark.parametrize("name", ["frames", "frames/", "v1.5/"])
def test_a_folder_of_frames_reads_back_bit_for_bit(tmp_path, name):
    frames = moving(12)
    write_media(f"{tmp_path}/{name}", frames)
    assert sorted(file.name for file in (tmp_path / name).iterdir()) == [f"{i:04d}.png" for i in range(12)]
    assert torch.equal(read_video(tmp_path / name, 12, 48, 80), frames)


def test_a_folder_is_replaced_whole_and_only_if_it_holds_frames(tmp_path):
    write_media(tmp_path / "frames", moving(12))
    write_media(tmp_path / "frames", moving(3))
    assert len(list((tmp_path / "frames").iterdir())) == 3
    (tmp_path / "frames" / "thesis.tex").touch()
    with pytest.raises(UserError, match="numbered frames alone"):
        write_media(tmp_path / "frames", moving(5))
    assert len(list((tmp_path / "frames").iterdir())) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["frames"]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png", "a.jpg"])
def test_the_same_frames_give_the_same_bytes(tmp_path, name):
    frames = moving(1 if name in ("a.png", "a.jpg") else 40)
    contents = []
    for _ in range(2):
        write_media(tmp_path / name, frames)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


def test_values_outside_the_range_are_clamped(tmp_path):
    write_media(tmp_path / "a.png", torch.tensor([-1.7, 0.0, 1.3]).view(1, 1, 1, 3).expand(1, 3, 2, 3))
    assert np.asarray(Image.open(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 128, 255]


def test_half_precision_and_missing_folders_are_fine(tmp_path):
    write_media(tmp_path / "new" / "folder: 1%d" / "a.mp4", moving(2).bfloat16(), 8)
    assert [file.name for file in (tmp_path / "new" / "folder: 1%d").iterdir()] == ["a.mp4"]


NAN = moving(4)
NAN[2, 0, 3, 3] = float("nan")


@pytest.mark.parametrize(
    ("name", "frames", "says"),
    [
        ("a.mp4", NAN, r"NaN or infinity in frames \[2\] of 4"),
        ("a.gif", NAN * float("inf"), r"in frames \[0, 1, 2, 3\] of 4"),
        ("a", NAN, "NaN"),
        ("a.mp4", moving(2)[0], r"\(f, 3, h, w\)"),
        ("a.mp4", moving(2).movedim(1, -1), r"\(f, 3, h, w\)"),
        ("a.mp4", moving(2)[:0], r"\(f, 3, h, w\)"),
        ("a.mp4", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
        ("a.png", moving(2), "holds one picture, not 2"),
        ("a.avi", moving(2), r"'\.avi'.*\.mp4"),
        ("v1.5", moving(2), r"'\.5'.*folder"),
    ],
)
def test_what_cannot_be_written_is_refused_and_the_old_file_stays(tmp_path, name, frames, says):
    if name != "a":
        (tmp_path / name).write_text("old")
    with pytest.raises(UserError, match=says):
        write_media(tmp_path / name, frames, 8)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"] * (name != "a")


def test_what_will_be_written_is_known_before():
    kinds = {"a.mp4": ".mp4", "b/A.GIF": ".gif", "a.JPG": ".jpg", "frames": "folder", "v1.5/": "folder"}
    assert {path: check_writable(path) for path in kinds} == kinds
    with pytest.raises(UserError, match=r"\.avi"):
        check_writable("a.avi")


@pytest.mark.parametrize("fps", [0, -8, float("nan"), float("inf"), 1e-5])
def test_impossible_rates_are_refused(tmp_path, fps):
    with pytest.raises(UserError, match="fps"):
        write_media(tmp_path / "a.mp4", moving(2), fps)


def test_a_failure_inside_ffmpeg_leaves_the_old_file(tmp_path):
    (tmp_path / "a.gif").write_text("old")
    with pytest.raises(UserError, match=r"a\.gif could not be written"):
        write_media(tmp_path / "a.gif", torch.zeros(1, 3, 1, 70000), 8)  # GIF's sizes are 16 bit
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


# -- contact sheets


@pytest.mark.parametrize(
    ("count", "columns", "grid"), [(16, None, (4, 4)), (5, None, (2, 3)), (5, 5, (1, 5)), (2, 9, (1, 2))]
)
def test_contact_sheet_shows_every_frame_once_in_reading_order(tmp_path, count, columns, grid):
    frames = moving(count, 10, 14) * 0.9
    sheet = contact_sheet(frames, columns)
    rows = [torch.stack(list(row)) for row in sheet[:, 2:, 2:].unfold(1, 10, 12).unfold(2, 14, 16).movedim(0, 2)]
    cells = torch.cat(rows)
    assert sheet.shape == (3, 2 + 12 * grid[0], 2 + 16 * grid[1])
    assert torch.equal(cells[:count], frames)
    assert (cells[count:] == 1).all()
    assert (sheet == 1).sum() == 3 * (sheet[0].numel() - count * 10 * 14)  # the rest is white
    write_media(tmp_path / "sheet.png", sheet[None])
    assert Image.open(tmp_path / "sheet.png").size == sheet.shape[:0:-1]
