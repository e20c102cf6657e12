"""The rendered world of the tiny base: one subject moving over a background, with its truth known.

Positions are in frame widths from the frame's centre (x to the right, y down), angles in radians (clockwise on the
screen), times in clips: 0 is a clip's first frame, 1 its last. Behind the subject lies a fading trail of its last
poses, so that a single frame tells how it moves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

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
HELD_OUT_SHAPES = ("arrow", "gear", "drop", "hourglass", "house")


def _edge(value: Tensor, sharpness: float = 4.0) -> Tensor:
    return (value * sharpness + 0.5).clamp(0, 1)


# Share of the second colour at a point (u, v) of the subject's own axes, which reach from -1 to 1.
TEXTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda u, v: torch.zeros_like(u),
    "striped": lambda u, v: _edge(torch.sin(2 * math.pi * (v + 0.25)), 1.5),
    "dotted": lambda u, v: _edge(torch.cos(2 * math.pi * u / 1.1) * torch.cos(2 * math.pi * v / 1.1) - 0.25, 2.0),
    "ringed": lambda u, v: _edge(torch.cos(2 * math.pi * (u * u + v * v).sqrt() / 0.8), 1.5),
    "checked": lambda u, v: _edge(torch.sin(math.pi * u / 0.5) * torch.sin(math.pi * v / 0.5), 2.0),
    "halved": lambda u, v: _edge(u),
    "banded": lambda u, v: _edge(0.3 - v.abs()),
    "quartered": lambda u, v: _edge(u) * _edge(v) + _edge(-u) * _edge(-v),
}
HELD_OUT_TEXTURES = ("checked", "halved", "banded", "quartered")

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
        turn = 2 * math.pi * (r[:, 0:1] + sign * _between(0.8, 1.15, r[:, 1]) * times)
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
    turn = 2 * math.pi * (r[:, 0:1] + _between(0.7, 1.1, r[:, 1]) * times)
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


def _walking_a_square(times: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    "walking a square": _walking_a_square,
}
HELD_OUT_MOTIONS = ("flying a figure eight", "spiralling", "hopping and turning", "swinging", "walking a square")

WORLD_SHAPES = tuple(name for name in SHAPES if name not in HELD_OUT_SHAPES)
WORLD_TEXTURES = tuple(name for name in TEXTURES if name not in HELD_OUT_TEXTURES)
WORLD_MOTIONS = tuple(name for name in MOTIONS if name not in HELD_OUT_MOTIONS)

# Subjects for photos: shape, texture, first and second colour. None of the shapes or textures has a word.
HELD_OUT_SUBJECTS = (
    ("arrow", "halved", "red", "yellow"),
    ("gear", "quartered", "purple", "white"),
    ("drop", "banded", "orange", "blue"),
    ("hourglass", "halved", "pink", "green"),
    ("house", "banded", "white", "red"),
)

TRAIL = 6  # ghosts in a trail
TRAIL_STEP = 0.1  # clips from one ghost to the next
SECOND_SHADE = 0.3  # a texture's second colour is its first, darkened to this


@dataclass(frozen=True)
class Scenes:
    """n scenes; numbers count in the order of the dictionaries above.

    Args:
        shape: (n,) of SHAPES.
        texture: (n,) of TEXTURES.
        colour: (n,) of COLOURS.
        second: (n, 3) red, green, blue in [0, 1] of the texture's second colour.
        background: (n,) of BACKGROUNDS.
        scenery: (n, 4) in [0, 1): the background's shade, two phases of its waves, and its slope.
        motion: (n,) of MOTIONS.
        poses: (n, f, 1 + TRAIL, 4): x, y, radius, angle of the subject in each frame, then of its trail's ghosts.
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
    radius, tilt = 0.185 + 0.06 * chances[:, 6], 0.4 * (chances[:, 7] - 0.5)
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
    half = size // 2  # ghosts are soft: half the resolution is enough
    _, _, ghosts = _place(scenes.shape, scenes.poses[:, :, 1:].flatten(1, 2), half)
    ghosts = ghosts.unflatten(1, (-1, TRAIL))
    fade = torch.linspace(0.55, 0.12, TRAIL)[:, None, None]
    trail = (ghosts * fade).amax(dim=2)
    trail = F.interpolate(trail, scale_factor=2, mode="bilinear")[:, :, None]
    picture = picture + (colour - picture) * trail

    u, v, mask = _place(scenes.shape, scenes.path, size)
    share = torch.empty_like(u)
    for number in scenes.texture.unique().tolist():
        its = scenes.texture == number
        share[its] = list(TEXTURES.values())[number](u[its], v[its])
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
    """The subjects' own coordinates at each pixel, and their cover of it: three of (n, m, size, size)."""
    axis = (torch.arange(size) + 0.5) / size - 0.5
    x, y, radius, angle = (t[:, :, None, None] for t in poses.unbind(-1))
    right, down = (axis[None, :] - x) / radius, (axis[:, None] - y) / radius
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = cos * right + sin * down, cos * down - sin * right
    grid = torch.stack([u, v], dim=-1).flatten(1, 2) / REACH
    distance = F.grid_sample(_outlines()[shape], grid, padding_mode="border", align_corners=True)
    pixels = distance[:, 0].view_as(u) * radius * size
    return u, v, (0.5 - pixels).clamp(0, 1)


REACH = 1.6  # a table of distances reaches from -REACH to REACH


@cache
def _outlines(cells: int = 97) -> Tensor:
    """Signed distances to each outline, negative inside: (shapes, 1, cells, cells)."""
    axis = torch.linspace(-REACH, REACH, cells)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 1, 2)
    tables = []
    for outline in SHAPES.values():
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


@cache
def _seen() -> Tensor:
    """The pairs (colour, background) that can be told apart, (m, 2)."""
    pairs = [(i, j) for i, c in enumerate(COLOURS) for j, b in enumerate(BACKGROUNDS) if (c, b) not in UNSEEN]
    return torch.tensor(pairs)
