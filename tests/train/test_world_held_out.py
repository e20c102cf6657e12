"""What the tiny base never sees is kept apart from what it is trained on, and can be rendered all the same."""

import pytest
import torch
from one_scene import scenes_of, seeded

from train.world import (
    COLOURS,
    HELD_OUT_MOTIONS,
    HELD_OUT_SHAPES,
    HELD_OUT_SUBJECTS,
    HELD_OUT_TEXTURES,
    MOTIONS,
    SHAPES,
    TEXTURES,
    WORLD_MOTIONS,
    WORLD_SHAPES,
    WORLD_TEXTURES,
    caption,
    held_out_scenes,
    random_scenes,
    render,
)


@pytest.mark.parametrize(
    ("names", "world", "held_out"),
    [
        (SHAPES, WORLD_SHAPES, HELD_OUT_SHAPES),
        (TEXTURES, WORLD_TEXTURES, HELD_OUT_TEXTURES),
        (MOTIONS, WORLD_MOTIONS, HELD_OUT_MOTIONS),
    ],
    ids=["shapes", "textures", "motions"],
)
def test_what_is_held_out_comes_last(names, world, held_out):
    # random_scenes and the judge count what is not held out from 0, and render counts all names
    assert list(names) == [*world, *held_out]


def test_what_is_held_out_has_no_word():
    for scenes in (
        scenes_of(shape="arrow"),
        scenes_of(texture="checked"),
        scenes_of(motion="swinging"),
        held_out_scenes(0, "moving left", "sea", 1, seeded()),
    ):
        with pytest.raises(IndexError):
            caption(scenes, 0)


def test_nothing_held_out_is_ever_drawn():
    scenes = random_scenes(3000, seeded(6), torch.zeros(3000, 1))
    for numbers, names, held_out in (
        (scenes.shape, SHAPES, HELD_OUT_SHAPES),
        (scenes.texture, TEXTURES, HELD_OUT_TEXTURES),
        (scenes.motion, MOTIONS, HELD_OUT_MOTIONS),
    ):
        drawn = {list(names)[number] for number in numbers.unique().tolist()}
        assert drawn == set(names) - set(held_out)
    assert all(shape in HELD_OUT_SHAPES and texture in HELD_OUT_TEXTURES for shape, texture, _, _ in HELD_OUT_SUBJECTS)


def test_held_out_subjects_have_two_colours_of_their_own():
    for number, (shape, texture, first, second) in enumerate(HELD_OUT_SUBJECTS):
        scenes = held_out_scenes(number, "swinging", "night", 2, seeded(), torch.zeros(2, 1))
        assert scenes.shape.tolist() == [list(SHAPES).index(shape)] * 2
        frames, mask = (drawn[:, :, 0] for drawn in render(scenes))
        for colour in (first, second):
            away = (frames - (torch.tensor(COLOURS[colour]) * 2 - 1)[:, None, None]).norm(dim=1)
            assert ((away < 0.05) & (mask[:, 0] == 1)).sum((1, 2)).min() > 10, (shape, texture, colour)
