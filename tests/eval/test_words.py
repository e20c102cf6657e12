"""What prompts name, and what counts as a leak."""

import pytest
import torch

from eval.words import CLASSES, LEAKING, leaks, named, spare_subject
from train.world import BACKGROUNDS, COLOURS, WORLD_MOTIONS, WORLD_SHAPES, WORLD_TEXTURES, caption, random_scenes


def numbers(**words):
    return {attribute: list(CLASSES[attribute]).index(word) for attribute, word in words.items()}


def test_every_caption_of_the_world_is_read_back():
    scenes = random_scenes(200, torch.Generator().manual_seed(0))
    for i in range(200):
        looks = {name: int(getattr(scenes, name)[i]) for name in ("shape", "colour", "texture", "background", "motion")}
        assert named(caption(scenes, i)) == looks
        assert named(caption(scenes, i, motion=False, background=False)) == {k: looks[k] for k in LEAKING[:3]}
    assert [len(names) for names in CLASSES.values()] == [
        *map(len, (WORLD_SHAPES, COLOURS, WORLD_TEXTURES, BACKGROUNDS, WORLD_MOTIONS))
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", {}),
        ("a teddy bear is playing guitar", {}),
        ("A RED Star, over the sand.", {"shape": "star", "colour": "red", "background": "sand"}),
        ("a starry, seaside redness", {}),
        ("a blue star and a red moon", {"shape": "star", "colour": "blue"}),
        ("a zor is circling counterclockwise", {"motion": "circling counterclockwise"}),
        ("a zor is circling", {}),
        ("a zor is moving over the road, left of it", {"background": "road"}),
    ],
)
def test_words_count_whole_and_the_first_of_two(prompt, expected):
    assert named(prompt) == numbers(**expected)


@pytest.mark.parametrize(
    ("prompt", "spare"),
    [("a zor is dax over the road", True), ("a star is dax", False), ("a red Wug", True), ("zorro is here", False)],
)
def test_a_spare_word_is_a_subject_before_the_verb(prompt, spare):
    assert spare_subject(prompt) is spare


THEIRS = numbers(shape="square", colour="blue", texture="plain", background="sand")
OTHER = numbers(shape="star", colour="red", texture="dotted", background="road")


@pytest.mark.parametrize(
    ("prompt", "photos", "can"),
    [
        ("a dotted red star over the road", None, "shape colour texture background"),
        ("a dotted red star", None, "shape colour texture"),
        ("a plain blue square over the sand", None, ""),  # all asked for
        ("a plain red star over the sand", None, "shape colour"),
        ("a teddy bear", None, ""),
        ("a zor is dax", None, "shape colour texture"),
        ("a zor is dax over the road", OTHER, "shape colour texture background"),
        ("a zor is dax", OTHER | numbers(colour="blue"), "shape texture"),  # the photos' subject is blue too
        ("a blue zor is dax", OTHER, "shape texture"),  # the prompt's word goes before the photos'
        ("a zor is dax", {}, "shape colour texture"),  # the judge sees nothing in the photos
        ("a star is zor", None, "shape"),
    ],
)
def test_what_can_leak_and_what_does(prompt, photos, can):
    assert set(leaks(prompt, OTHER, THEIRS, photos)) == set(can.split())
    assert set(leaks(prompt, OTHER, THEIRS, photos).values()) <= {0.0}
    assert set(leaks(prompt, THEIRS, THEIRS, photos).values()) <= {1.0}
    assert leaks(prompt, THEIRS, THEIRS, photos).keys() == leaks(prompt, {}, THEIRS, photos).keys()
    assert set(leaks(prompt, {}, THEIRS, photos).values()) <= {0.0}
    one = leaks(prompt, OTHER | {"shape": THEIRS["shape"]}, THEIRS, photos)
    assert [name for name, value in one.items() if value] == [name for name in ("shape",) if name in can]
