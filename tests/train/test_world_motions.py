"""Each motion of the rendered world is what its name says."""

import math

import pytest
import torch
from one_scene import scenes_of

from train.world import MOTIONS, SIZE, render


def paths_of(motion: str, count: int = 40, steps: int = 65) -> torch.Tensor:
    """Poses (n, f, 4) at many moments of a clip."""
    return scenes_of(count, motion=motion, times=torch.linspace(0, 1, steps).expand(count, -1)).path


def reversals(values: torch.Tensor) -> torch.Tensor:
    """How often each row (n, f) turns back."""
    way = values.diff(dim=1).sign()
    return (way[:, 1:] * way[:, :-1] < 0).sum(1)


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_moving_goes_straight_one_way_across_a_third_of_the_frame_or_more(motion, axis, sign):
    path = paths_of(f"moving {motion}")
    steps = path[..., axis].diff(dim=1) * sign
    assert (steps > 0).all()
    assert torch.allclose(steps, steps[:, :1].expand_as(steps), atol=1e-5)  # evenly
    assert ((steps.sum(1) >= 0.34 - 1e-5) & (steps.sum(1) <= 0.54 + 1e-5)).all()
    rest = path[..., [i for i in range(4) if i != axis]]
    assert torch.equal(rest, rest[:, :1].expand_as(rest))


@pytest.mark.parametrize(("motion", "sign"), [("circling clockwise", 1), ("circling counterclockwise", -1)])
def test_circling_turns_the_way_a_clock_does_or_the_other(motion, sign):
    path = paths_of(motion, 60, 129)
    x, y = path[..., 0], path[..., 1]
    top = y[:, :-1].argmin(1, keepdim=True)  # on the screen: y points down
    assert (x.diff(dim=1).gather(1, top) * sign > 0).all()
    turned = torch.complex(x.diff(dim=1), y.diff(dim=1))
    angles = torch.angle(turned[:, 1:] / turned[:, :-1]).sum(1) / (2 * math.pi)
    assert ((angles * sign > 0.75) & (angles * sign < 1.2)).all()


def test_bouncing_leaps_off_a_floor():
    path = paths_of("bouncing")
    assert (path[..., 0] == path[:, :1, 0]).all()
    assert (path[..., 1] <= 0.25 + 1e-6).all()
    assert (reversals(path[..., 1]) >= 2).all()
    assert ((path[..., 1].amax(1) - path[..., 1].amin(1)) > 0.25).all()
    way = path[..., 1].diff(dim=1)
    landing = (way[:, :-1] > 0) & (way[:, 1:] < 0)
    assert (path[:, 1:-1, 1][landing] > 0.2).all()  # it comes down to the floor, every time


def test_zigzagging_crosses_the_frame_in_turns():
    path = paths_of("zigzagging")
    steps = path[..., 0].diff(dim=1)
    assert ((steps > 0).all(1) | (steps < 0).all(1)).all()
    assert len((steps[:, 0] > 0).unique()) == 2
    assert (reversals(path[..., 1]) >= 3).all()


@pytest.mark.parametrize(("motion", "sign"), [("growing", 1), ("shrinking", -1)])
def test_growing_and_shrinking_change_the_size_alone(motion, sign):
    path = paths_of(motion)
    assert (path[..., 2].diff(dim=1) * sign > 0).all()
    ratio = path[:, -1, 2] / path[:, 0, 2]
    assert (ratio**sign > 1.5).all()
    rest = path[..., [0, 1, 3]]
    assert torch.equal(rest, rest[:, :1].expand_as(rest))


def test_spinning_turns_clockwise_on_the_spot_and_resting_does_nothing():
    path = paths_of("spinning")
    assert torch.equal(path[..., :3], path[:, :1, :3].expand_as(path[..., :3]))
    turns = (path[:, -1, 3] - path[:, 0, 3]) / (2 * math.pi)
    assert ((turns > 0.69) & (turns < 1.11)).all()
    path = paths_of("resting")
    assert torch.equal(path, path[:, :1].expand_as(path))


def test_held_out_motions_are_what_they_are_called():
    x, y, _, angle = paths_of("flying a figure eight").unbind(-1)
    assert torch.allclose(x[:, 0], x[:, -1], atol=1e-5)
    area = (x[:, :-1] * y[:, 1:] - x[:, 1:] * y[:, :-1]).sum(1)
    assert (area.abs() < 1e-4).all()  # one loop clockwise, one against
    assert (x.amax(1) - x.amin(1) > 0.5).all()
    x, y, _, _ = paths_of("spiralling").unbind(-1)
    assert ((x**2 + y**2).diff(dim=1) > 0).all()
    x, y, _, angle = paths_of("hopping and turning").unbind(-1)
    assert (x.diff(dim=1) > 0).all()
    assert (reversals(y) == 3).all()
    assert torch.allclose(angle[:, -1] - angle[:, 0], torch.tensor(2 * math.pi))
    x, y, _, angle = paths_of("swinging").unbind(-1)
    assert (((x / 0.34) ** 2 + ((y + 0.22) / 0.42) ** 2 - 1).abs() < 1e-4).all()
    assert (y > -0.22).all()  # it hangs
    assert ((x.amax(1) > 0.2) & (x.amin(1) < -0.2)).all()
    path = paths_of("patrolling")
    assert torch.allclose(path[..., :2].abs().amax(-1), torch.tensor(0.21), atol=1e-5)
    assert torch.allclose(path[:, 0], path[:, -1], atol=1e-5)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_subject_stays_mostly_in_sight(motion):
    whole = scenes_of(40, motion=motion, times=torch.linspace(0, 1, 4).expand(40, -1))
    cover = render(whole)[1].sum((-1, -2))[:, 0]
    area = math.pi * (0.92 * whole.path[..., 2] * SIZE) ** 2  # of a circle
    assert (cover / area).min() > 0.7
    assert (cover / area).mean() > 0.95
    assert whole.path[..., :2].abs().max() < 0.45
