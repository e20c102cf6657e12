"""Reading videos, on clips whose every frame says which one it is."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import HEIGHT, NOT_PICTURES, WIDTH, greys, numbers, quarters, to_bytes, write_clip
from PIL import Image

from model.errors import UserError
from sampling.media import read_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """50 lossless frames at 10 fps: 5 seconds."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mov", greys(50))


def test_every_frame_comes_in_order(clip):
    frames = read_video(clip, 50, HEIGHT, WIDTH)
    assert frames.shape == (50, 3, HEIGHT, WIDTH)
    assert frames.dtype == torch.float32
    assert np.array_equal(to_bytes(frames).round(), np.stack(greys(50)))


def test_frame_step_takes_every_nth_frame(clip):
    assert numbers(read_video(clip, 8, 16, 16, frame_step=7)) == list(range(0, 50, 7))


@pytest.mark.parametrize("start", [0.1, 0.15, 2.0, 3.35, 4.0])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mov", "png", {}),
        ("a.mkv", "ffv1", {}),
        ("a.mp4", "libx264", {"g": "12", "bf": "3", "qp": "1"}),
        ("a.ts", "libx264", {"g": "12", "bf": "3", "qp": "1"}),
        ("a.avi", "mpeg4", {"qmin": "1", "qmax": "2", "g": "12"}),
    ],
)
def test_start_is_the_frame_on_show_then(tmp_path, name, codec, options, start):
    write_clip(tmp_path / name, greys(50), codec=codec, **options)
    first = int(start * 10 + 1e-6)
    assert numbers(read_video(tmp_path / name, 10, 16, 16, start=start)) == list(range(first, first + 10))


def blank_packets(path: Path, which: slice) -> None:
    """Overwrite the data of some frames with zeros."""
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in spans[which]:
        data[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(data)


def test_start_skips_without_decoding_all_before(tmp_path):
    write_clip(tmp_path / "a.mp4", greys(50), codec="libx264", g="10", qp="10")
    blank_packets(tmp_path / "a.mp4", slice(0, 5))
    assert numbers(read_video(tmp_path / "a.mp4", 4, 16, 16, start=2.5)) == [25, 26, 27, 28]
    with pytest.raises(UserError, match=r"a\.mp4"):
        read_video(tmp_path / "a.mp4", 4, 16, 16)


@pytest.mark.parametrize(("name", "codec"), [("a.mov", "png"), ("a.mp4", "libx264")])
def test_a_frame_that_cannot_be_decoded_is_not_skipped(tmp_path, name, codec):
    write_clip(tmp_path / name, greys(20), codec=codec)
    blank_packets(tmp_path / name, slice(6, 7))
    with pytest.raises(UserError, match=name):
        read_video(tmp_path / name, 12, 16, 16)


@pytest.mark.parametrize("fps", [4, 5, 6.25, 10, 24, 60])
def test_fps_takes_what_is_on_show_at_each_moment(clip, fps):
    expected = [int(0.5 * 10 + i * 10 / fps + 1e-6) for i in range(12)]
    assert numbers(read_video(clip, 12, 16, 16, fps=fps, start=0.5)) == expected


def test_fps_evens_out_a_variable_frame_rate(tmp_path):
    times = [0, 10, 20, 100, 110, 300, 310, 500]  # milliseconds
    write_clip(tmp_path / "a.mov", greys(8), times, tick=Fraction(1, 1000))
    frames = numbers(read_video(tmp_path / "a.mov", 6, 16, 16, fps=10))
    assert frames == [max(i for i, time in enumerate(times) if time <= 100 * k) for k in range(6)]


def test_rounded_time_stamps_neither_repeat_nor_skip(tmp_path):
    times = [round(i * 1000 / 30) for i in range(50)]  # Matroska counts milliseconds: 0, 33, 67, 100, ...
    write_clip(tmp_path / "a.mkv", greys(50), times, tick=Fraction(1, 1000), codec="ffv1")
    assert numbers(read_video(tmp_path / "a.mkv", 50, 16, 16, fps=30)) == list(range(50))


def test_the_last_frame_is_on_show_until_the_end(clip):
    assert numbers(read_video(clip, 4, 16, 16, fps=20, start=4.8)) == [48, 48, 49, 49]
    with pytest.raises(UserError, match="enough for 4 of the 5"):
        read_video(clip, 5, 16, 16, fps=20, start=4.8)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_frames": 51}, r"has 50 frames.*enough for 50 of the 51.*Lower num_frames\."),
        ({"num_frames": 30, "frame_step": 2}, r"has 50 frames.*enough for 25 of.*Lower num_frames or frame_step\."),
        ({"num_frames": 40, "start": 2.0}, r"has 30 frames from 2 s on.*Lower num_frames or start\."),
        ({"num_frames": 30, "fps": 5}, r"has 5 s.*enough for 25 of.*raise fps"),
        ({"num_frames": 1, "start": 9.0}, r"has 0 frames from 9 s on"),
        ({"num_frames": 4, "fps": 8, "frame_step": 2}, "contradict"),
        ({"num_frames": 0}, "must be positive"),
        ({"num_frames": 4, "fps": 0.0}, "must be positive"),
        ({"num_frames": 4, "start": -1.0}, "not negative"),
    ],
)
def test_a_clip_too_short_says_what_to_lower(clip, settings, says):
    with pytest.raises(UserError, match=says):
        read_video(clip, height=16, width=16, **settings)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_animations_are_videos(tmp_path, kind):
    pictures = [Image.fromarray(grey) for grey in greys(10)]
    pictures[0].save(tmp_path / "a", kind, save_all=True, append_images=pictures[1:], duration=120)
    assert numbers(read_video(tmp_path / "a", 10, 16, 16)) == list(range(10))
    assert numbers(read_video(tmp_path / "a", 3, 16, 16, start=0.6)) == [5, 6, 7]
    assert numbers(read_video(tmp_path / "a", 5, 16, 16, fps=5)) == [0, 1, 3, 5, 6]


