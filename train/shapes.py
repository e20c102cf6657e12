"""Outlines and textures of the rendered world's subjects."""

import math
import random
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def _arc(count: int, start: float, end: float, radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> list:
    angles = [start + (end - start) * i / count for i in range(count)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _spiky(points: int, inner: float, outer: float = 1.0) -> list:
    radii = [outer, inner] * points
    return [(r * math.sin(math.pi * i / points), -r * math.cos(math.pi * i / points)) for i, r in enumerate(radii)]


def _heart() -> list:
    turn = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.08,
        )
        for t in turn
    ]


def _nameless(number: int) -> list:
    """A random outline: an odd one of 5 to 9 corners, an even one round, its radius a sum of waves."""
    drawn = random.Random(number)
    if number % 2:
        radii = [drawn.uniform(0.45, 1.15) for _ in range(drawn.randint(5, 9))]
    else:
        waves = [(n, drawn.uniform(0, 0.5 / n), drawn.random()) for n in (2, 3, 5)]
        radii = [0.8 + sum(h * math.cos(2 * math.pi * (n * i / 48 + p)) for n, h, p in waves) for i in range(48)]
    turn, size = 2 * math.pi / len(radii), 1.1 / max(radii)
    return [(size * r * math.cos(turn * i), size * r * math.sin(turn * i)) for i, r in enumerate(radii)]


# Outlines within the unit circle, or a little over it; the last five are held out.
SHAPES = {
    "circle": _arc(48, 0, 2 * math.pi, 0.92),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0.0, -1.05), (1.05, 0.8), (-1.05, 0.8)],
    "star": _spiky(5, 0.48, 1.18),
    "heart": _heart(),
    "cross": [
        *[(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36)],
        *[(0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)],
    ],
    "moon": [*_arc(32, 0.8, 2 * math.pi - 0.8, 1.02), *_arc(24, -1.3, -2 * math.pi + 1.3, 0.78, 0.5)],
    "arrow": [(0, -1.1), (1, 0), (0.42, 0), (0.42, 1), (-0.42, 1), (-0.42, 0), (-1, 0)],
    "gear": [
        (r * math.cos(2 * math.pi * (i + 0.5) / 32), r * math.sin(2 * math.pi * (i + 0.5) / 32))
        for i, r in enumerate([1.08, 1.08, 0.76, 0.76] * 8)
    ],
    "drop": [(0.0, -1.15), *_arc(36, -0.45, math.pi + 0.45, 0.78, 0, 0.25)],
    "hourglass": [(-0.85, -1), (0.85, -1), (0.25, 0), (0.85, 1), (-0.85, 1), (-0.25, 0)],
    "house": [(0, -1.1), (0.95, -0.25), (0.7, -0.25), (0.7, 0.95), (-0.7, 0.95), (-0.7, -0.25), (-0.95, -0.25)],
}
# Outlines that no word means and no subject of HELD_OUT_SUBJECTS has; in Scenes they are counted on after SHAPES.
NAMELESS = [_nameless(number) for number in range(64)]
HELD_OUT_SHAPES = ("arrow", "gear", "drop", "hourglass", "house")


def _edge(value: Tensor, sharpness: float = 4.0) -> Tensor:
    return (value * sharpness + 0.5).clamp(0, 1)


# Share of the second colour at a point (u, v) of the subject's own axes, which reach from -1 to 1; the last four are
# held out.
TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda u, v: torch.zeros_like(u),
    "striped": lambda u, v: _edge(torch.sin(2.5 * math.pi * v), 1.5),
    "dotted": lambda u, v: _edge(torch.cos(2 * math.pi * u / 1.1) * torch.cos(2 * math.pi * v / 1.1) - 0.25, 2.0),
    "ringed": lambda u, v: _edge(torch.cos(2 * math.pi * (u * u + v * v).sqrt() / 0.8), 1.5),
    "checked": lambda u, v: _edge(torch.sin(math.pi * u / 0.5) * torch.sin(math.pi * v / 0.5), 2.0),
    "halved": lambda u, v: _edge(u),
    "banded": lambda u, v: _edge(0.3 - v.abs()),
    "quartered": lambda u, v: _edge(u) * _edge(v) + _edge(-u) * _edge(-v),
}
HELD_OUT_TEXTURES = ("checked", "halved", "banded", "quartered")

WORLD_SHAPES = tuple(name for name in SHAPES if name not in HELD_OUT_SHAPES)
WORLD_TEXTURES = tuple(name for name in TEXTURES if name not in HELD_OUT_TEXTURES)

REACH = 1.6  # a table of distances reaches from -REACH to REACH


# Subjects for photos: shape, texture, first and second colour. None of the shapes or textures has a word.
HELD_OUT_SUBJECTS = (
    ("arrow", "halved", "red", "yellow"),
    ("gear", "quartered", "purple", "white"),
    ("drop", "banded", "orange", "blue"),
    ("hourglass", "halved", "pink", "green"),
    ("house", "banded", "white", "red"),
)


@cache
def distance_tables(cells: int = 97) -> Tensor:
    """Signed distances to each outline of SHAPES, then of NAMELESS, negative inside: (outlines, 1, cells, cells)."""
    axis = torch.linspace(-REACH, REACH, cells)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 1, 2)
    tables = []
    for outline in (*SHAPES.values(), *NAMELESS):
        start = torch.tensor(outline, dtype=torch.float32)
        end = start.roll(-1, 0)
        side = end - start
        along = (((points - start) * side).sum(-1) / (side * side).sum(-1)).clamp(0, 1)
        distance = (points - start - along[..., None] * side).norm(dim=-1).amin(1)
        px, py = points.unbind(-1)
        crosses = (start[:, 1] > py) != (end[:, 1] > py)
        meets = start[:, 0] + (py - start[:, 1]) * side[:, 0] / side[:, 1]
        inside = (crosses & (px < meets)).sum(1) % 2 == 1
        tables.append(torch.where(inside, -distance, distance).view(1, cells, cells))
    return torch.stack(tables)
