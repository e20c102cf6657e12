"""All scores of clips in one go: against each measure by itself, on clips whose truth is known."""

import warnings
from dataclasses import replace

import pytest
import torch
from one_scene import scenes_of

from eval import identity, load_judge, path_error, read_clip
from eval.clip import clip_i, clip_t, load_clip, temporal_consistency
from eval.distances import clip_distance, diversity, frame_distance
from eval.fidelity import motion_fidelity, moving, published_fidelity
from eval.scoring import Scorers, ScorerSettings, described, open_scorers, score_clips, score_diversity
from eval.tracks import Tracks
from model import UserError
from train.world import render


def clip_of(shape="square", texture="plain", colour="blue", background="sand", motion="moving right", seed=0):
    return render(scenes_of(1, shape, texture, colour, background, motion, seed=seed))[0][0].transpose(0, 1)


def tracked(video):
    """A stand-in for a tracker: the centroid of what differs from the mean frame, and a point that stands still."""
    frames, _, height, width = video.shape
    weight = (video - video.mean(dim=0, keepdim=True)).abs().sum(dim=1) + 1e-6
    total = weight.sum(dim=(1, 2))
    x = (weight.sum(dim=1) * torch.arange(width)).sum(dim=1) / total
    y = (weight.sum(dim=2) * torch.arange(height)).sum(dim=1) / total
    points = torch.stack([torch.stack([x, y], dim=-1), torch.zeros(frames, 2)])
    return Tracks(points, torch.ones(2, frames, dtype=torch.bool))


@pytest.fixture(scope="module")
def scorers() -> Scorers:
    return replace(open_scorers(ScorerSettings(device="cpu")), tracker=tracked, tracker_name="stand-in")


PROMPT = "a dotted red star over the road"


def test_numbers_are_those_of_each_measure_by_itself(scorers):
    reference = clip_of()
    videos = [clip_of("star", "dotted", "red", "road", "circling clockwise", i) for i in range(3)]
    images = torch.stack([clip_of("star", "dotted", "red", "snow", seed=i)[0] for i in range(2)])
    clip, judge = load_clip(), load_judge()
    photos, text = clip.images(images), clip.texts([PROMPT])[0]
    shown = read_clip(judge, images.transpose(0, 1)[None]).masks[0].transpose(0, 1)
    path = read_clip(judge, reference.transpose(0, 1)[None]).path
    for video, found in zip(videos, score_clips(scorers, videos, [PROMPT] * 3, images, reference), strict=True):
        features, seen = clip.images(video), read_clip(judge, video.transpose(0, 1)[None])
        ours, theirs = tracked(video), tracked(reference)
        expected = {
            "clip_t": clip_t(features, text),
            "clip_i": clip_i(features, photos),
            "temporal_consistency": temporal_consistency(features),
            "frame_distance": frame_distance(video, clip_distance(clip)),
            "motion_fidelity": motion_fidelity(moving(ours), moving(theirs)),
            "published_fidelity": published_fidelity(ours, theirs, 1e-8),
            "identity": identity(video.transpose(0, 1)[None], seen.masks, images, shown).item(),
            "path_error": path_error(seen.path, path).item(),
        }
        expected |= {f"leak_{name}": 0.0 for name in ("shape", "colour", "texture", "background")}
        assert {k: v for k, v in found.items() if k != "chance"} == pytest.approx(expected, abs=1e-5)
        assert set(found) <= set(described(scorers))
    assert score_diversity(scorers, videos, [PROMPT] * 3) == {
        PROMPT: pytest.approx(diversity(videos, clip_distance(clip)), abs=1e-5)
    }


def test_a_clip_against_itself(scorers):
    video = clip_of()
    (found,) = score_clips(scorers, [video], [PROMPT], video[:1], video)
    assert found["motion_fidelity"] == pytest.approx(1)
    assert found["path_error"] == pytest.approx(0, abs=1e-5)
    assert found["identity"] > 0.9
    assert {name: value for name, value in found.items() if "leak" in name} == dict.fromkeys(
        ["leak_shape", "leak_colour", "leak_texture", "leak_background"], 1.0
    )


def test_what_leaks_by_rendered_clips(scorers):
    reference = clip_of("square", "plain", "blue", "sand")
    found = score_clips(
        scorers,
        [clip_of("star", "dotted", "red", "sand"), clip_of("star", "dotted", "blue", "road"), clip_of("square")],
        ["a dotted red star over the road", "a zor is dax", "a plain blue square"],
        None,
        reference,
    )
    leaked = [{name: value for name, value in row.items() if "leak" in name} for row in found]
    assert leaked == [
        {"leak_shape": 0, "leak_colour": 0, "leak_texture": 0, "leak_background": 1},
        {"leak_shape": 0, "leak_colour": 1, "leak_texture": 0},
        {},
    ]
    # the photos' subject is as blue as the reference's: its colour says nothing
    blue = clip_of("star", "dotted", "blue", "snow")[:2]
    (row,) = score_clips(scorers, [clip_of("star", "dotted", "blue", "road")], ["a zor is dax"], blue, reference)
    assert {name for name in row if "leak" in name} == {"leak_shape", "leak_texture"}


