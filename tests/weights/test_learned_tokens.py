"""Learned tokens in prompts: found as words, expanded, cut and trained as they should be, and no trace left."""

import copy
import warnings

import pytest
import torch
from oracles import error
from torch import nn

from model import UserError
from weights import Embedding, learned_tokens, load_base

WIDTH = 128  # of the narrow base's text encoder
V = torch.arange(2.0 * WIDTH).reshape(2, WIDTH)


@pytest.fixture(scope="module")
def base(files):
    return load_base(files.folder, device="cpu")


@pytest.mark.parametrize(
    ("token", "width", "says"),
    [
        ("of", WIDTH, "'of' is a word of CLIP's own"),
        ("OF", WIDTH, "'OF' is a word of CLIP's own"),
        ("<|endoftext|>", WIDTH, "a word of CLIP's own"),
        ("<x>", 768, r"768 wide \(Stable Diffusion 1.x\), and the text encoder of sd15 takes 128"),
        ("<x>", 12, "12 wide, and"),
        (" ", WIDTH, "must not be empty"),
    ],
)
def test_a_token_that_does_not_fit_the_base_is_refused(base, token, width, says):
    table = base.text.clip.embeddings.token_embedding
    assert len(base.tokenizer("of", add_special_tokens=False)["input_ids"]) == 1
    good = Embedding("<good>", V)
    with pytest.raises(UserError, match=says), learned_tokens(base, [good, Embedding(token, torch.ones(1, width))]):
        pass
    assert base.text.clip.embeddings.token_embedding is table
    assert base.learned == {}


def spliced(base, *parts):
    """Tokens of a prompt whose words the tokenizer knows and whose learned tokens are numbers already."""
    inner = [n for part in parts for n in (base.tokenizer(part)["input_ids"][1:-1] if isinstance(part, str) else part)]
    row = [1022, *inner, 1023]
    return row + [1023] * (77 - len(row))


X = (1024, 1025)  # the narrow table has 1024 rows, though its tokenizer knows fewer words
WORDS = {
    "a cat plays": ("a", X, "plays"),
    "CAT, a Cat.cat's (cat)": (X, ", a", X, ".", X, "'s (", X, ")"),
    "category catcat cat_1 cat1 concat": ("category catcat cat_1 cat1 concat",),
    "cat cat": (X, X),
    "cat": (X,),
    "": ("",),
}


@pytest.mark.parametrize("prompt", WORDS)
def test_a_token_is_found_as_a_word_of_its_own(base, prompt):
    with learned_tokens(base, [Embedding("cat", V)]):
        assert base.tokens([prompt]).tolist() == [spliced(base, *WORDS[prompt])]


@pytest.mark.parametrize(
    ("token", "prompt", "parts"),
    [
        ("<Cat-Toy>", "a <cat-toy>man <CAT-TOY>", ("a", X, "man", X)),
        ("my  style", "in My\n style, my stylex", ("in", X, ", my stylex")),
        ("(c+)", "a (c+) (cc)", ("a", X, "(cc)")),
        ("caf\u00e9", "a cafe\u0301 caf\u00e9", ("a", X, X)),
        ("cafe\u0301", "a caf\u00e9", ("a", X)),
    ],
)
def test_tokens_may_hold_more_than_letters(base, token, prompt, parts):
    with learned_tokens(base, [Embedding(token, V)]):
        assert base.tokens([prompt]).tolist() == [spliced(base, *parts)]


def test_a_word_in_brackets_that_nothing_knows_is_warned_about(base):
    with learned_tokens(base, [Embedding("<good>", V)]):
        with pytest.warns(UserWarning, match="nothing was learned for <look> and <a b> in 'a <look> <good> <a b>'"):
            base.tokens(["a <look> <good> <a b>"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            base.tokens(["a <good> 3 < 4 and <|endoftext|>"])


def test_of_two_tokens_that_fit_the_longer_counts(base):
    with learned_tokens(base, [Embedding("<a>", V), Embedding("<a>-b", V[:1])]):
        assert base.tokens(["<a> <a>-b <a>-c"]).tolist() == [spliced(base, X, (1026,), X, "-c")]


def test_without_learned_tokens_prompts_are_as_the_tokenizer_has_them(base):
    prompts = ["", "a teddy's 12 bears!", "caf\u00e9 <|endoftext|> x", "dog " * 99, "\u732b  \U0001f600"]
    expected = base.tokenizer(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    with pytest.warns(UserWarning, match="longer than 75 tokens"):
        assert base.tokens(prompts).tolist() == expected


def test_what_is_cut_is_said_where_a_token_takes_several_places(base):
    per_word = len(base.tokenizer("dog", add_special_tokens=False)["input_ids"])
    fill = "x " * (75 - per_word)
    with learned_tokens(base, [Embedding("<x>", torch.ones(per_word + 1, WIDTH))]), warnings.catch_warnings():
        warnings.simplefilter("error")
        base.embed([fill + "dog"])
        with pytest.raises(UserWarning, match=r"longer than 75 tokens, and this is cut: '<x>'"):
            base.embed([fill + "<x>"])
        base.embed([fill[2:] + "<x>"])
        with pytest.raises(UserWarning, match=r"this is cut: 'dog'"):
            base.embed(["<x> " + fill[2:] + "dog"])


@pytest.mark.filterwarnings("ignore:nothing was learned")
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_base_is_as_it_was(base, fails):
    table, tokenizer = base.text.clip.embeddings.token_embedding, base.tokenizer
    rows, state = table.weight.clone(), copy.deepcopy(tokenizer.backend_tokenizer.to_str())
    before = base.embed(["a <x> plays"])
    names = list(base.text.state_dict())
    try:
        with learned_tokens(base, [Embedding("<x>", V)]):
            inside = base.embed(["a <x> plays"])
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert base.text.clip.embeddings.token_embedding is table
    assert torch.equal(table.weight, rows)
    assert list(base.text.state_dict()) == names
    assert base.tokenizer is tokenizer
    assert tokenizer.backend_tokenizer.to_str() == state
    assert base.learned == {}
    assert torch.equal(base.embed(["a <x> plays"]), before)
    assert error(inside, before) > 1e-2


def test_a_parameter_is_trained_through_the_prompt_and_nothing_else(base):
    vectors = nn.Parameter(torch.randn(2, WIDTH))
    with learned_tokens(base, [Embedding("<x>", vectors)]):
        base.text(base.tokens(["a <x>"])).square().sum().backward()
        before = base.embed(["a <x>"])
        vectors.data *= -1
        assert error(base.embed(["a <x>"]), before) > 1e-2
    assert vectors.grad.abs().amin(dim=1).gt(0).all()
    assert all(p.grad is None for p in base.text.parameters())
