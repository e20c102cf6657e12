"""The text encoder against transformers', and learned tokens."""

import pytest
import torch
from oracles import error, randomise
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from model import TextConfig, TextEncoder, UserError

CONFIG = TextConfig(vocab_size=60, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)


@pytest.fixture
def encoder():
    return randomise(TextEncoder(CONFIG)).eval().requires_grad_(False)


def test_the_full_encoder_has_its_parameters():
    with torch.device("meta"):
        encoder = TextEncoder(TextConfig())
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480
    assert len(encoder.clip.state_dict()) == 196


def test_embeddings_are_the_last_normed_hidden_state(encoder):
    reference = CLIPTextModel(
        CLIPTextConfig(vocab_size=60, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    ).eval()
    reference.load_state_dict(encoder.clip.state_dict())
    tokens = torch.randint(0, 60, (2, 77))
    with torch.no_grad():
        hidden = reference(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        assert error(encoder(tokens), reference.final_layer_norm(hidden)) < 1e-5


def test_text_is_causal(encoder):
    tokens = torch.randint(0, 60, (1, 10))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 60
    assert torch.equal(encoder(tokens)[:, :-1], encoder(changed)[:, :-1])


def test_a_learned_token_is_reached_by_its_number_and_moves_nothing_else(encoder):
    tokens = torch.randint(0, 60, (1, 10))
    before, table = encoder(tokens), encoder.clip.embeddings.token_embedding
    old = table.weight.clone()
    with encoder.learned(torch.stack([old[7], torch.ones(64)])) as numbers, encoder.learned(old[[9]]) as more:
        assert (numbers, more) == ([60, 61], [62])
        assert torch.equal(encoder(tokens), before)
        for number, same in ((60, 7), (62, 9)):
            with_known, with_learned = tokens.clone(), tokens.clone()
            with_known[0, 3], with_learned[0, 3] = same, number
            assert torch.equal(encoder(with_known), encoder(with_learned))
        with_learned[0, 3] = 61
        assert error(encoder(with_learned), before) > 1e-2
    assert encoder.clip.embeddings.token_embedding is table
    assert torch.equal(table.weight, old)


def test_gradients_reach_a_learned_token_alone(encoder):
    """Against finite differences along one direction."""
    encoder.double()
    vectors = nn.Parameter(torch.randn(2, 64, dtype=torch.double))
    direction = torch.randn(2, 64, dtype=torch.double)

    def loss(vectors):
        with encoder.learned(vectors):
            return encoder(torch.tensor([[58, 3, 60, 61, 3, 60, 59]])).square()[:, :, 0].sum()

    loss(vectors).backward()
    step = 1e-5
    slope = (loss(vectors.data + step * direction) - loss(vectors.data - step * direction)) / (2 * step)
    assert torch.isclose((vectors.grad * direction).sum(), slope, rtol=1e-6)
    assert all(p.grad is None for p in encoder.parameters())


def test_a_learned_token_of_another_width_is_refused(encoder):
    with pytest.raises(UserError, match="64"), encoder.learned(torch.zeros(1, 768)):
        pass
