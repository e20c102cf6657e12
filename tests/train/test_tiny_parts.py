"""What the stages of the tiny base's recipe share."""

import math
import re
from dataclasses import fields

import pytest
import torch
from transformers import CLIPTokenizer

from train.losses import skewed_timesteps
from train.tiny_parts import (
    LENGTH,
    SLOW,
    nameless,
    picking_weights,
    random_captions,
    recoloured,
    spoken_tokens,
    tokens_of,
    with_spare_words,
    word_loss,
)
from train.vocabulary import SPARE_WORDS, words, write_tokenizer
from train.world import (
    COLOURS,
    HELD_OUT_SHAPES,
    NAMELESS,
    SHAPES,
    WORLD_MOTIONS,
    WORLD_SHAPES,
    WORLD_TEXTURES,
    distance_tables,
    held_out_scenes,
    random_scenes,
    render,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, LENGTH)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("skew", [1.0, 0.5])
def test_timesteps_are_spread_as_the_skew_says(skew):
    """A share x ** (1 / skew) of them lies below 1000 x, to three standard errors."""
    drawn = skewed_timesteps(100_000, skew, 1000, torch.Generator().manual_seed(0))
    assert 0 <= drawn.min() < drawn.max() == 999
    for below in (0.2, 0.5, 0.8):
        share = below ** (1 / skew)
        error = (share * (1 - share) / 100_000) ** 0.5
        assert (drawn < 1000 * below).float().mean().item() == pytest.approx(share, abs=3 * error)


def test_recoloured_scenes_show_second_colours_that_captions_do_not_tell():
    scenes = random_scenes(400, torch.Generator().manual_seed(0))
    changed = recoloured(scenes, 300, torch.Generator().manual_seed(1))
    for name in ("shape", "colour", "background", "scenery", "motion", "poses"):
        assert torch.equal(getattr(scenes, name), getattr(changed, name))
    assert torch.equal(scenes.second[300:], changed.second[300:])
    assert torch.equal(scenes.texture[300:], changed.texture[300:])
    assert set(changed.texture[:300].tolist()) == set(range(1, len(WORLD_TEXTURES)))  # of the world, and never plain
    second, named = changed.second[:300], torch.tensor(list(COLOURS.values()))
    apart = (second[:, None] - named).norm(dim=2)
    of_a_name = apart.amin(dim=1) < 1e-6
    assert of_a_name.float().mean().item() == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / 300) ** 0.5)
    assert set(apart[of_a_name].argmin(dim=1).tolist()) == set(range(len(COLOURS)))
    assert len(second[~of_a_name].unique(dim=0)) == (~of_a_name).sum()


def test_motions_that_are_learnt_slowly_are_picked_twice_as_often():
    scenes = random_scenes(120, torch.Generator().manual_seed(0))
    for weight, number in zip(picking_weights(scenes).tolist(), scenes.motion.tolist(), strict=True):
        assert weight == (2 if WORLD_MOTIONS[number] in SLOW else 1)
    assert len(set(scenes.motion.tolist())) == 12


SUBJECT, MOTION, GROUND = "a striped red star", "moving left", "over the sand"


@pytest.mark.parametrize(
    ("caption", "pattern"),
    [
        (f"{SUBJECT} is {MOTION} {GROUND}", f"(?P<subject>.+) is (?P<motion>.+) {GROUND}"),
        (f"{SUBJECT} is {MOTION}", "(?P<subject>.+) is (?P<motion>.+)"),
        (f"{SUBJECT} {GROUND}", f"(?P<subject>.+) {GROUND}"),
        (SUBJECT, "(?P<subject>.+)"),
    ],
)
def test_spare_words_stand_for_the_subject_or_the_motion_now_and_then(caption, pattern):
    """Shares to four standard errors; nothing else of the caption changes, and every spare word gets its turn."""
    changed = with_spare_words(
        [caption] * 4000, (0.6, 0.2), torch.zeros(4000, dtype=torch.bool), torch.Generator().manual_seed(0)
    )
    for part, before, share in (("subject", SUBJECT, 0.6), ("motion", MOTION, 0.2)):
        if f"<{part}>" in pattern:
            said = [re.fullmatch(pattern, text)[part] for text in changed]
            spare = [text.removeprefix("a ") for text in said if text != before]
            assert set(spare) == set(SPARE_WORDS)
            assert len(spare) / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


