"""Prompt influence on a narrow random base: what is computed, not how well it does."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from eval import Judge, load_judge, read_clip
from eval.layers import KINDS, LayersSettings, injected_videos, measure_layers, prompt_pairs, scores, text_layers
from model import UserError
from sampling import sample_videos
from train.world import WORLD_MOTIONS, WORLD_SHAPES, WORLD_TEXTURES, caption

PROMPTS, OTHERS, SEEDS = ["a red star", "a blue heart"], ["a green moon", "a white cross"], [3, 4]


def clips(base, layers, others=OTHERS):
    return injected_videos(base, PROMPTS, others, layers, SEEDS, 3, 7.0)


def test_the_same_words_change_nothing(base):
    assert torch.equal(clips(base, [0, 2, 6], PROMPTS), clips(base, []))


def test_no_layer_injected_is_the_sampler(base):
    expected = sample_videos(base, PROMPTS, SEEDS, steps=3, guidance_scale=7.0)
    torch.testing.assert_close(clips(base, []), expected, atol=1e-5, rtol=0)


def test_all_layers_injected_is_the_other_prompt(base):
    expected = sample_videos(base, OTHERS, SEEDS, steps=3, guidance_scale=7.0)
    torch.testing.assert_close(clips(base, text_layers(base.unet)), expected, atol=1e-5, rtol=0)


def test_layers_3_and_5_have_no_text(base):
    assert text_layers(base.unet) == [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(clips(base, [3, 5]), clips(base, []))
    assert not torch.equal(clips(base, [6]), clips(base, []))


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_differ_in_their_kind_alone(kind):
    first, second = prompt_pairs(kind, 30, seed=0)
    assert len(first) == len(second) == 30
    for name in ("shape", "colour", "texture", "motion"):
        assert ((getattr(first, name) == getattr(second, name)) == (name not in KINDS[kind])).all()
    assert torch.equal(first.background, second.background)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_found_and_never_ask_for_what_nobody_sees(kind):
    asked = set()
    for seed in range(60):
        second = prompt_pairs(kind, 1, seed)[1]
        assert len(second) == 1
    for seed in range(3):
        second = prompt_pairs(kind, 400, seed)[1]
        asked |= set(zip(second.shape.tolist(), second.texture.tolist(), second.motion.tolist(), strict=True))
    circle, spinning = WORLD_SHAPES.index("circle"), WORLD_MOTIONS.index("spinning")
    textures = {WORLD_TEXTURES[texture] for shape, texture, motion in asked if (shape, motion) == (circle, spinning)}
    assert textures <= {"striped", "dotted"}


def test_influence_goes_on_where_it_stopped(small, judge, tmp_path, monkeypatch):
    sampled = []

    def sample(base, prompts, others, layers, *options):
        sampled.append(tuple(layers))
        if len(sampled) == 20:
            raise KeyboardInterrupt
        return torch.zeros(len(prompts), 2, 3, 64, 64)

    monkeypatch.setattr("eval.layers.injected_videos", sample)
    settings = LayersSettings(out=str(tmp_path / "layers.json"), pairs=2, combined=[6], judge=judge)
    with pytest.raises(KeyboardInterrupt):
        measure_layers(settings, small)
    found = measure_layers(settings, small)
    rows = ["none", "0", "1", "2", "4", "6", "7", "8", *(f"6+{i}" for i in (0, 1, 2, 4, 7, 8)), "all"]
    assert {kind: list(found[kind]) for kind in found} == {"subject": rows, "motion": rows}
    assert len(sampled) == 2 * len(rows) + 1  # the one that was cut off, again
    assert sampled[:4] == [(), (0,), (1,), (2,)]
    assert sampled[-1] == (0, 1, 2, 4, 6, 7, 8)
    with pytest.raises(UserError, match="other settings"):
        measure_layers(replace(settings, seed=1), small)
    with pytest.raises(UserError, match="layers with text"):
        measure_layers(replace(settings, combined=[3], out=str(tmp_path / "other.json")), small)
    save_file(Judge().state_dict(), judge)
    with pytest.raises(UserError, match="another base or judge"):
        measure_layers(settings, small)
    small.recipe = replace(small.recipe, width=32)
    with pytest.raises(UserError, match="32x64"):
        measure_layers(settings, small)


def test_a_clip_is_scored_by_the_second_prompt(judge):
    first, second = prompt_pairs("subject", 4, seed=0)
    reading = read_clip(load_judge(judge), torch.zeros(4, 3, 2, 64, 64))
    classes = {"shape": 7, "colour": 8, "texture": 4}
    one_hot = {name: torch.eye(count)[getattr(second, name)] for name, count in classes.items()}
    one_hot["colour"][1:] = torch.eye(8)[first.colour[1:]]
    found = scores(replace(reading, **one_hot), second, "subject")
    assert found == {"shape": [True] * 4, "colour": [True, False, False, False], "texture": [True] * 4}


def test_captions_of_pairs_differ():
    first, second = prompt_pairs("motion", 5, seed=1)
    assert all(caption(first, i) != caption(second, i) for i in range(5))
