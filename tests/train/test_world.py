"""The rendered world is what its captions say, and looks as a slow renderer draws it from the outlines."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from one_scene import scenes_of, seeded

from train.world import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_MOTIONS,
    HELD_OUT_SHAPES,
    HELD_OUT_TEXTURES,
    MOTIONS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    TEXTURES,
    TRAIL,
    TRAIL_STEP,
    UNSEEN,
    WORLD_MOTIONS,
    WORLD_SHAPES,
    WORLD_TEXTURES,
    Scenes,
    caption,
    random_scenes,
    render,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CAPTION = re.compile(
    rf"a (?P<texture>{'|'.join(WORLD_TEXTURES)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(WORLD_SHAPES)})"
    rf" is (?P<motion>{'|'.join(WORLD_MOTIONS)}) over the (?P<background>{'|'.join(BACKGROUNDS)})"
)


def winding(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Whether each point (n, 2) is inside: the angles to the outline's corners add up to a whole turn."""
    total = np.zeros(len(points))
    for start, end in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        a, b = start - points, end - points
        total += np.arctan2(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0], (a * b).sum(1))
    return np.abs(total) > math.pi


def slow_cover(shape: str, pose: torch.Tensor, size: int, grain: int = 6) -> np.ndarray:
    """The share of each pixel (size, size) that a shape covers, counted over grain x grain points in it."""
    x, y, radius, angle = pose.tolist()
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    outline = np.array(SHAPES[shape]) @ turn.T * radius + [x, y]
    axis = (np.arange(size * grain) + 0.5) / (size * grain) - 0.5
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    near = np.abs(points - [x, y]).max(1) < 1.5 * radius
    inside = np.zeros(len(points))
    inside[near] = winding(points[near], outline)
    return inside.reshape(size, grain, size, grain).mean((1, 3))


def centroid(shape: str) -> tuple[float, float]:
    """Of an outline's area."""
    p = np.array(SHAPES[shape])
    q = np.roll(p, -1, axis=0)
    cross = p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]
    x, y = ((p + q) * cross[:, None]).sum(0) / (3 * cross.sum())
    return float(x), float(y)


