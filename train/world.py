"""The rendered world of the tiny base: one subject moving over a background, with its truth known.

Positions are in frame widths from the frame's centre (x to the right, y down), angles in radians (clockwise on the
screen), times in clips: 0 is a clip's first frame, 1 its last. Behind the subject lies a fading trail of its last
places, so that a single frame tells how it moves.
"""

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from train.motions import HELD_OUT_MOTIONS, MOTIONS, WORLD_MOTIONS
from train.shapes import (
    HELD_OUT_SHAPES,
    HELD_OUT_SUBJECTS,
    HELD_OUT_TEXTURES,
    NAMELESS,
    REACH,
    SHAPES,
    TEXTURES,
    WORLD_SHAPES,
    WORLD_TEXTURES,
    distance_tables,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "HELD_OUT_MOTIONS",
    "HELD_OUT_SHAPES",
    "HELD_OUT_SUBJECTS",
    "HELD_OUT_TEXTURES",
    "MOTIONS",
    "NAMELESS",
    "NUM_FRAMES",
    "SHAPES",
    "SIZE",
    "TEXTURES",
    "TRAIL",
    "TRAIL_STEP",
    "UNSEEN",
    "WORLD_MOTIONS",
    "WORLD_SHAPES",
    "WORLD_TEXTURES",
    "Scenes",
    "caption",
    "held_out_scenes",
    "make_scenes",
    "random_scenes",
    "render",
]

SIZE = 64  # pixels of a frame's side
NUM_FRAMES = 16

COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.05, 0.62, 0.20),
    "blue": (0.10, 0.28, 0.92),
    "purple": (0.52, 0.12, 0.70),
    "pink": (1.00, 0.55, 0.78),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS = {
    "sand": (0.83, 0.70, 0.46),
    "grass": (0.38, 0.56, 0.26),
    "sea": (0.22, 0.50, 0.68),
    "snow": (0.86, 0.90, 0.95),
    "night": (0.07, 0.08, 0.20),
    "road": (0.42, 0.42, 0.44),
}
# Per background: waves' direction (x, y) in cycles a frame, and their height: what tells sand from a yellow wall.
WAVES = {
    "sand": (1.5, 2.0, 0.04),
    "grass": (3.0, 0.4, 0.05),
    "sea": (0.4, 3.0, 0.05),
    "snow": (1.0, 1.0, 0.03),
    "night": (0.0, 0.6, 0.05),
    "road": (0.0, 1.0, 0.05),
}
# A subject of nearly its background's colour could not be seen.
UNSEEN = {
    ("white", "snow"),
    ("yellow", "sand"),
    ("orange", "sand"),
    ("green", "grass"),
    ("blue", "sea"),
    ("purple", "night"),
}

TRAIL = 6  # puffs in a trail
TRAIL_STEP = 0.1  # clips from one puff to the next
RIM = 0.15  # radii: a texture keeps off the outline, which so shows in one colour
SECOND_SHADE = 0.3  # a texture's second colour is its first, darkened to this


@dataclass(frozen=True)
class Scenes:
    """n scenes; numbers count in the order of the dictionaries above.

    Args:
        shape: (n,) of SHAPES, then of NAMELESS.
        texture: (n,) of TEXTURES.
        colour: (n,) of COLOURS.
        second: (n, 3) red, green, blue in [0, 1] of the texture's second colour.
        background: (n,) of BACKGROUNDS.
        scenery: (n, 4) in [0, 1): the background's shade, two phases of its waves, and its slope.
        motion: (n,) of MOTIONS.
        poses: (n, f, 1 + TRAIL, 4): x, y, radius, angle of the subject in each frame, then of its trail's puffs.
    """

    shape: Tensor
    texture: Tensor
    colour: Tensor
    second: Tensor
    background: Tensor
    scenery: Tensor
    motion: Tensor
    poses: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def path(self) -> Tensor:
        """The subject's x, y, radius and angle in each frame, (n, f, 4)."""
        return self.poses[:, :, 0]


