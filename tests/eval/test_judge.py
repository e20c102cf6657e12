"""The judge, on random weights and on true masks; paths and likeness by closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from eval import Judge, crossed_interval, identity, load_judge, path_error, read_clip
from eval.judge import (
    JudgeSettings,
    clip_tracks,
    judge_accuracy,
    mirrored_motions,
    strange_scenes,
    train_judge,
    worn,
)
from eval.measures import colour_histogram, placement, silhouette_overlap
from eval.reading import read_path, tracks
from model import UserError
from sampling import derived_seed
from train.world import (
    HELD_OUT_SUBJECTS,
    MOTIONS,
    TEXTURES,
    WORLD_MOTIONS,
    held_out_scenes,
    make_scenes,
    random_scenes,
    render,
)


def of(names, name):
    return torch.tensor([list(names).index(name)])


def one_scene(motion, seed=0, shape=3, texture="striped"):
    generator = torch.Generator().manual_seed(seed)
    looks = (torch.tensor([shape]), of(TEXTURES, texture), torch.tensor([0]), None, torch.tensor([5]))
    return make_scenes(*looks, of(MOTIONS, motion), generator)


def still(subject, background, seed=0):
    now = torch.zeros(1, 1)
    scenes = held_out_scenes(subject, "resting", background, 1, torch.Generator().manual_seed(seed), now)
    return tuple(t[:, :, 0] for t in render(scenes))


def test_judge_is_small():
    assert sum(p.numel() for p in Judge().parameters()) <= 150_000


def test_centroid_and_size_of_a_rectangle():
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, 0, 10:20, 30:50] = 1
    x, y, size = placement(mask)[0].tolist()
    assert x == pytest.approx(40 / 64 - 0.5)
    assert y == pytest.approx(15 / 64 - 0.5)
    assert size == pytest.approx(math.sqrt(200) / 64)
    assert placement(mask)[1].tolist() == [0, 0, 0]


def test_centroid_matches_a_count_over_pixels():
    _, masks = render(random_scenes(3, torch.Generator().manual_seed(1)))
    for mask, found in zip(masks[:, :, 4], placement(masks[:, :, 4]).tolist(), strict=True):
        pixels = [(x, y, v) for y, row in enumerate(mask[0].tolist()) for x, v in enumerate(row) if v > 0.3]
        total = sum(v for _, _, v in pixels)
        assert found[0] == pytest.approx(sum((x + 0.5) / 64 * v for x, _, v in pixels) / total - 0.5, abs=1e-5)
        assert found[1] == pytest.approx(sum((y + 0.5) / 64 * v for _, y, v in pixels) / total - 0.5, abs=1e-5)


def test_true_masks_give_the_true_path():
    scenes = one_scene("circling clockwise", shape=0)  # a circle: its centroid is where the scene has it
    path, _ = read_path(*render(scenes))
    torch.testing.assert_close(path[..., :2], scenes.path[..., :2], atol=0.004, rtol=0)


def test_spinning_turns_and_moving_does_not():
    turning = {
        motion: read_path(*render(one_scene(motion)))[1].mean().item()
        for motion in ("spinning", "resting", "moving left", "growing")
    }
    assert turning["spinning"] > 3 * max(turning["moving left"], turning["growing"])
    assert turning["resting"] < 1e-3


def test_a_clip_is_read_frame_by_frame():
    judge = Judge().eval()
    videos, _ = render(random_scenes(2, torch.Generator().manual_seed(0)))
    clip = read_clip(judge, videos)
    frames = torch.stack([judge(videos[:, :, i]).shape.softmax(-1) for i in range(16)]).mean(0)
    torch.testing.assert_close(clip.shape, frames, atol=1e-5, rtol=1e-4)
    assert clip.masks.shape == (2, 1, 16, 64, 64)
    assert clip.path.shape == (2, 16, 3)
    assert clip.turning.shape == (2, 15)
    for name, count in {"shape": 7, "colour": 8, "texture": 4, "background": 6, "motion": 12}.items():
        assert getattr(clip, name).shape == (2, count)
        torch.testing.assert_close(getattr(clip, name).sum(1), torch.ones(2))


@pytest.mark.parametrize("shape", [(3, 16, 64, 64), (1, 3, 16, 32, 32), (1, 3, 1, 64, 64), (1, 4, 16, 64, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(UserError, match=r"\(n, 3, f, 64, 64\)"):
        read_clip(Judge(), torch.zeros(shape))


def test_where_a_path_lies_says_nothing_of_its_motion():
    path, turning = torch.rand(2, 16, 3) + 0.1, torch.rand(2, 15)
    moved = path.clone()
    moved[..., 0] += 0.2
    moved[..., 2] *= 1.5
    torch.testing.assert_close(tracks(moved, turning), tracks(path, turning), atol=1e-5, rtol=1e-4)


def test_mirror_swaps_left_and_right():
    mirrored = [WORLD_MOTIONS[i] for i in mirrored_motions()]
    assert dict(zip(WORLD_MOTIONS, mirrored, strict=True)) == {name: name for name in WORLD_MOTIONS} | {
        "moving left": "moving right",
        "moving right": "moving left",
        "circling clockwise": "circling counterclockwise",
        "circling counterclockwise": "circling clockwise",
    }


def test_masks_train_on_every_shape_and_texture():
    scenes = strange_scenes(150, torch.Generator().manual_seed(0), torch.zeros(150, 1))
    assert len(scenes.shape.unique()) == 12
    assert len(scenes.texture.unique()) == 8
    frames = worn(render(scenes[:8])[0][:, :, 0], torch.Generator().manual_seed(0))
    assert frames.abs().max() <= 1


def test_training_writes_a_judge_that_loads(tmp_path):
    file = tmp_path / "judge.safetensors"
    trained = train_judge(JudgeSettings(out=str(file), steps=2, batch_size=16, clips=2, motion_steps=2))
    loaded = load_judge(file)
    assert file.stat().st_size < 320_000
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name])
    assert not loaded.training
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    sizes = {"steps": 2, "batch_size": 16, "clips": 2, "motion_steps": 2}
    whole = train_judge(JudgeSettings(out=str(tmp_path / "whole.safetensors"), **sizes))
    parts = JudgeSettings(out=str(tmp_path / "parts.safetensors"), **sizes)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("eval.judge.clip_tracks", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_judge(parts)
    assert not (tmp_path / "parts.safetensors").exists()
    with pytest.raises(UserError, match="other settings"):
        train_judge(replace(parts, seed=1))
    monkeypatch.setattr("eval.judge.strange_scenes", interrupt)  # no step on frames is taken again
    for name, tensor in train_judge(parts).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_paths_come_from_as_many_clips_as_asked_for():
    seen, motions = clip_tracks(Judge().eval(), 53, torch.Generator().manual_seed(0))
    assert len(seen) == len(motions) == 2 * 53


def test_accuracy_is_that_of_what_the_judge_is_shown():
    """Shown black frames alone, it gives one answer to all, and is right where that happens to be the case."""
    judge, given = Judge().eval(), []

    def blacken(videos):
        given.append(videos.shape)
        return torch.full_like(videos, -1)

    found = judge_accuracy(judge, 20, change=blacken)
    scenes = random_scenes(20, torch.Generator().manual_seed(derived_seed(1, "accuracy")))
    answer = read_clip(judge, torch.full((1, 3, 16, 64, 64), -1.0))
    for name in ("shape", "colour", "texture", "background", "motion"):
        same = getattr(scenes, name) == getattr(answer, name).argmax()
        assert found[name] == pytest.approx(same.float().mean().item())
    assert given == [(20, 3, 16, 64, 64), (20, 3, 2, 64, 64)]


def test_a_file_of_something_else_is_no_judge(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors holds no judge"):
        load_judge(tmp_path / "other.safetensors")


def circle_path(radius=0.2, turns=1.0, start=0.0, x=0.0):
    angle = 2 * math.pi * (torch.linspace(0, turns, 16) + start)
    return torch.stack([x + radius * angle.cos(), radius * angle.sin()], -1)[None]


def test_path_error_ignores_place_and_size():
    assert path_error(circle_path(0.15, x=0.1), circle_path(0.2)).item() == pytest.approx(0, abs=1e-6)


def test_path_error_of_standing_still():
    line = torch.stack([torch.linspace(0, 0.4, 16), torch.zeros(16)], -1)[None]
    assert path_error(torch.zeros(1, 16, 2), line).item() == pytest.approx(0.5, abs=1e-6)  # mean way from the start


def test_path_error_scales_no_further_than_twice():
    line = torch.stack([torch.linspace(0, 0.4, 16), torch.zeros(16)], -1)[None]
    assert path_error(line / 4, line).item() == pytest.approx(0.25, abs=1e-6)  # half of the way is left
    assert path_error(line * 4, line).item() == pytest.approx(0.5, abs=1e-6)


def test_path_error_keeps_direction_and_time():
    backwards, late = circle_path(turns=-1.0), circle_path(turns=0.5)
    assert path_error(backwards, circle_path()).item() > 0.3
    assert path_error(late, circle_path()).item() > 0.2


def with_size(path, lost=()):
    """A path with sizes; where the subject is lost it is read in the frame's centre, with size 0."""
    path = torch.cat([path, torch.full_like(path[..., :1], 0.2)], dim=-1)
    path[:, list(lost)] = 0
    return path


