"""The model card's figures on a narrow random base: what is computed, not how well it does."""

import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from eval import Judge
from eval.custom import ARMS, STILL, pair, pair_prompt, reference, reference_prompt, subject_prompt, summary
from eval.demo_inputs import photos
from eval.tiny import PARTS, FiguresSettings, Measurement, confusion, measure_tiny, table
from model import UserError
from sampling.generate import loaded_loras
from train.vocabulary import words
from train.world import BACKGROUNDS, COLOURS, HELD_OUT_SUBJECTS
from weights import load_base, read_json, sha256


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
    first, second = (torch.tensor(COLOURS[name])[:, None] for name in HELD_OUT_SUBJECTS[2][2:])
    grounds = set()
    for frame, mask in zip((frames + 1) / 2, masks[:, 0], strict=True):
        inside, outside = frame[:, mask > 0.99], frame[:, mask == 0]
        share = ((inside - first) * (second - first)).sum(dim=0) / (second - first).square().sum()
        torch.testing.assert_close(inside, first + share.clamp(0, 1) * (second - first), atol=0.01, rtol=0)
        # no trail, no other subject: beyond the outline lies one ground, but for its own waves and shades
        off = {name: (outside - torch.tensor(c)[:, None]).abs().max().item() for name, c in BACKGROUNDS.items()}
        grounds.add(min(off, key=off.get))
        assert min(off.values()) < 0.25
    assert len(grounds) == 4


def test_differences_are_taken_pair_by_pair():
    scores = {arm: {"identity": [0.1 * i, 0.1 * i], "path_error": [0.5, 0.7]} for i, arm in enumerate(ARMS)}
    shifted = {arm: {"identity": [v + 0.3 for v in s["identity"]], "path_error": [0.2]} for arm, s in scores.items()}
    scores[STILL], shifted[STILL] = {"path_error": [0.4]}, {"path_error": [0.5]}
    found = summary({"0-0": scores, "1-1": shifted})
    assert found["means"]["both"]["identity"] == pytest.approx(0.45)
    assert found["means"]["base"]["path_error"] == pytest.approx(0.4)
    row = found["differences"]["both+ttt - base"]["identity"]
    assert row["mean"] == pytest.approx(0.4)
    assert row["interval"] == pytest.approx((0.4, 0.4))  # the pairs' own levels cancel
    assert found["means"][STILL] == {"path_error": pytest.approx(0.45)}
    assert "standing still           path_error 0.450" in table({"custom": found})
    alone = summary({"0-0": scores})
    assert alone["differences"]["both+ttt - base"]["identity"]["interval"] is None
    assert "both+ttt - base          identity +0.400\n" in table({"custom": alone})


def test_confusion_counts_what_was_seen():
    assert confusion([(11, 10), (0, 0), (11, 11), (11, 10)]) == {
        "moving left": {"moving left": 1},
        "resting": {"spinning": 2, "resting": 1},
    }


def test_figures_are_measured_once(small, judge, tmp_path):
    settings = FiguresSettings(out=str(tmp_path), parts=["vae", "prompts"], quick=True, batch_size=1, judge=judge)
    figures = measure_tiny(Measurement(settings, small))
    found = figures["parts"]
    assert figures["judge"] == sha256(judge)
    assert set(found) == {"vae", "prompts"}
    assert found["vae"]["frames"] == 16
    assert found["prompts"]["clips"] == len(found["prompts"]["answers"]) == 2
    assert (tmp_path / "prompts-000.png").is_file()
    assert read_json(tmp_path / "figures.json")["parts"] == found
    small.vae = None  # nothing is measured again
    assert measure_tiny(Measurement(settings, small))["parts"] == found
    with pytest.raises(UserError, match="other settings"):
        Measurement(replace(settings, seed=1), small)


