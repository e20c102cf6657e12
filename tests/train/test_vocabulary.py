"""The tiny base's tokenizer, read by transformers' own."""

import pytest
from transformers import CLIPTokenizer

from train.vocabulary import SPARE_WORDS, words, write_tokenizer
from train.world import HELD_OUT_MOTIONS, HELD_OUT_SHAPES, HELD_OUT_TEXTURES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    size = write_tokenizer(folder, 24)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    assert len(tokenizer) == size
    return tokenizer


def test_every_word_is_one_token_of_its_own(tokenizer):
    tokens = {word: tokenizer(word)["input_ids"] for word in words()}
    assert all(len(numbers) == 3 for numbers in tokens.values())
    assert len({numbers[1] for numbers in tokens.values()}) == len(words())


def test_the_last_two_tokens_are_start_and_end(tokenizer):
    start, *_, end = tokenizer("a red star")["input_ids"]
    assert (start, end) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert tokenizer.pad_token_id == end


@pytest.mark.parametrize("prompt", ["a teddy bear", "été, 42 % - ☃", "A STRIPED RED STAR"])
def test_any_text_comes_back(tokenizer, prompt):
    again = tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True)
    assert again.replace(" ", "") == prompt.lower().replace(" ", "")


def test_words_in_context_stay_whole(tokenizer):
    numbers = tokenizer("A striped red star is circling counterclockwise over the sand")["input_ids"]
    assert len(numbers) == 2 + 10


def test_what_is_held_out_has_no_word():
    held_out = " ".join((*HELD_OUT_SHAPES, *HELD_OUT_TEXTURES, *HELD_OUT_MOTIONS)).split()
    assert not set(held_out) & (set(words()) - {"a", "and"})
    assert set(SPARE_WORDS) <= set(words())
