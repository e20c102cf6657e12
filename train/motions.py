"""How the rendered world's subjects move: paths at given times, by the words of a caption.

Positions are in frame widths from the frame's centre (x to the right, y down), angles in radians (clockwise on the
screen), times in clips: 0 is a clip's first frame, 1 its last.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# (times (n, m), uniform numbers (n, 8)) -> x, y, size factor, angle, each (n, m)
Motion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def _between(low: float, high: float, r: Tensor) -> Tensor:
    return low + (high - low) * r[:, None]


def _pose(
    times: Tensor, x: Tensor | float, y: Tensor | float, scale: Tensor | float = 1.0, angle: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(times)
    return zero + x, zero + y, zero + scale, zero + angle


def _straight(dx: int, dy: int) -> Motion:
    def path(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        travel = _between(0.34, 0.54, r[:, 0])
        along = travel * (times - 0.5) + _between(-1, 1, r[:, 1]) * (0.29 - travel / 2)
        across = _between(-0.2, 0.2, r[:, 2])
        return _pose(times, dx * along + abs(dy) * across, dy * along + abs(dx) * across)

    return path


def _circling(sign: int) -> Motion:
    def path(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # from the upper third, so that the way round alone says where a subject will be: of starts anywhere 15,000
        # steps of clips did not tell the ways apart (nor did 3,600 of these yet)
        turn = 2 * math.pi * (_between(-0.42, -0.08, r[:, 0]) + sign * _between(0.8, 1.15, r[:, 1]) * times)
        radius = _between(0.16, 0.22, r[:, 2])
        x, y = _between(-0.06, 0.06, r[:, 3]), _between(-0.06, 0.06, r[:, 4])
        return _pose(times, x + radius * torch.cos(turn), y + radius * torch.sin(turn))

    return path


def _bouncing(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    jump = torch.sin(math.pi * (r[:, 0:1] + _between(1.6, 2.4, r[:, 1]) * times)).abs()
    return _pose(times, _between(-0.2, 0.2, r[:, 2]), 0.25 - _between(0.3, 0.45, r[:, 3]) * jump)


def _zigzagging(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    phase = (r[:, 0:1] + _between(1.8, 2.4, r[:, 1]) * times) % 1
    wave = 4 * (phase - 0.5).abs() - 1
    way = torch.where(r[:, 2:3] < 0.5, -1.0, 1.0)
    x = way * _between(0.4, 0.54, r[:, 3]) * (times - 0.5)
    return _pose(times, x, _between(-0.06, 0.06, r[:, 4]) + _between(0.11, 0.16, r[:, 5]) * wave)


def _resizing(start: float, end: float) -> Motion:
    def path(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, last = (x * _between(0.95, 1.05, r[:, i]) for i, x in enumerate((start, end)))
        scale = (first + (last - first) * times).clamp_min(0.3)
        return _pose(times, _between(-0.18, 0.18, r[:, 2]), _between(-0.18, 0.18, r[:, 3]), scale)

    return path


def _spinning(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    turn = 2 * math.pi * (_between(-0.15, 0.15, r[:, 0]) + _between(0.7, 1.1, r[:, 1]) * times)
    return _pose(times, _between(-0.2, 0.2, r[:, 2]), _between(-0.2, 0.2, r[:, 3]), angle=turn)


def _resting(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _pose(times, _between(-0.22, 0.22, r[:, 0]), _between(-0.22, 0.22, r[:, 1]))


def _figure_eight(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    turn = 2 * math.pi * (r[:, 0:1] + times)
    return _pose(times, 0.26 * torch.sin(turn), 0.17 * torch.sin(2 * turn))


def _spiral(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    turn = 2 * math.pi * (r[:, 0:1] + 1.6 * times)
    radius = 0.04 + 0.24 * times.clamp_min(-0.1)
    return _pose(times, radius * torch.cos(turn), radius * torch.sin(turn))


def _hop_and_turn(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hops = 2 * times
    x = 0.5 * (times - 0.5)
    y = 0.2 - 0.34 * torch.sin(math.pi * hops).abs()
    return _pose(times, x, y, angle=math.pi * hops)


def _swinging(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lean = 1.0 * torch.cos(2 * math.pi * (1.25 * times + r[:, 0:1]))
    return _pose(times, 0.34 * torch.sin(lean), -0.22 + 0.42 * torch.cos(lean), angle=-lean * 0.5)


def _patrolling(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    way = 4 * ((times + r[:, 0:1]) % 1)
    x = (way.clamp(0, 1) - (way - 2).clamp(0, 1) - 0.5) * 0.42
    y = ((way - 1).clamp(0, 1) - (way - 3).clamp(0, 1) - 0.5) * 0.42
    return _pose(times, x, y)


# By what a caption says; the last five are held out.
MOTIONS: dict[str, Motion] = {
    "moving left": _straight(-1, 0),
    "moving right": _straight(1, 0),
    "moving up": _straight(0, -1),
    "moving down": _straight(0, 1),
    "circling clockwise": _circling(1),
    "circling counterclockwise": _circling(-1),
    "bouncing": _bouncing,
    "zigzagging": _zigzagging,
    "growing": _resizing(0.65, 1.15),
    "shrinking": _resizing(1.15, 0.65),
    "spinning": _spinning,
    "resting": _resting,
    "flying a figure eight": _figure_eight,
    "spiralling": _spiral,
    "hopping and turning": _hop_and_turn,
    "swinging": _swinging,
    "patrolling": _patrolling,
}
HELD_OUT_MOTIONS = ("flying a figure eight", "spiralling", "hopping and turning", "swinging", "patrolling")

WORLD_MOTIONS = tuple(name for name in MOTIONS if name not in HELD_OUT_MOTIONS)
