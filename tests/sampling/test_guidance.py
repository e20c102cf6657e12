"""Guidance by closed forms, with one text and with a text for each layer."""

import pytest
import torch

from model import UserError
from sampling import encode, guided, sample_latents


class Toy:
    """A network whose prediction is the sum of its latents and of the mean of each layer's text."""

    dtype = torch.float32

    def __call__(self, latents, timestep, text, motion):
        words = text if isinstance(text, list) else [text] * 9
        return latents + sum(layer.mean(dim=(1, 2)) for layer in words)[:, None, None, None, None]


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_every_layer_is_led_from_the_negative_to_its_own_text(scale):
    latents, negative = torch.randn(2, 4, 1, 3, 3), torch.randn(2, 5, 8)
    texts = [torch.randn(2, 5, 8) for _ in range(9)]
    without, words = 9 * negative.mean(dim=(1, 2)), sum(text.mean(dim=(1, 2)) for text in texts)
    expected = latents + (without + scale * (words - without))[:, None, None, None, None]
    torch.testing.assert_close(guided(Toy(), texts, negative, scale)(latents, 3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_nine_equal_texts_are_one_text(base, scale):
    text, negative = encode(base, ["a red ball", "a dog"]), encode(base, ["", ""])
    options = {"seeds": [1, 2], "guidance_scale": scale}
    expected = sample_latents(base, text, negative, **options)
    assert torch.equal(sample_latents(base, [text] * 9, negative, **options), expected)
    other = [text] * 6 + [text.flip(0)] + [text] * 2
    assert not torch.equal(sample_latents(base, other, negative, **options), expected)


def test_eight_texts_are_refused(base):
    text = encode(base, ["a"])
    with pytest.raises(UserError, match="got 8"):
        sample_latents(base, [text] * 8, text, [1])