def test_a_lost_frame_is_as_far_off_as_the_reference_is_wide():
    for lost in ([5], [5, 6, 15], [0], [0, 1, 2]):
        found = path_error(with_size(circle_path(0.15, x=0.1), lost), circle_path(0.2)).item()
        assert found == pytest.approx(len(lost) / 16, abs=1e-6)  # the others match: the first one too, and the scale


def test_a_subject_that_is_never_seen_is_worse_than_one_that_stands_still():
    gone, still_there = (torch.cat([torch.zeros(1, 16, 2), torch.full((1, 16, 1), s)], -1) for s in (0.029, 0.031))
    assert path_error(gone, circle_path()).item() == 1
    assert path_error(still_there, circle_path()).item() == path_error(torch.zeros(1, 16, 2), circle_path()).item() < 1


def test_histograms_count_pure_colours_in_one_bin():
    picture = torch.full((1, 3, 4, 4), -1.0)
    picture[:, 0, :, :2] = 1.0
    counts = colour_histogram(picture, torch.ones(1, 1, 4, 4))[0]
    assert counts[4 * 25].item() == pytest.approx(0.5)
    assert counts[0].item() == pytest.approx(0.5)
    assert colour_histogram(picture, torch.zeros(1, 1, 4, 4)).sum() == 0


