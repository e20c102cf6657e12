"""Motion fidelity against loops in NumPy, closed forms and a simulation of its own."""

import math

import numpy as np
import pytest
import torch

from eval import fidelity
from eval.fidelity import chance_level, motion_fidelity, moving, published_fidelity
from eval.tracks import Tracks
from model import UserError


def tracks(points):
    points = torch.as_tensor(np.asarray(points), dtype=torch.float32)
    return Tracks(points, torch.ones(points.shape[:2], dtype=torch.bool))


def walks(count, frames, seed):
    """Steps of random direction and length."""
    drawn = np.random.default_rng(seed)
    return tracks(drawn.normal(size=(count, frames, 2)).cumsum(axis=1))


def straight(x, y, frames=6):
    return tracks([[(x * t, y * t) for t in range(frames)]])


def cosines(one, other):
    """S[n, m] by the definition, a step of length 0 counting 0."""
    a, b = one.points.double().numpy(), other.points.double().numpy()
    result = np.zeros((len(a), len(b)))
    for n in range(len(a)):
        for m in range(len(b)):
            for t in range(a.shape[1] - 1):
                s, r = a[n, t + 1] - a[n, t], b[m, t + 1] - b[m, t]
                length = math.hypot(*s) * math.hypot(*r)
                result[n, m] += (s @ r / length if length else 0) / (a.shape[1] - 1)
    return result


def test_is_half_of_both_sides_best_matches(monkeypatch):
    generated, reference = walks(7, 6, 0), walks(11, 6, 1)
    generated.points[2, 3] = generated.points[2, 2]
    similarity = cosines(generated, reference)
    expected = (similarity.max(axis=1).mean() + similarity.max(axis=0).mean()) / 2
    assert motion_fidelity(generated, reference) == pytest.approx(expected, abs=1e-9)
    assert motion_fidelity(reference, generated) == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(fidelity, "ROWS", 3)
    assert motion_fidelity(generated, reference) == pytest.approx(expected, abs=1e-9)


def test_a_motion_is_like_itself_and_unlike_its_reversal():
    walk = walks(5, 9, 2)
    right = straight(2, 0)
    assert motion_fidelity(walk, walk) == pytest.approx(1)
    assert motion_fidelity(right, tracks(right.points.flip(1))) == pytest.approx(-1)


def test_a_turned_motion_is_unlike_and_a_faster_one_elsewhere_is_not():
    right = straight(2, 0)
    assert motion_fidelity(right, straight(0, 2)) == pytest.approx(0)
    assert motion_fidelity(right, straight(1, 1)) == pytest.approx(math.sqrt(0.5))
    assert motion_fidelity(right, tracks(3 * right.points + 40)) == pytest.approx(1)


def test_a_reference_track_that_nothing_follows_lowers_it():
    both = tracks(torch.cat([straight(1, 0).points, straight(-1, 0).points]))
    # 1 from the one generated track, and (1 - 1) / 2 from the two of the reference
    assert motion_fidelity(straight(1, 0), both) == pytest.approx(0.5)


def test_steps_that_do_not_move_count_0():
    halting = straight(1, 0, frames=5).points
    halting[:, 3:] = halting[:, 2:3]
    assert motion_fidelity(tracks(halting), straight(1, 0, frames=5)) == pytest.approx(0.5)
    assert motion_fidelity(straight(0, 0), straight(1, 0)) == 0
    assert motion_fidelity(straight(0.001, 0), straight(1, 0), eps=0.01) == 0


@pytest.mark.parametrize(("one", "other", "message"), [
    (walks(3, 5, 0), walks(3, 6, 0), "5 frames, the reference 6"),
    (walks(3, 1, 0), walks(3, 1, 0), "two frames or more"),
    (walks(0, 5, 0), walks(3, 5, 0), "generated video has no tracks: nothing moves"),
    (walks(3, 5, 0), walks(0, 5, 0), "reference video has no tracks: nothing moves"),
])  # fmt: skip
@pytest.mark.parametrize("score", [motion_fidelity, published_fidelity])
def test_what_cannot_be_compared_is_refused(one, other, message, score):
    with pytest.raises(UserError, match=message):
        score(one, other)


