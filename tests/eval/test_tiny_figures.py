"""The model card's figures and prompt influence, on a narrow random base: what is computed, not how well it does."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eval import Judge, read_clip
from eval.custom import ARMS, pair, pair_prompt, reference, reference_prompt, subject_prompt, summary
from eval.demo_inputs import photos
from eval.layers import KINDS, LayersSettings, injected_videos, measure_layers, prompt_pairs, scores, text_layers
from eval.tiny import Measurement, TinySettings, confusion, measure_tiny
from model import UserError
from sampling import sample_videos
from train.vocabulary import words
from train.world import WORLD_MOTIONS, WORLD_SHAPES, caption
from weights import read_json

PROMPTS, OTHERS, SEEDS = ["a red star", "a blue heart"], ["a green moon", "a white cross"], [3, 4]


@pytest.fixture
def judge():
    return Judge().eval()


@pytest.fixture
def small(base):
    """The narrow base with clips as small as the judge reads."""
    base.recipe = replace(base.recipe, num_frames=2, height=64, width=64)
    return base


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
    if kind == "motion":
        round_ = second.shape == WORLD_SHAPES.index("circle")
        assert not (second.motion[round_] == WORLD_MOTIONS.index("spinning")).any()


def test_influence_goes_on_where_it_stopped(base, judge, tmp_path, monkeypatch):
    sampled = []

    def sample(base, prompts, others, layers, *options):
        sampled.append(tuple(layers))
        if len(sampled) == 20:
            raise KeyboardInterrupt
        return torch.zeros(len(prompts), 2, 3, 64, 64)

    monkeypatch.setattr("eval.layers.injected_videos", sample)
    settings = LayersSettings(out=str(tmp_path / "layers.json"), pairs=2, combined=[6])
    with pytest.raises(KeyboardInterrupt):
        measure_layers(settings, base, judge)
    found = measure_layers(settings, base, judge)
    rows = ["none", "0", "1", "2", "4", "6", "7", "8", *(f"6+{i}" for i in (0, 1, 2, 4, 7, 8)), "all"]
    assert {kind: list(found[kind]) for kind in found} == {"subject": rows, "motion": rows}
    assert len(sampled) == 2 * len(rows) + 1  # the one that was cut off, again
    assert sampled[:4] == [(), (0,), (1,), (2,)]
    assert sampled[-1] == (0, 1, 2, 4, 6, 7, 8)
    with pytest.raises(UserError, match="other settings"):
        measure_layers(replace(settings, seed=1), base, judge)
    with pytest.raises(UserError, match="layers with text"):
        measure_layers(replace(settings, combined=[3], out=str(tmp_path / "other.json")), base, judge)


def test_a_clip_is_scored_by_the_second_prompt(judge):
    first, second = prompt_pairs("subject", 4, seed=0)
    reading = read_clip(judge, torch.zeros(4, 3, 2, 64, 64))
    classes = {"shape": 7, "colour": 8, "texture": 4}
    one_hot = {name: torch.eye(count)[getattr(second, name)] for name, count in classes.items()}
    one_hot["colour"][1:] = torch.eye(8)[first.colour[1:]]
    found = scores(replace(reading, **one_hot), second, "subject")
    assert found == {"shape": [True] * 4, "colour": [True, False, False, False], "texture": [True] * 4}


def test_every_five_pairs_hold_each_subject_and_motion():
    assert len({pair(i) for i in range(25)}) == 25
    for start in range(0, 25, 5):
        subjects, motions = zip(*map(pair, range(start, start + 5)), strict=True)
        assert sorted(subjects) == sorted(motions) == list(range(5))


def test_prompts_are_words_of_the_vocabulary():
    for i in range(25):
        subject, motion = pair(i)
        said = " ".join([pair_prompt(subject, motion), reference_prompt(reference(motion, 0), motion)])
        assert set(said.split()) <= set(words())
        assert subject_prompt(subject).split()[1] != pair_prompt(subject, motion).split()[3]


def test_photos_show_the_subject_alone():
    frames, masks = photos(2, 64, seed=0)
    assert frames.shape == (4, 3, 64, 64)
    assert masks.shape == (4, 1, 64, 64)
    assert (masks.mean(dim=(1, 2, 3)) > 0.02).all()


def test_differences_are_taken_pair_by_pair():
    scores = {arm: {"identity": [0.1 * i, 0.1 * i], "path_error": [0.5, 0.7]} for i, arm in enumerate(ARMS)}
    shifted = {arm: {"identity": [v + 0.3 for v in s["identity"]], "path_error": [0.2]} for arm, s in scores.items()}
    found = summary({"0-0": scores, "1-1": shifted})
    assert found["means"]["both"]["identity"] == pytest.approx(0.45)
    assert found["means"]["base"]["path_error"] == pytest.approx(0.4)
    row = found["differences"]["both+ttt - base"]["identity"]
    assert row["mean"] == pytest.approx(0.4)
    assert row["interval"] == pytest.approx((0.4, 0.4))  # the pairs' own levels cancel


def test_confusion_counts_what_was_seen():
    assert confusion([(11, 10), (0, 0), (11, 11), (11, 10)]) == {
        "moving left": {"moving left": 1},
        "resting": {"spinning": 2, "resting": 1},
    }


def test_figures_are_measured_once(small, judge, tmp_path):
    settings = TinySettings(out=str(tmp_path), parts=["vae", "prompts"], quick=True, batch_size=1)
    found = measure_tiny(Measurement(settings, small, judge))["parts"]
    assert set(found) == {"vae", "prompts"}
    assert found["vae"]["frames"] == 16
    assert found["prompts"]["clips"] == len(found["prompts"]["answers"]) == 2
    assert (tmp_path / "prompts-000.png").is_file()
    assert read_json(tmp_path / "figures.json")["parts"] == found
    small.vae = None  # nothing is measured again
    assert measure_tiny(Measurement(settings, small, judge))["parts"] == found
    with pytest.raises(UserError, match="other settings"):
        Measurement(replace(settings, seed=1), small, judge)


def test_psnr_is_that_of_the_pixels(small, judge, tmp_path, monkeypatch):
    class Offset(type(small.vae)):
        def encode_latents(self, videos, chunk):
            self.seen = videos
            return type("Latents", (), {"mean": videos})

        def decode_latents(self, latents, chunk):
            return latents + 0.02

    small.vae.__class__ = Offset
    found = measure_tiny(Measurement(TinySettings(out=str(tmp_path), parts=["vae"], quick=True), small, judge))
    assert found["parts"]["vae"]["psnr"] == pytest.approx(40, abs=0.01)  # 20 log10(2 / 0.02)
    assert found["parts"]["vae"]["psnr_subject"] == pytest.approx(40, abs=0.01)


def test_clip_chooses_among_captions_that_all_differ(small, judge, tmp_path, monkeypatch):
    class Clip:
        """Right but for the first frame of each group."""

        config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))

        def __call__(self, input_ids, pixel_values):
            assert len(set(map(tuple, input_ids.tolist()))) == len(input_ids) == len(pixel_values) == 32
            logits = torch.eye(32)
            logits[0] = logits[1]
            return SimpleNamespace(logits_per_image=logits)

        def float(self):
            return self

        eval = float

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("eval.tiny.CLIPModel.from_pretrained", lambda folder, local_files_only: Clip())
    settings = TinySettings(out=str(tmp_path), parts=["clip"], quick=True, clip=str(tmp_path))
    found = measure_tiny(Measurement(settings, small, judge))["parts"]["clip"]
    assert found["image_to_caption"] == 31 / 32


def test_customisation_goes_through_all_arms(small, judge, tmp_path):
    settings = TinySettings(out=str(tmp_path), parts=["custom"], quick=True, pairs=1, seeds=1)
    small.recipe = replace(small.recipe, sampling_steps=1, reference_steps=1)
    found = measure_tiny(Measurement(settings, small, judge))["parts"]["custom"]
    assert list(found["pairs"]) == ["0-0"]
    assert list(found["pairs"]["0-0"]) == list(ARMS)
    assert (tmp_path / "custom" / "pair-0-0.png").is_file()


def test_an_unknown_part_is_refused(small, judge, tmp_path):
    with pytest.raises(UserError, match="parts are vae, clip"):
        Measurement(TinySettings(out=str(tmp_path), parts=["sound"]), small, judge)


def test_captions_of_pairs_differ():
    first, second = prompt_pairs("motion", 5, seed=1)
    assert all(caption(first, i) != caption(second, i) for i in range(5))