def test_a_folder_of_pictures_is_a_video_in_natural_order(tmp_path):
    for i, grey in enumerate(greys(12)):
        Image.fromarray(grey).save(tmp_path / f"frame{i}.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    assert numbers(read_video(tmp_path, 12, 16, 16)) == list(range(12))
    assert numbers(read_video(tmp_path, 4, 16, 16, frame_step=3)) == [0, 3, 6, 9]
    with pytest.raises(UserError, match="has 12 pictures"):
        read_video(tmp_path, 13, 16, 16)
    with pytest.raises(UserError, match="no clock"):
        read_video(tmp_path, 4, 16, 16, fps=8)


ONE = 1 << 16  # display matrices are in 16.16 fixed point, the last column in 2.30
MATRICES = {
    # name: (a, b, c, d) with x' = a x + c y and y' = b x + d y, and numpy's way of doing the same
    "as stored": ((1, 0, 0, 1), lambda p: p),
    "held upright (90 clockwise)": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "upside down": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "90 counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    "transversed": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
}


def turn_by_hand(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Put a display matrix into the track header of a QuickTime file."""
    data = bytearray(path.read_bytes())
    unity = b"".join(value.to_bytes(4, "big", signed=True) for value in (ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30))
    at = data.find(unity, data.find(b"tkhd"))
    turned = (a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("matrix", "turn"), MATRICES.values(), ids=MATRICES)
def test_rotation_and_mirroring_of_videos_are_honoured(tmp_path, matrix, turn):
    path = turn_by_hand(write_clip(tmp_path / "a.mov", [quarters()] * 3), *matrix)
    expected = turn(quarters())
    frames = to_bytes(read_video(path, 3, *expected.shape[:2])).round()
    assert np.array_equal(frames, np.stack([expected] * 3))


@pytest.mark.parametrize("turned", [False, True])
def test_oblong_pixels_are_shown_as_meant(tmp_path, turned):
    disc = (np.hypot(*(np.indices((64, 64)) - 31.5)) < 24).astype(np.uint8) * 255
    squeezed = np.asarray(Image.fromarray(disc).resize((32, 64)))

    def anamorphic(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    path = write_clip(tmp_path / "a.mov", [np.stack([squeezed] * 3, -1)] * 2, setup=anamorphic)
    if turned:
        turn_by_hand(path, 0, 1, -1, 0)
    frames = to_bytes(read_video(path, 1, 64, 64))[0, ..., 0]
    assert np.abs(frames - disc).mean() < 6


@pytest.mark.parametrize(("matrix", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114)])
@pytest.mark.parametrize("full", [False, True])
def test_colour_matrix_and_range_of_the_file_are_followed(tmp_path, matrix, red, blue, full):
    colour = np.array([0.8, 0.3, 0.1])
    luma = colour @ (red, 1 - red - blue, blue)
    chroma = np.array([(colour[2] - luma) / (1 - blue), (colour[0] - luma) / (1 - red)]) / 2
    y, u, v = (255 * luma, *(128 + 255 * chroma)) if full else (16 + 219 * luma, *(128 + 224 * chroma))
    planes = np.concatenate([np.full(32 * 32, y), np.full(16 * 16, u), np.full(16 * 16, v)]).round().astype(np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame.from_ndarray(planes.reshape(48, 32), format="yuv420p")
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(to_bytes(read_video(tmp_path / "a.mp4", 1, 32, 32)) - 255 * colour).max() < 3


def test_hdr_gives_a_warning(tmp_path):
    def hdr(stream):
        stream.codec_context.color_trc = 18

    write_clip(tmp_path / "a.mp4", greys(3), codec="libx264", setup=hdr)
    with pytest.warns(UserWarning, match="HDR"):
        read_video(tmp_path / "a.mp4", 2, 16, 16)


def test_sound_without_pictures_is_refused(tmp_path):
    with wave.open(str(tmp_path / "a.mp4"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(8000))
    with pytest.raises(UserError, match=r"a\.mp4 holds no pictures"):
        read_video(tmp_path / "a.mp4", 1, 16, 16)


def noisy_clip(path: Path, codec="libx264", **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (16, HEIGHT, WIDTH, 3)).astype(np.uint8)
    return write_clip(path, list(noise), codec=codec, **options).read_bytes()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_truncated_videos_are_refused(tmp_path, share):
    whole = noisy_clip(tmp_path / "whole.mp4")
    (tmp_path / "cut.mp4").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        read_video(tmp_path / "cut.mp4", 16, 16, 16)


def test_frames_before_the_damage_can_be_used(tmp_path):
    whole = noisy_clip(tmp_path / "whole.mp4", bf="0")
    (tmp_path / "cut.mp4").write_bytes(whole[: int(0.8 * len(whole))])
    expected = read_video(tmp_path / "whole.mp4", 4, 16, 16)
    assert torch.equal(read_video(tmp_path / "cut.mp4", 4, 16, 16), expected)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_overwritten_bytes_in_a_video_are_refused(tmp_path, codec):
    whole = bytearray(noisy_clip(tmp_path / "whole.mp4", codec=codec, bf="0"))
    middle = len(whole) // 2
    whole[middle : middle + 64] = bytes(64)
    (tmp_path / "a.mp4").write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.mp4"):
        read_video(tmp_path / "a.mp4", 16, 16, 16)


@pytest.mark.parametrize("content", NOT_PICTURES.values(), ids=NOT_PICTURES)
def test_what_is_no_video_is_refused_by_name(tmp_path, content):
    (tmp_path / "guitar.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"guitar\.mp4"):
        read_video(tmp_path / "guitar.mp4", 1, 32, 32)