def test_loveu_takes_all_pairs_and_a_hundredfold(scorers):
    video = clip_of()
    features, text = scorers.clip.images(video), scorers.clip.texts([PROMPT])[0]
    loveu = replace(scorers, protocol="loveu")
    (found,) = score_clips(loveu, [video], [PROMPT])
    assert found["clip_t"] == pytest.approx(100 * clip_t(features, text), abs=1e-3)
    assert found["temporal_consistency"] == pytest.approx(temporal_consistency(features, "all"), abs=1e-5)
    assert found["frame_distance"] == pytest.approx(1 - temporal_consistency(features), abs=1e-5)
    assert "LOVEU" in described(loveu)["clip_t"]
    assert "DreamVideo" in described(scorers)["clip_t"]


def test_other_lengths_and_sizes_do_not_disturb_each_other(scorers):
    reference, long = clip_of(), clip_of("star", seed=1)
    short, large = long[:9], long.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    with pytest.warns(UserWarning, match=r"small has 9 frames and the reference 16: the first 9") as said:
        both = score_clips(scorers, [long, short], ["", ""], None, reference, ["long", "small"])
    assert len(said) == 1
    with pytest.warns(UserWarning, match=r"small and 1 more have 9 frames") as said:
        score_clips(scorers, [short, short], ["", ""], None, reference, ["small", "too"])
    assert len(said) == 1
    assert both[0] == score_clips(scorers, [long], [""], None, reference)[0]
    assert both[1] == score_clips(scorers, [short], [""], None, reference[:9])[0]
    assert "clip_t" not in both[0]
    mixed = score_clips(replace(scorers, batch_size=5), [long, large, short], [PROMPT] * 3)
    for video, row in zip([long, large, short], mixed, strict=True):
        assert row == pytest.approx(score_clips(scorers, [video], [PROMPT])[0], abs=1e-5)


def test_a_clip_that_stands_still_has_no_motion_fidelity_and_does_not_stop_the_others(scorers):
    still = clip_of(motion="resting")
    with pytest.warns(UserWarning, match="statue has no motion fidelity"):
        rows = score_clips(scorers, [still, clip_of()], ["", ""], None, clip_of(), ["statue", "other"])
    assert not {"motion_fidelity", "chance", "published_fidelity"} & set(rows[0])
    assert rows[1]["motion_fidelity"] == pytest.approx(1)
    assert rows[0]["path_error"] > 0.2
    with pytest.raises(UserError, match="nothing moves in the reference"):
        score_clips(scorers, [clip_of()], [""], None, still)
    with pytest.warns(UserWarning, match=r"\[eval\]"):
        (row,) = score_clips(replace(scorers, tracker=None), [clip_of()], [""], None, clip_of())
    assert "path_error" in row
    assert "motion_fidelity" not in row


def test_the_world_is_left_alone_where_it_is_not(scorers):
    large = torch.rand(3, 3, 80, 96) * 2 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = score_clips(scorers, [large], [PROMPT], large[:1])
    assert set(row) == {"clip_t", "clip_i", "temporal_consistency", "frame_distance"}
    with pytest.raises(UserError, match="the judge reads"):
        score_clips(replace(scorers, world=True), [large], [PROMPT])
    with pytest.warns(UserWarning, match="no path error and no leaks"):
        (row,) = score_clips(scorers, [clip_of()], [PROMPT], None, clip_of().repeat_interleave(2, dim=-1))
    assert not {"path_error", "leak_shape"} & set(row)
    assert open_scorers(ScorerSettings(device="cpu", world=False)).judge is None


def test_lpips_in_place_of_clips_distance(scorers):
    def brightness(frames, others):
        return (frames - others).mean(dim=(1, 2, 3)).abs()

    videos = [clip_of(seed=i) for i in range(2)]
    other = replace(scorers, distance=brightness, distance_name="brightness", by_features=False)
    rows = score_clips(other, videos, ["a", "a"])
    assert [row["frame_distance"] for row in rows] == [
        pytest.approx(frame_distance(video, brightness)) for video in videos
    ]
    assert score_diversity(other, videos, ["a", "a"])["a"] == pytest.approx(diversity(videos, brightness))
    assert score_diversity(other, videos, ["a", "b"]) == {}
    assert "brightness" in described(other)["frame_distance"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tracker": "cotracker"}, "scaled_offline"),
        ({"tracker_weights": "x.pth"}, "say --tracker cotracker"),
        ({"batch_size": 0}, "batch_size"),
        ({"still": -1.0}, "still"),
        ({"clip": "nowhere"}, "nowhere"),
        ({"lpips": "nowhere.pth"}, "nowhere"),
        ({"judge": "nowhere.safetensors"}, "nowhere"),
    ],
)
def test_bad_settings_are_named(flags, said):
    with pytest.raises(UserError, match=said):
        open_scorers(ScorerSettings(device="cpu", **flags))


def test_clips_that_cannot_be_scored(scorers):
    for videos, prompts in (([], []), ([clip_of()], []), ([clip_of()[:1]], [""]), ([clip_of()[0]], [""])):
        with pytest.raises(UserError):
            score_clips(scorers, videos, prompts)