def test_figures_of_two_judges_or_clips_are_not_mixed(small, judge, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    settings = FiguresSettings(out=str(tmp_path), parts=[], judge=judge, clip=str(tmp_path))
    Measurement(settings, small).save()
    Measurement(settings, small)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    with pytest.raises(UserError, match="judge or CLIP"):
        Measurement(settings, small)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    save_file(Judge().state_dict(), judge)
    with pytest.raises(UserError, match="judge or CLIP"):
        Measurement(settings, small)
    (tmp_path / "figures.json").write_text("[]")
    with pytest.raises(UserError, match="judge or CLIP"):
        Measurement(settings, small)


def test_psnr_is_that_of_the_pixels(small, judge, tmp_path):
    class Offset(type(small.vae)):
        def encode_latents(self, videos):
            return SimpleNamespace(mean=videos, std=videos)

        def decode_latents(self, latents):
            return latents + 0.02

    small.vae.__class__ = Offset
    found = measure_tiny(Measurement(FiguresSettings(out=str(tmp_path), parts=["vae"], quick=True), small))
    assert found["parts"]["vae"]["psnr"] == pytest.approx(40, abs=0.01)  # 20 log10(2 / 0.02)
    assert found["parts"]["vae"]["psnr_subject"] == pytest.approx(40, abs=0.01)


def test_a_base_in_half_precision_is_measured_as_well(small, judge, files, tmp_path):
    """On a GPU the UNet is in bfloat16 and the autoencoder in float32; what it does to frames must not change."""
    half = load_base(files.folder, files.adapter, device="cpu", dtype=torch.bfloat16)
    half.recipe = replace(small.recipe, sampling_steps=1)
    assert (half.dtype, half.vae.dtype) == (torch.bfloat16, torch.float32)
    settings = FiguresSettings(out=str(tmp_path / "half"), parts=["judge", "vae", "prompts"], quick=True, judge=judge)
    found = measure_tiny(Measurement(settings, half))["parts"]
    whole = replace(settings, out=str(tmp_path / "whole"), parts=["judge", "vae"])
    expected = measure_tiny(Measurement(whole, small))["parts"]
    assert found["vae"] == pytest.approx(expected["vae"], rel=1e-4)
    assert found["judge"] == pytest.approx(expected["judge"], rel=1e-3)
    assert found["prompts"]["clips"] == found["judge"]["clips"] == 2


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
    settings = FiguresSettings(out=str(tmp_path), parts=["clip"], quick=True, clip=str(tmp_path))
    found = measure_tiny(Measurement(settings, small))["parts"]["clip"]
    assert found["image_to_caption"] == 31 / 32


def test_customisation_goes_through_all_arms(small, judge, tmp_path, monkeypatch):
    loaded = []

    @contextmanager
    def recorded(base, loras):
        loaded.append(loras)
        with loaded_loras(base, loras):
            yield

    monkeypatch.setattr("eval.custom.loaded_loras", recorded)
    settings = FiguresSettings(out=str(tmp_path), parts=["custom"], quick=True, pairs=1, seeds=1, judge=judge)
    small.recipe = replace(small.recipe, sampling_steps=1, reference_steps=1)
    found = measure_tiny(Measurement(settings, small))["parts"]["custom"]
    looks, moves, both = (str(tmp_path / "custom" / name) for name in ("appearance-0", "motion-0", "ttt-0-0"))
    assert loaded == [[], [looks], [moves], [looks, moves], [both]]
    assert ARMS == ("base", "appearance", "motion", "both", "both+ttt")
    assert list(found["pairs"]) == ["0-0"]
    scores = found["pairs"]["0-0"]
    assert list(scores) == [*ARMS, STILL]
    for arm in ARMS:
        assert set(scores[arm]) == set(found["means"][arm]) == {"identity", "path_error", "background", "seen"}
        assert all(len(numbers) == 1 and math.isfinite(numbers[0]) for numbers in scores[arm].values())
    assert (tmp_path / "custom" / "pair-0-0.png").is_file()


def test_the_judge_comes_first():
    assert PARTS == ("judge", "vae", "clip", "prompts", "custom", "speed")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"parts": ["sound"]}, "parts are judge, vae"),
        ({"batch_size": 0}, "batch_size must be at least 1, and is 0"),
        ({"prompts": 0}, "prompts must be at least 1, and is 0"),
        ({"seeds": -1}, "seeds must be at least 1, and is -1"),
        ({"pairs": 0}, "pairs must be from 1 to 25, and is 0"),
        ({"pairs": 26}, "pairs must be from 1 to 25, and is 26"),
    ],
)
def test_settings_out_of_range_are_refused(small, tmp_path, wrong, words):
    with pytest.raises(UserError, match=words):
        Measurement(FiguresSettings(out=str(tmp_path), **wrong), small)


def test_clips_that_the_judge_cannot_read_are_refused_at_once(base, tmp_path):
    with pytest.raises(UserError, match="32x32 pixels"):
        Measurement(FiguresSettings(out=str(tmp_path)), base)
