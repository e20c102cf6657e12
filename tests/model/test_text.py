"""The text encoder against transformers', and learned tokens."""

import pytest
import torch
from oracles import error, randomise
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
    before = encoder(tokens)
    old = encoder.clip.embeddings.token_embedding.weight.clone()
    numbers = encoder.add_token(torch.stack([old[7], torch.ones(64)]))
    assert numbers == [60, 61]
    assert torch.equal(encoder.clip.embeddings.token_embedding.weight[:60], old)
    assert torch.equal(encoder(tokens), before)
    with_seven, with_learned = tokens.clone(), tokens.clone()
    with_seven[0, 3], with_learned[0, 3] = 7, numbers[0]
    assert torch.equal(encoder(with_seven), encoder(with_learned))


def test_a_learned_token_of_another_width_is_refused(encoder):
    with pytest.raises(UserError, match="64"):
        encoder.add_token(torch.zeros(1, 768))