def test_silhouettes_overlap_whatever_their_place_size_and_angle():
    square, turned = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64)
    square[..., 5:25, 8:28] = 1
    axis = torch.arange(64) + 0.5 - 40
    turned[0, 0] = ((axis[:, None].abs() + axis[None].abs()) < 18).float()
    bar = torch.zeros(1, 1, 64, 64)
    bar[..., 30:34, 10:50] = 1
    assert silhouette_overlap(square, turned).item() > 0.9
    assert silhouette_overlap(square, bar).item() < 0.4


def test_identity_knows_a_subject_again():
    shots = [still(0, name, seed) for seed, name in enumerate(["grass", "sea", "night", "road"])]
    photos, masks = (torch.cat(parts) for parts in zip(*shots, strict=True))
    scores = []
    for subject in range(len(HELD_OUT_SUBJECTS)):
        scenes = held_out_scenes(subject, "spiralling", "snow", 1, torch.Generator().manual_seed(5))
        clip, truth = render(scenes)
        scores.append(identity(clip, truth, photos, masks).item())
    assert scores[0] > 0.85
    assert max(scores[1:]) < 0.5
    assert identity(clip, torch.zeros_like(truth), photos, masks).item() == 0


SUBJECTS, MOTIONS_OF_PAIRS = zip(*((i, j) for i in range(5) for j in range(5)), strict=True)


@pytest.mark.parametrize(("subjects", "motions"), [(SUBJECTS, MOTIONS_OF_PAIRS), (range(5), range(5))])
def test_intervals_hold_the_truth_where_pairs_share_subjects_and_motions(subjects, motions):
    """Effects of subjects and of motions add up. Pairs taken for independent would hold the truth half the time."""
    generator, held, trials = torch.Generator().manual_seed(0), 0, 300
    for _ in range(trials):
        by_subject, by_motion = torch.randn(2, 5, generator=generator)
        values = by_subject[list(subjects)] + by_motion[list(motions)]
        values += 0.3 * torch.randn(len(values), generator=generator)
        low, high = crossed_interval(values, list(subjects), list(motions), draws=400)
        held += low <= 0 <= high
    assert held / trials >= 0.8


def test_intervals_of_a_table_are_means_over_rows_and_columns_drawn_anew():
    table = torch.randn(5, 5)
    i, j = torch.randint(5, (2, 20000, 5))
    expected = table[i[:, :, None], j[:, None, :]].mean(dim=(1, 2)).quantile(torch.tensor([0.025, 0.975]))
    found = crossed_interval(table.flatten(), SUBJECTS, MOTIONS_OF_PAIRS)
    assert found == pytest.approx(expected.tolist(), abs=0.03)


def test_pairs_that_agree_have_an_interval_of_one_point_and_one_pair_has_none():
    assert crossed_interval(torch.full((25,), 2.0), SUBJECTS, MOTIONS_OF_PAIRS) == (2.0, 2.0)
    assert crossed_interval(torch.full((2,), 2.0), [0, 1], [3, 4]) == (2.0, 2.0)
    assert crossed_interval(torch.ones(1), [0], [0]) is None
