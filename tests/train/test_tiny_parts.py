"""What the stages of the tiny base's recipe share."""

import math

import pytest
import torch
from transformers import CLIPTokenizer

from train.tiny_parts import LENGTH, SLOW, picked_scenes, skewed_timesteps, spoken_tokens, tokens_of, word_loss
from train.vocabulary import SPARE_WORDS, words, write_tokenizer
from train.world import WORLD_MOTIONS, random_scenes


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


def test_motions_that_are_learnt_slowly_are_picked_twice_as_often():
    """Each of the twelve against its share of all weights, to four standard errors."""
    generator = torch.Generator().manual_seed(0)
    scenes = random_scenes(480, generator)
    counts = scenes.motion.bincount(minlength=12)
    seen = scenes.motion[picked_scenes(scenes, 100_000, generator)].bincount(minlength=12) / 100_000
    weights = {name: 2 if name in SLOW else 1 for name in WORLD_MOTIONS}
    total = sum(weights[name] * counts[i].item() for i, name in enumerate(WORLD_MOTIONS))
    for i, name in enumerate(WORLD_MOTIONS):
        share = weights[name] * counts[i].item() / total
        assert seen[i].item() == pytest.approx(share, abs=4 * (share * (1 - share) / 100_000) ** 0.5)


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
