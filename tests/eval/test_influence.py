"""Prompt influence on a narrow random base: what is computed, not how well it does."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eval import Judge, load_judge, read_clip
from eval.influence import KINDS, InfluenceSettings, injected_videos, judged, measure_influence, text_layers
from eval.influence_page import PAPER
from eval.pairs import read_pairs, shipped_pairs
from eval.recommend import recommend
from eval.words import named
from model import UserError
from sampling import sample_videos
from train.world import WORLD_MOTIONS, WORLD_SHAPES, WORLD_TEXTURES
from weights import load_base

PROMPTS, OTHERS, SEEDS = ["a red star", "a blue heart"], ["a green moon", "a white cross"], [3, 4]
SUBJECT, MOTION = ("shape", "colour", "texture"), ("motion",)
ROWS = ["none", "0", "1", "2", "4", "6", "7", "8", "all"]


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


@pytest.mark.parametrize(("kind", "changed", "kept"), [("subject", SUBJECT, MOTION), ("motion", MOTION, SUBJECT)])
def test_the_tiny_lists_pairs_differ_in_their_kind_alone(kind, changed, kept):
    pairs = read_pairs(shipped_pairs(kind, rendered=True))
    assert len(set(pairs)) == 100
    for prompt, other in pairs:
        before, after = named(prompt), named(other)
        assert len(before) == len(after) == 5
        assert all(before[name] != after[name] for name in changed)
        assert all(before[name] == after[name] for name in (*kept, "background"))
        if after["motion"] == WORLD_MOTIONS.index("spinning") and after["shape"] == WORLD_SHAPES.index("circle"):
            assert WORLD_TEXTURES[after["texture"]] in ("striped", "dotted")  # of others nobody sees that they spin


@pytest.mark.parametrize(("kind", "shared"), [("subject", r"^an? [a-z ]+? (?=(?:on|in|by) )"), ("motion", r" is .*$")])
def test_the_lists_for_real_bases_pairs_differ_in_their_kind_alone(kind, shared):
    pairs = read_pairs(shipped_pairs(kind, rendered=False))
    assert len(set(pairs)) == 100
    for prompt, other in pairs:
        assert prompt != other
        assert re.sub(shared, "", prompt) == re.sub(shared, "", other)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", "first line must be prompt,other"),
        ("prompt,other\n", "holds no pairs"),
        ("prompt,other\na cat,a cat\n", "line 2: two different prompts"),
        ("prompt,other\na cat,a dog\na cat,\n", "line 3: two different prompts"),
        ("prompt,other\na cat\n", "line 2"),
    ],
)
def test_a_bad_list_is_refused(tmp_path, text, complaint):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_pairs(tmp_path / "pairs.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "none.csv")


def test_a_list_may_hold_commas_in_quotes(tmp_path):
    (tmp_path / "pairs.csv").write_text('prompt,other\n"a cat, sitting",a dog\n')
    assert read_pairs(tmp_path / "pairs.csv") == [("a cat, sitting", "a dog")]
    (tmp_path / "pairs.csv").write_text("prompt,other\na cat,a dog\n\n")
    assert read_pairs(tmp_path / "pairs.csv") == [("a cat", "a dog")]


def test_a_clip_is_judged_by_what_the_second_prompt_alone_names(judge):
    reading = read_clip(load_judge(judge), torch.zeros(2, 3, 2, 64, 64))
    shown = {"shape": WORLD_SHAPES.index("star"), "colour": 0, "texture": WORLD_TEXTURES.index("dotted")}
    sizes = {"shape": 7, "colour": 8, "texture": 4}
    reading = replace(reading, **{name: torch.eye(sizes[name])[[number] * 2] for name, number in shown.items()})
    before = ["a striped blue moon", "a striped blue moon"]
    # star and dotted are seen, green is not; the second pair asks for a star alone
    assert judged(reading, before, ["a dotted green star", "a striped blue star"], "subject") == [2 / 3, 1.0]
    with pytest.raises(UserError, match="names no subject"):
        judged(reading, before, ["a striped blue moon", "a cat"], "subject")


def scores_of(**rows):
    return {row.replace("_", "+").lstrip("r"): {"clip_t": values} for row, values in rows.items()}


def test_the_best_pair_of_layers_is_recommended_with_its_margin_to_the_next(base):
    scores = scores_of(none=[0, 0], r6=[3, 4], r6_2=[5, 9], r6_0=[4, 4], r6_8=[4, 6], all=[9, 9])
    advice = recommend("subject", scores, base.unet)
    assert (advice.layers, advice.row, advice.following, advice.score) == ([2, 6], "6+2", "6+8", "clip_t")
    assert advice.margin == 2
    # of two pairs of prompts a bootstrap draws one twice (half the time) or both: 1, 2 or 3
    assert advice.interval == (1, 3)


def test_a_layer_without_motion_modules_hands_over_to_the_next_as_in_the_paper(base):
    scores = scores_of(none=[0], r2=[3], r2_4=[5], r2_0=[4])
    assert recommend("motion", scores, base.unet).layers == [2, 5]
    assert recommend("subject", scores, base.unet).layers == [2, 4]
    assert recommend("subject", scores, base.unet).interval is None


def test_motions_of_the_rendered_world_are_ranked_by_their_paths(base):
    scores = {"none": {"clip_t": [0], "judge": [0]}}
    scores |= {"2+6": {"clip_t": [9], "judge": [0]}, "2+8": {"clip_t": [1], "judge": [1]}}
    assert recommend("motion", scores, base.unet).layers == [2, 8]
    assert recommend("subject", scores, base.unet).layers == [2, 6]


def test_the_papers_layers_would_be_recommended_from_its_own_table(base):
    for kind, layers in {"subject": [2, 6], "motion": [2, 5]}.items():
        printed = dict(enumerate(PAPER[kind]))
        best, *others = sorted((layer for layer in printed if layer not in (3, 5)), key=lambda i: -printed[i])
        scores = {"none": {"clip_t": [0.0]}}
        scores |= {f"{best}+{other}": {"clip_t": [printed[best] + printed[other]]} for other in others}
        assert recommend(kind, scores, base.unet).layers == layers


def test_influence_goes_on_where_it_stopped(small, judge, tmp_path, monkeypatch):
    sampled = []

    def sample(base, prompts, others, layers, *options):
        sampled.append(tuple(layers))
        if len(sampled) == 20:
            raise KeyboardInterrupt
        return torch.rand(len(prompts), 2, 3, 64, 64, generator=torch.Generator().manual_seed(sum(layers))) * 2 - 1

    monkeypatch.setattr("eval.influence.injected_videos", sample)
    settings = InfluenceSettings(out=str(tmp_path / "out"), pairs=2, judge=judge)
    with pytest.raises(KeyboardInterrupt):
        measure_influence(settings, small)
    report = measure_influence(settings, small)
    assert len(sampled) == 2 * 15 + 1  # the one that was cut off, again
    assert sampled[:9] == [(), (0,), (1,), (2,), (4,), (6,), (7,), (8,), (0, 1, 2, 4, 6, 7, 8)]
    for kind in KINDS:
        scores = json.loads((tmp_path / "out" / f"{kind}s.json").read_text())["scores"]
        assert list(scores)[:9] == ROWS
        score = "clip_t" if kind == "subject" else "judge"
        best = max(("0", "1", "2", "4", "6", "7", "8"), key=lambda row: np.mean(scores[row][score]))
        assert list(scores)[9:] == [f"{best}+{other}" for other in ROWS[1:-1] if other != best]
        assert all(len(values) == 2 for row in scores.values() for values in row.values())
    page = report.read_text()
    assert "--layers" in page
    assert page.count("data:image/png;base64,") == 4
    assert 'src="frames' not in page  # all within the file
    sampled.clear()
    measure_influence(settings, small)
    assert not sampled
    with pytest.raises(UserError, match="other settings"):
        measure_influence(replace(settings, seed=1), small)
    save_file(Judge().state_dict(), judge)
    with pytest.raises(UserError, match="networks"):
        measure_influence(settings, small)


def test_bad_settings_are_refused_before_anything_is_sampled(small, judge, tmp_path, monkeypatch):
    settings = InfluenceSettings(out=str(tmp_path / "out"), judge=judge)
    for changed in ({"pairs": 0}, {"pairs": 101}, {"pairs": 2, "batch_size": 0}, {"kinds": []}):
        with pytest.raises(UserError):
            measure_influence(replace(settings, **changed), small)
    (tmp_path / "own.csv").write_text("prompt,other\na red star,a blue star\na red star,a cat\n")
    with pytest.raises(UserError, match="'a cat' names no subject"):
        measure_influence(replace(settings, subjects=str(tmp_path / "own.csv")), small)
    wide = replace(small, recipe=replace(small.recipe, width=32))
    with pytest.raises(UserError, match="--clip"):
        measure_influence(settings, wide)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib"):
        measure_influence(settings, small)
    assert not (tmp_path / "out").exists()


def test_a_base_without_motion_modules_has_no_layers_for_motion(files, judge, tmp_path):
    image = load_base(files.folder, device="cpu")
    image.recipe = replace(image.recipe, num_frames=2, height=64, width=64)
    with pytest.raises(UserError, match="no motion modules to train"):
        measure_influence(InfluenceSettings(out=str(tmp_path / "out"), pairs=1, judge=judge), image)


def test_a_damaged_record_is_refused_by_name(small, judge, tmp_path):
    (tmp_path / "subjects.json").write_text("{}")
    with pytest.raises(UserError, match=r"subjects\.json holds scores of other settings"):
        measure_influence(InfluenceSettings(out=str(tmp_path), pairs=1, judge=judge), small)
