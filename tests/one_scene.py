"""Scenes of the rendered world, one kind at a time."""

import torch

from train.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, TEXTURES, Scenes, make_scenes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes_of(
    count: int = 1,
    shape: str = "circle",
    texture: str = "plain",
    colour: str = "red",
    background: str = "snow",
    motion: str = "resting",
    times: torch.Tensor | None = None,
    seed: int = 0,
) -> Scenes:
    """Scenes of one look and one motion."""

    def full(names, name):
        return torch.full((count,), list(names).index(name))

    looks = (full(SHAPES, shape), full(TEXTURES, texture), full(COLOURS, colour), None, full(BACKGROUNDS, background))
    return make_scenes(*looks, full(MOTIONS, motion), seeded(seed), times)