def test_what_has_no_word_is_some_subject_in_every_caption():
    """The first scenes get outlines that no word means, and captions of none of the world's; the others stay."""
    generator = torch.Generator().manual_seed(0)
    scenes = random_scenes(60, generator)
    changed = nameless(scenes, 20, generator)
    assert (changed.shape[:20] >= len(SHAPES)).all()
    assert (changed.path[:, :, :3] == scenes.path[:, :, :3]).all()
    assert all((getattr(changed[20:], f.name) == getattr(scenes[20:], f.name)).all() for f in fields(scenes))
    wordless = changed.shape >= len(SHAPES)
    texts = with_spare_words(random_captions(changed, generator), (0.0, 0.0), wordless, generator)
    looks = {*WORLD_SHAPES, *WORLD_TEXTURES, *COLOURS}
    assert [not looks & set(text.split()) for text in texts] == wordless.tolist()
    assert render(changed)[1][:20].amax(dim=(1, 3, 4)).min() > 0.9  # and is seen in every frame


def test_a_held_out_shape_gets_no_word_by_mistake():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(IndexError):
        random_captions(held_out_scenes(0, "resting", "road", 1, generator), generator)


def test_no_nameless_outline_is_a_held_out_one():
    inside = (distance_tables()[:, 0] < 0).float().flatten(1)
    held_out = inside[[list(SHAPES).index(name) for name in HELD_OUT_SHAPES]]
    nameless_ones = inside[len(SHAPES) :]
    assert len(nameless_ones) == len(NAMELESS)
    both = held_out @ nameless_ones.T
    either = held_out.sum(1, keepdim=True) + nameless_ones.sum(1) - both
    assert (both / either).max() < 0.9


def test_the_words_of_captions_are_told_apart_and_spare_ones_left_alone(tokenizer):
    named = tokenizer.convert_ids_to_tokens(spoken_tokens(tokenizer).tolist())
    assert sorted(named) == sorted(f"{word}</w>" for word in words() if word not in SPARE_WORDS)


def test_the_word_loss_is_a_loop_over_positions_and_the_words_so_far(tokenizer):
    prompts = ["a striped red star is moving left over the sand", "a red red circle"]
    tokens, spoken = tokens_of(tokenizer, prompts), spoken_tokens(tokenizer).tolist()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, LENGTH, 6, generator=generator)
    table = torch.randn(len(tokenizer), 6, generator=generator)
    total = []
    for prompt, row in zip(range(2), tokens.tolist(), strict=True):
        for position in range(1, LENGTH):
            so_far = {number for number in row[: position + 1] if number in spoken}
            scores = {number: float(states[prompt, position] @ table[number]) for number in spoken}
            norm = math.log(sum(math.exp(score) for score in scores.values()))
            share = 1 / len(so_far)
            total.append(sum(share * (math.log(share) - scores[number] + norm) for number in so_far))
    expected = sum(total) / len(total)
    assert word_loss(states, tokens, table, torch.tensor(spoken)).item() == pytest.approx(expected, rel=1e-5)


def test_states_that_tell_every_word_so_far_leave_nothing_to_lose(tokenizer):
    tokens = tokens_of(tokenizer, ["a plain white circle is resting"])
    spoken = spoken_tokens(tokenizer)
    table = torch.eye(len(tokenizer))
    states = 50 * torch.nn.functional.one_hot(tokens, len(tokenizer)).cumsum(dim=1).clamp(max=1).float()
    assert word_loss(states, tokens, table, spoken).item() < 1e-5
    assert word_loss(states.roll(1, dims=2), tokens, table, spoken).item() > 1