def random_scenes(count: int, generator: torch.Generator, times: Tensor | None = None) -> Scenes:
    """Draw scenes from the training world: nothing held out, nothing that cannot be seen.

    Args:
        count: n.
        generator: on the CPU.
        times: (n, f) of the frames; None: the 16 frames of a clip.
    """

    def pick(number: int) -> Tensor:
        return torch.randint(number, (count,), generator=generator)

    seen = _seen()
    colour, background = seen[pick(len(seen))].unbind(1)
    shape, texture, motion = pick(len(WORLD_SHAPES)), pick(len(WORLD_TEXTURES)), pick(len(WORLD_MOTIONS))
    # a plain or ringed circle that spins would look as if it did not
    round_ = (shape == WORLD_SHAPES.index("circle")) & ((texture == 0) | (texture == WORLD_TEXTURES.index("ringed")))
    spins = motion == WORLD_MOTIONS.index("spinning")
    shape = torch.where(round_ & spins, WORLD_SHAPES.index("star"), shape)
    return make_scenes(shape, texture, colour, None, background, motion, generator, times)


def held_out_scenes(
    subject: int, motion: str, background: str, count: int, generator: torch.Generator, times: Tensor | None = None
) -> Scenes:
    """Scenes of one of HELD_OUT_SUBJECTS in any motion of MOTIONS over a background of BACKGROUNDS."""
    shape, texture, first, second = HELD_OUT_SUBJECTS[subject]

    def full(names: dict, name: str) -> Tensor:
        return torch.full((count,), list(names).index(name))

    return make_scenes(
        full(SHAPES, shape),
        full(TEXTURES, texture),
        full(COLOURS, first),
        torch.tensor(COLOURS[second]).expand(count, 3),
        full(BACKGROUNDS, background),
        full(MOTIONS, motion),
        generator,
        times,
    )


def make_scenes(
    shape: Tensor,
    texture: Tensor,
    colour: Tensor,
    second: Tensor | None,
    background: Tensor,
    motion: Tensor,
    generator: torch.Generator,
    times: Tensor | None = None,
) -> Scenes:
    """Scenes of given looks and motions (numbers, see Scenes) with random start, speed, size and tilt.

    `second=None` darkens the first colour. Raises nothing: colours near the background's are the caller's concern.
    """
    count = len(shape)
    if times is None:
        times = torch.linspace(0, 1, NUM_FRAMES).expand(count, -1)
    moments = times[:, :, None] - TRAIL_STEP * torch.arange(1 + TRAIL)
    chances = torch.rand((count, 8), generator=generator)
    poses = torch.empty(*moments.shape, 4)
    for number in motion.unique().tolist():
        its = motion == number
        path = list(MOTIONS.values())[number]
        drawn = path(moments[its].flatten(1), chances[its])
        poses[its] = torch.stack(drawn, dim=-1).view(*moments[its].shape, 4)
    radius, tilt = 0.2 + 0.05 * chances[:, 6], 0.2 * (chances[:, 7] - 0.5)
    poses[..., 2] *= radius[:, None, None]
    poses[..., 3] += tilt[:, None, None]
    if second is None:
        second = SECOND_SHADE * torch.tensor(list(COLOURS.values()))[colour]
    scenery = torch.rand((count, 4), generator=generator)
    return Scenes(shape, texture, colour, second, background, scenery, motion, poses)


def caption(scenes: Scenes, index: int, *, texture: bool = True, motion: bool = True, background: bool = True) -> str:
    """What scene `index` is called: "a striped red star is circling clockwise over the sand", or less of it.

    Raises IndexError for what is held out and has no word.
    """
    words = ["a"]
    if texture:
        words.append(WORLD_TEXTURES[scenes.texture[index]])
    words += [list(COLOURS)[scenes.colour[index]], WORLD_SHAPES[scenes.shape[index]]]
    if motion:
        words += ["is", WORLD_MOTIONS[scenes.motion[index]]]
    if background:
        words += ["over the", list(BACKGROUNDS)[scenes.background[index]]]
    return " ".join(words)


