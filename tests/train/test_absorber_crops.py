"""The crops that an absorber learns from: of which frames, from where, how large."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import absorber

from sampling import read_video
from train.absorber import random_crops, with_defaults
from weights.open import with_source


@pytest.fixture
def maps(tmp_path):
    """Four frames of 64x64 whose red is x, green y, and blue the frame's number."""
    (tmp_path / "maps").mkdir()
    y, x = np.mgrid[:64, :64]
    for i in range(4):
        picture = np.stack([4 * x, 4 * y, np.full_like(x, 60 * i)], axis=-1).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "maps" / f"{i}.png")
    return tmp_path / "maps"


def cropped(base, material, **changes):
    settings = with_source(absorber(material, "out", num_frames=4, **changes), base)
    return random_crops(with_defaults(settings, base))


def test_crops_are_of_all_frames_and_places_and_of_a_third_to_two_thirds(base, maps):
    crops = cropped(base, maps, video=str(maps), crops=400)
    assert crops.shape == (400, 3, 32, 32)
    red, green, blue = (127.5 * (crops + 1)).unbind(1)
    assert set((blue.mean((1, 2)) / 60).round().int().tolist()) == {0, 1, 2, 3}
    # the ramps go on evenly, away from the edges: pixels of the frame for one of the crop
    widths = (red[:, :, 24] - red[:, :, 8]).mean(1) / 4 / 16 * 32
    heights = (green[:, 24] - green[:, 8]).mean(1) / 4 / 16 * 32
    assert torch.allclose(widths, heights, atol=1)
    for sides, middles in ((widths, red[:, :, 15:17]), (heights, green[:, 15:17])):
        assert 0.33 * 64 - 1 < sides.min() < 0.36 * 64
        assert 0.64 * 64 < sides.max() < 0.67 * 64 + 1
        begin = (middles.mean((1, 2)) / 4 + 0.5 - sides / 2) / (64 - sides)  # 0: at one edge, 1: at the other
        assert -0.05 < begin.min() < 0.05
        assert 0.95 < begin.max() < 1.05
        assert begin.mean() == pytest.approx(0.5, abs=0.06)


def test_crops_of_half_the_frame_are_its_pixels_as_they_are(base, material):
    """They come from frames of twice the size: nothing is scaled."""
    crops = cropped(base, material, crop_from=0.5, crop_to=0.5)
    frames = read_video(material / "clip.mp4", 4, 64, 64)
    places = frames.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5)
    for crop in crops:
        assert (places - crop).abs().amax((3, 4, 5)).min() < 1e-5


def test_crops_depend_on_the_seed_alone(base, material):
    assert torch.equal(cropped(base, material), cropped(base, material))
    assert not torch.equal(cropped(base, material), cropped(base, material, seed=1))