def test_published_takes_the_identity_off(monkeypatch):
    generated, reference = walks(7, 6, 3), walks(7, 6, 4)
    expected = (cosines(generated, reference) - np.eye(7)).max(axis=1).mean()
    assert published_fidelity(generated, reference) == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(fidelity, "ROWS", 3)
    assert published_fidelity(generated, reference) == pytest.approx(expected, abs=1e-9)


def test_published_finds_a_video_unlike_itself():
    two = tracks(torch.cat([straight(1, 0).points, straight(1, 2).points]))
    assert published_fidelity(two, two) == pytest.approx(1 / math.sqrt(5))  # each matches the other one
    assert motion_fidelity(two, two) == pytest.approx(1)


def test_published_is_nan_for_a_still_point():
    still = walks(4, 6, 5)
    still.points[1] = 7
    assert math.isnan(published_fidelity(still, walks(4, 6, 6)))
    assert math.isnan(published_fidelity(walks(4, 6, 6), still))
    assert math.isfinite(published_fidelity(still, walks(4, 6, 6), eps=1e-8))
    assert math.isfinite(motion_fidelity(still, walks(4, 6, 6)))


def test_published_needs_equal_numbers_of_tracks():
    with pytest.raises(UserError, match="4 are given for 5"):
        published_fidelity(walks(4, 6, 0), walks(5, 6, 0))


def test_chance_level_is_the_score_of_unrelated_tracks():
    drawn = np.random.default_rng(7)
    scores = []
    for _ in range(200):
        ours, theirs = (
            np.exp(2j * np.pi * drawn.random((count, 5)))  # directions as complex numbers
            for count in (30, 8)
        )
        similarity = (ours @ theirs.conj().T).real / 5
        scores.append((similarity.max(axis=1).mean() + similarity.max(axis=0).mean()) / 2)
    # three standard errors of both means are below 0.02
    assert chance_level(30, 8, 5) == pytest.approx(np.mean(scores), abs=0.02)
    assert chance_level(30, 8, 5) == chance_level(8, 30, 5)
    assert chance_level(1, 1, 5) == pytest.approx(0, abs=0.04)


def test_chance_level_of_the_published_setting():
    """3025 tracks of 16 frames: the published, two-sided sum is 1.24 (shared notes on the baselines)."""
    level = chance_level(3025, 3025, 15)
    assert level == pytest.approx(1.24 / 2, abs=0.005)
    angles = torch.rand(2, 3025, 16, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    ours, theirs = torch.stack([angles.cos(), angles.sin()], dim=-1).cumsum(dim=2)
    assert motion_fidelity(tracks(ours), tracks(theirs)) == pytest.approx(level, abs=0.005)
    assert published_fidelity(tracks(ours), tracks(ours)) == pytest.approx(level, abs=0.005)


def test_chance_level_needs_tracks():
    with pytest.raises(UserError, match="at least one track"):
        chance_level(0, 5, 15)


def test_what_comes_back_moves_and_what_jitters_does_not():
    turn = torch.linspace(0, 2 * math.pi, 17)
    circle = 5 * torch.stack([turn.cos(), turn.sin()], dim=-1)
    jitter = 10 + 0.2 * torch.stack([(9 * turn).cos(), (7 * turn).sin()], dim=-1)
    edge = torch.zeros(17, 2)
    edge[8, 0] = 0.5
    kept = moving(tracks(torch.stack([jitter, circle, edge])))
    assert torch.equal(kept.points, torch.stack([circle, edge]))
    assert len(moving(tracks(torch.stack([jitter, circle, edge])), still=0.6).points) == 1
    assert len(moving(tracks(torch.stack([jitter, circle, edge])), still=0).points) == 3


def test_tracks_that_were_mostly_lost_do_not_count():
    walk = walks(3, 10, 8)
    walk.visible[0, 4:] = False
    walk.visible[1, 5:] = False
    assert torch.equal(moving(walk).visible, walk.visible[1:])
    assert len(moving(walk, seen=0).points) == 3
    assert len(moving(walk, seen=1).points) == 1