def render(scenes: Scenes, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Draw the scenes, anti-aliased.

    Args:
        scenes: n scenes of f frames.
        size: pixels of a side, even.

    Returns:
        Frames (n, 3, f, size, size) in [-1, 1], and the subject's share of each pixel (n, 1, f, size, size) in [0, 1].
    """
    colour = torch.tensor(list(COLOURS.values()))[scenes.colour][:, None, :, None, None]
    picture = _scenery(scenes, size)[:, None]
    picture = picture + (colour - picture) * _trail(scenes, size)[:, :, None]

    u, v, distance = _place(scenes.shape, scenes.path, size)
    mask = (0.5 - distance * scenes.path[..., 2, None, None] * size).clamp(0, 1)
    share = torch.empty_like(u)
    for number in scenes.texture.unique().tolist():
        its = scenes.texture == number
        share[its] = list(TEXTURES.values())[number](u[its], v[its])
    share *= ((-RIM - distance) / 0.1 + 0.5).clamp(0, 1)
    second = scenes.second[:, None, :, None, None]
    subject = colour + (second - colour) * share[:, :, None]
    picture = picture + (subject - picture) * mask[:, :, None]
    return (picture * 2 - 1).transpose(1, 2), mask[:, None]


def _scenery(scenes: Scenes, size: int) -> Tensor:
    """Backgrounds (n, 3, size, size) in [0, 1]: a colour with two low waves and a slope in brightness."""
    axis = (torch.arange(size) + 0.5) / size - 0.5
    y, x = axis[:, None], axis[None, :]
    wave_x, wave_y, height = (t[:, None, None] for t in torch.tensor(list(WAVES.values()))[scenes.background].unbind(1))
    shade, first, second, slope = (t[:, None, None] for t in scenes.scenery.unbind(1))
    wave = torch.sin(2 * math.pi * (wave_x * x + wave_y * y + first))
    wave = wave + 0.5 * torch.sin(2 * math.pi * (wave_y * x * 0.5 - wave_x * y * 0.5 + second))
    light = 0.06 * (shade - 0.5) + 0.08 * (slope - 0.5) * y + height * wave
    base = torch.tensor(list(BACKGROUNDS.values()))[scenes.background][:, :, None, None]
    return (base + light[:, None]).clamp(0, 1)


def _place(shape: Tensor, poses: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each pixel in the subjects' own coordinates, and its distance from their outlines in radii, negative inside.

    Three of (n, m, size, size).
    """
    axis = (torch.arange(size) + 0.5) / size - 0.5
    x, y, radius, angle = (t[:, :, None, None] for t in poses.unbind(-1))
    right, down = (axis[None, :] - x) / radius, (axis[:, None] - y) / radius
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = cos * right + sin * down, cos * down - sin * right
    grid = torch.stack([u, v], dim=-1).flatten(1, 2) / REACH
    distance = F.grid_sample(distance_tables()[shape], grid, padding_mode="border", align_corners=True)
    return u, v, distance[:, 0].view_as(u)


def _trail(scenes: Scenes, size: int) -> Tensor:
    """The trails' share of each pixel, (n, f, size, size): soft puffs where the subjects were, fading with time."""
    axis = (torch.arange(size) + 0.5) / size - 0.5
    x, y, radius, _ = (t[..., None, None] for t in scenes.poses[:, :, 1:].unbind(-1))
    distance = ((axis - x).square() + (axis[:, None] - y).square()).sqrt() / radius
    fade = torch.linspace(0.6, 0.15, TRAIL)[:, None, None]
    return (((0.75 - distance) / 0.4).clamp(0, 1) * fade).amax(dim=2)


@cache
def _seen() -> Tensor:
    """The pairs (colour, background) that can be told apart, (m, 2)."""
    pairs = [(i, j) for i, c in enumerate(COLOURS) for j, b in enumerate(BACKGROUNDS) if (c, b) not in UNSEEN]
    return torch.tensor(pairs)