def mask_centre(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of masks (..., size, size), in frame widths from the centre."""
    axis = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-1] - 0.5
    total = mask.sum((-1, -2))
    return (mask * axis).sum((-1, -2)) / total, (mask * axis[:, None]).sum((-1, -2)) / total


def empty(scenes: Scenes) -> torch.Tensor:
    """The same scenes (n, 3, f, size, size) with nothing in them: all poses are far outside."""
    away = torch.tensor([9.0, 9.0, 0.1, 0.0]).expand_as(scenes.poses)
    return render(replace(scenes, poses=away))[0]


@pytest.mark.parametrize("size", [32, SIZE])
def test_frames_and_masks_keep_their_ranges(size):
    frames, mask = render(random_scenes(6, seeded()), size)
    assert frames.shape == (6, 3, NUM_FRAMES, size, size)
    assert mask.shape == (6, 1, NUM_FRAMES, size, size)
    assert frames.min() >= -1
    assert frames.max() <= 1
    assert mask.min() == 0
    assert mask.max() == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_is_the_outline_as_a_slow_renderer_fills_it(shape):
    scenes = scenes_of(shape=shape, motion="spinning", times=torch.tensor([[0.15]]), seed=3)
    _, mask = render(scenes)
    expected = slow_cover(shape, scenes.path[0, 0], SIZE)
    difference = np.abs(mask[0, 0, 0].numpy() - expected)
    assert difference.mean() < 0.006
    assert difference.max() < 0.5  # sharp corners are worn
    assert abs(mask.sum().item() / expected.sum() - 1) < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_lies_where_the_path_says(shape):
    scenes = scenes_of(12, shape=shape, motion="spinning", times=torch.rand((12, 2), generator=seeded(1)))
    x, y = mask_centre(render(scenes)[1][:, 0])
    path = scenes.path
    inside = path[..., :2].abs().amax(-1) + 1.5 * path[..., 2] < 0.5
    u, v = centroid(shape)
    cos, sin = path[..., 3].cos(), path[..., 3].sin()
    wanted_x = path[..., 0] + path[..., 2] * (cos * u - sin * v)
    wanted_y = path[..., 1] + path[..., 2] * (sin * u + cos * v)
    assert inside.sum() > 3
    assert (x - wanted_x)[inside].abs().max() * SIZE < 0.3
    assert (y - wanted_y)[inside].abs().max() * SIZE < 0.3


@pytest.mark.parametrize("shape", ["circle", "square", "star", "cross", "gear", "hourglass"])
def test_symmetric_shapes_are_centred_on_their_pose(shape):
    assert max(map(abs, centroid(shape))) < 0.01


def test_edges_are_smooth_at_every_size():
    scenes = random_scenes(12, seeded(4), torch.rand((12, 1), generator=seeded(5)))
    for large, small in zip(render(scenes, 2 * SIZE), render(scenes, SIZE), strict=True):
        halved = torch.nn.functional.avg_pool2d(large.flatten(0, 2)[:, None], 2).view(small.shape)
        assert (halved - small).abs().mean() < 0.01


def test_the_trail_is_the_fading_past():
    scenes = scenes_of(shape="cross", background="night", motion="circling clockwise", times=torch.tensor([[0.7]]))
    past = scenes_of(
        shape="cross", motion="circling clockwise", times=0.7 - TRAIL_STEP * torch.arange(1, TRAIL + 1)[None]
    )
    assert torch.allclose(scenes.poses[0, 0, 1:], past.path[0], atol=1e-5)

    frame, mask = (drawn[0, :, 0] for drawn in render(scenes))
    trail = np.zeros((SIZE, SIZE))
    for strength, (x, y, radius, _) in zip(np.linspace(0.6, 0.15, TRAIL), past.path[0].tolist(), strict=True):
        for row in range(SIZE):
            for column in range(SIZE):
                away = math.hypot((column + 0.5) / SIZE - 0.5 - x, (row + 0.5) / SIZE - 0.5 - y) / radius
                puff = strength * min(max((0.75 - away) / 0.4, 0), 1)  # whole to 0.35 radii, gone at 0.75
                trail[row, column] = max(trail[row, column], puff)
    ground = empty(scenes)[0, :, 0]
    red = torch.tensor(COLOURS["red"])[:, None, None] * 2 - 1
    expected = ground + (red - ground) * torch.tensor(trail, dtype=torch.float32)
    expected = expected + (red - expected) * mask
    assert torch.allclose(frame, expected, atol=1e-5)
    beside = torch.tensor(trail) * (mask[0] == 0)
    assert beside.max() > 0.5  # it shows, and not only under the subject


@pytest.mark.parametrize("texture", [name for name in TEXTURES if name != "plain"])
def test_a_texture_keeps_off_the_outline(texture):
    scene = scenes_of(texture=texture, colour="red", times=torch.zeros(1, 1))
    frame = render(scene)[0][0, :, 0]
    red = torch.tensor(COLOURS["red"]) * 2 - 1
    x, y, radius, _ = scene.path[0, 0].tolist()
    inside, rim = [], []
    for row in range(SIZE):
        for column in range(SIZE):
            away = math.hypot((column + 0.5) / SIZE - 0.5 - x, (row + 0.5) / SIZE - 0.5 - y) / radius
            where = inside if away < 0.92 - 0.25 else rim if 0.92 - 0.09 < away < 0.92 - 0.05 else []
            where.append((frame[:, row, column] - red).abs().max().item())
    assert max(rim) < 1e-4
    assert max(inside) > 0.5


@pytest.mark.parametrize("motion", ["moving left", "moving right", "moving up", "moving down"])
def test_one_frame_tells_the_direction(motion):
    scenes = scenes_of(6, motion=motion, colour="blue", times=torch.full((6, 1), 0.6))
    frames, mask = render(scenes)
    changed = ((frames - empty(scenes)).abs().sum(1) * (mask[:, 0] == 0))[:, 0]
    trail, path = torch.stack(mask_centre(changed), dim=1), scenes.path[:, 0]
    ahead = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[motion.split()[1]]
    assert (((path[:, :2] - trail) * torch.tensor(ahead)).sum(1) > 0.1).all()


def test_captions_name_what_is_there():
    scenes = random_scenes(300, seeded(2), torch.zeros(300, 1))
    said = [CAPTION.fullmatch(caption(scenes, i)) for i in range(len(scenes))]
    assert all(said)
    for field, names in (("texture", TEXTURES), ("shape", SHAPES), ("motion", MOTIONS)):
        numbers = getattr(scenes, field).tolist()
        assert [words[field] for words in said] == [list(names)[number] for number in numbers]
        held_out = {"texture": HELD_OUT_TEXTURES, "shape": HELD_OUT_SHAPES, "motion": HELD_OUT_MOTIONS}[field]
        assert {words[field] for words in said} == set(names) - set(held_out)
    assert {words["background"] for words in said} == set(BACKGROUNDS)
    assert {words["colour"] for words in said} == set(COLOURS)


def test_colours_and_backgrounds_are_those_the_captions_name():
    scenes = random_scenes(40, seeded(3), torch.zeros(40, 1))
    scenes.texture[:] = 0
    frames, mask = (drawn[:, :, 0] for drawn in render(scenes))
    grounds = empty(scenes)[:, :, 0]
    for i in range(40):
        words = CAPTION.fullmatch(caption(scenes, i))
        inside = (frames[i] * (mask[i] == 1)).sum((1, 2)) / (mask[i] == 1).sum()
        assert torch.allclose(inside, torch.tensor(COLOURS[words["colour"]]) * 2 - 1, atol=1e-3)
        mean = {name: torch.tensor(colour) * 2 - 1 for name, colour in BACKGROUNDS.items()}
        nearest = min(mean, key=lambda name: (grounds[i].mean((1, 2)) - mean[name]).norm())
        assert nearest == words["background"]


def test_captions_say_as_much_as_is_asked_for():
    scenes = scenes_of(texture="striped", shape="star", background="sand", motion="circling clockwise")
    assert caption(scenes, 0) == "a striped red star is circling clockwise over the sand"
    assert caption(scenes, 0, texture=False, motion=False) == "a red star over the sand"
    assert caption(scenes, 0, texture=False, motion=False, background=False) == "a red star"


def test_every_subject_can_be_told_from_its_background():
    scenes = random_scenes(3000, seeded(7), torch.zeros(3000, 1))
    pairs = {(list(COLOURS)[c], list(BACKGROUNDS)[b]) for c, b in zip(scenes.colour, scenes.background, strict=True)}
    assert pairs == {(c, b) for c in COLOURS for b in BACKGROUNDS} - UNSEEN
    distances = {pair: math.dist(COLOURS[pair[0]], BACKGROUNDS[pair[1]]) for pair in pairs}
    assert min(distances.values()) > 0.25, min(distances, key=distances.__getitem__)


def test_a_spin_can_be_seen():
    scenes = random_scenes(3000, seeded(8), torch.zeros(3000, 1))
    spins = scenes[scenes.motion == list(MOTIONS).index("spinning")]
    seen = {(WORLD_SHAPES[s], WORLD_TEXTURES[t]) for s, t in zip(spins.shape, spins.texture, strict=True)}
    assert ("circle", "striped") in seen
    assert not seen & {("circle", "plain"), ("circle", "ringed")}


def test_every_texture_shows_both_its_colours_and_differs_from_the_others():
    looks = {}
    for texture in TEXTURES:
        scenes = scenes_of(shape="circle", texture=texture, colour="yellow", times=torch.zeros(1, 1))
        frame, mask = (drawn[0, :, 0] for drawn in render(scenes))
        first = torch.tensor(COLOURS["yellow"])[:, None]
        second = scenes.second[0][:, None]
        pixels = (frame[:, mask[0] == 1] + 1) / 2
        share = ((pixels - first) * (second - first)).sum(0) / (second - first).square().sum()
        assert torch.allclose(pixels, first + (second - first) * share, atol=1e-4)
        assert (share.max() < 1e-4) if texture == "plain" else 0.15 < share.mean() < 0.85
        assert texture == "plain" or ((share < 0.1).float().mean() > 0.1 and (share > 0.9).float().mean() > 0.1)
        looks[texture] = share
    names = list(looks)
    for i, one in enumerate(names):
        assert all((looks[one] - looks[other]).abs().mean() > 0.1 for other in names[:i])


def test_one_seed_gives_one_world():
    first, again, other = (render(random_scenes(3, seeded(seed)), 32) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_single_frames_are_the_clips_own():
    frames, mask = render(random_scenes(4, seeded(9)), 32)
    for index in (0, 5, NUM_FRAMES - 1):
        times = torch.full((4, 1), index / (NUM_FRAMES - 1))
        one, its = render(random_scenes(4, seeded(9), times), 32)
        assert torch.allclose(one[:, :, 0], frames[:, :, index], atol=1e-4)
        assert torch.allclose(its[:, :, 0], mask[:, :, index], atol=1e-4)


def test_a_part_of_the_scenes_is_rendered_as_the_whole():
    scenes = random_scenes(5, seeded(10), torch.full((5, 2), 0.5))
    chosen = torch.tensor([4, 1])
    assert len(scenes[chosen]) == 2
    assert torch.allclose(render(scenes[chosen], 32)[0], render(scenes, 32)[0][chosen], atol=1e-6)
