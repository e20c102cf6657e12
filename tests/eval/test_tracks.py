"""Trackers against motions that are known: by construction, and in the rendered world."""

import pickle
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval.fidelity import motion_fidelity, moving
from eval.tracks import grid_points, load_cotracker, lucas_kanade, true_tracks
from model import UserError
from train.world import MOTIONS, _place, make_scenes, random_scenes, render

STRAIGHT = [name for name in MOTIONS if name.startswith("moving")]


@pytest.fixture
def tracker():
    pytest.importorskip("cv2")
    return lucas_kanade()


def scenes_of(motions, textures=(1, 2, 3), seed=0):
    """A textured subject in each of the named motions."""
    generator = torch.Generator().manual_seed(seed)
    count = len(motions)
    drawn = random_scenes(count, generator)
    texture = torch.tensor([textures[i % len(textures)] for i in range(count)])
    motion = torch.tensor([list(MOTIONS).index(name) for name in motions])
    return make_scenes(drawn.shape, texture, drawn.colour, None, drawn.background, motion, generator)


def frames_of(scenes):
    return render(scenes)[0].transpose(1, 2)


def waves(dx, dy, frames=5, size=48):
    """A smooth grey picture (f, 3, size, size) in [-1, 1] that moves dx, dy pixels a frame, drawn exactly."""
    axis = torch.arange(size).float()
    t = torch.arange(frames)[:, None, None]
    x, y = axis - dx * t, axis[:, None] - dy * t
    grey = (x * 0.5).sin() + (y * 0.6).cos() + (0.4 * x + 0.3 * y).sin() + (0.3 * x - 0.5 * y).cos()
    return grey[:, None].expand(-1, 3, -1, -1) / 4


def test_grid_points_are_cell_centres():
    points = grid_points(2, height=4, width=8)
    assert points.tolist() == [[1.5, 0.5], [5.5, 0.5], [1.5, 2.5], [5.5, 2.5]]


@pytest.mark.parametrize("motion", ["circling clockwise", "growing", "spinning", "hopping and turning"])
def test_true_points_keep_their_place_on_the_subject(motion):
    """The renderer's own coordinates are linear in the pixels, so that sampling them between pixels is exact."""
    scenes = scenes_of([motion] * 3)
    u, v, depth = _place(scenes.shape, scenes.path, 64)
    for scene, tracks in enumerate(true_tracks(scenes)):
        assert len(tracks.points)
        maps = torch.stack([u[scene], v[scene], depth[scene]], dim=1)  # (f, 3, 64, 64)
        grid = ((tracks.points.transpose(0, 1) + 0.5) / 32 - 1)[:, None]
        sampled = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)[:, :, 0]  # (f, 3, n)
        inner = ((tracks.points > 0) & (tracks.points < 63)).all(dim=-1).T
        assert inner.float().mean() > 0.7
        off = (sampled[:, :2] - sampled[:1, :2]).abs().amax(dim=1)
        assert off[inner & inner[:1]].max() < 1e-4
        assert sampled[:, 2][inner].max() < 0.05


def test_true_points_are_all_of_the_grid_on_the_subject():
    scenes = scenes_of(["moving left", "spinning", "growing"])
    _, masks = render(scenes)
    for mask, tracks in zip(masks[:, :, 0], true_tracks(scenes, grid=64), strict=True):
        covered = torch.zeros(64, 64)
        x, y = tracks.points[:, 0].round().long().unbind(-1)
        covered[y, x] = 1
        assert torch.equal(covered.bool(), mask[0] > 0.5)


def test_true_points_are_visible_within_the_frame():
    scenes = scenes_of(["moving right"])
    scenes.poses[..., 0] += 0.3
    (tracks,) = true_tracks(scenes)
    assert torch.equal(tracks.visible, (tracks.points[..., 0] >= -0.5) & (tracks.points[..., 0] <= 63.5))
    assert tracks.visible[:, 0].all()
    assert not tracks.visible[:, -1].all()


def test_lucas_kanade_follows_parts_of_pixels(tracker):
    tracks = tracker(waves(1.3, -0.7))
    assert tracks.points.shape == (256, 5, 2)
    start = tracks.points[:, :1]
    true = start + torch.arange(5.0)[:, None] * torch.tensor([1.3, -0.7])
    inner = ((true > 6) & (true < 41)).all(dim=-1).all(dim=-1)
    assert tracks.visible[inner].all()
    off = (tracks.points - true)[inner].norm(dim=-1)
    assert off.mean() < 0.05  # a step is 1.5 pixels, and a picture has 256 levels
    assert off.max() < 0.5
    assert torch.equal(tracks.points, tracker(waves(1.3, -0.7)).points)


def test_lucas_kanade_loses_what_leaves_and_keeps_its_last_place(tracker):
    axis = torch.arange(64.0)
    across = axis - 50 - torch.arange(16)[:, None, None]  # a blob whose centre leaves the frame in the 14th frame
    blob = 2 * torch.exp(-(across.square() + (axis[:, None] - 32).square()) / 30) - 1
    tracks = tracker(blob[:, None].expand(-1, 3, -1, -1))
    leaving = (tracks.points[:, 0] - torch.tensor([50, 32])).norm(dim=-1) < 4
    assert tracks.visible[leaving, :8].all()
    assert not tracks.visible[leaving, -1].any()
    assert tracks.points.max() <= 63.5
    assert (~tracks.visible).int().diff(dim=1).min() >= 0  # once lost, for good
    stays = ~tracks.visible[:, 1:]
    assert torch.equal(tracks.points[:, 1:][stays], tracks.points[:, :-1][stays])


def test_lucas_kanade_sees_colours_of_one_brightness(tracker):
    red = waves(1, 0.5)[:, 0] * 0.6
    green = -red * 0.299 / 0.587  # the weights of grey
    tracks = tracker(torch.stack([red, green, torch.zeros_like(red)], dim=1))
    true = tracks.points[:, :1] + torch.arange(5.0)[:, None] * torch.tensor([1, 0.5])
    inner = ((true > 6) & (true < 41)).all(dim=-1).all(dim=-1)
    assert (tracks.points - true)[inner].norm(dim=-1).max() < 0.2


def test_lucas_kanade_on_rendered_subjects(tracker):
    """The slowest subject takes 1.45 pixels a frame: what is off by a tenth of that still has its direction to 6
    degrees. 0.04 were measured."""
    scenes = scenes_of(STRAIGHT * 5)
    errors, lost = [], []
    for video, true in zip(frames_of(scenes), true_tracks(scenes), strict=True):
        points, visible = on_subject(tracker(video), true)
        errors.append((points - true.points).norm(dim=-1)[visible])
        lost.append(~visible[:, -1])
    assert torch.cat(errors).median() < 0.145
    assert (torch.cat(errors) < 1).float().mean() > 0.95
    assert torch.cat(lost).float().mean() < 0.15


def on_subject(tracks, true):
    """The tracked points that start where the true ones do."""
    same = torch.cdist(true.points[:, 0], tracks.points[:, 0])
    assert same.amin(dim=1).max() < 1e-3
    return tracks.points[same.argmin(dim=1)], tracks.visible[same.argmin(dim=1)]


def test_motion_fidelity_tells_motions_apart_whatever_moves(tracker):
    names = [*STRAIGHT, "circling clockwise", "bouncing", "zigzagging", "growing"]
    scenes, others = scenes_of(names), scenes_of(names, seed=1)
    looks = replace(others, motion=scenes.motion, poses=scenes.poses)
    found, again = ([moving(tracker(video)) for video in frames_of(s)] for s in (scenes, looks))
    true = [moving(tracks) for tracks in true_tracks(scenes)]
    count = len(names)
    scores = torch.tensor([[motion_fidelity(f, a) for a in again] for f in found])
    same = scores.diagonal()
    different = scores[~torch.eye(count, dtype=torch.bool)]
    assert torch.tensor([motion_fidelity(f, t) for f, t in zip(found, true, strict=True)]).mean() > 0.85
    assert same.mean() > 0.75
    assert different.mean() < 0.4
    assert (same > different.view(count, count - 1).amax(dim=1)).float().mean() >= 0.75


def test_a_video_in_which_nothing_moves_has_no_moving_tracks(tracker):
    flat = tracker(torch.zeros(4, 3, 8, 8))
    assert torch.equal(flat.visible.any(dim=0), torch.tensor([True, False, False, False]))
    still = tracker(waves(0, 0))
    assert still.visible.all()
    for tracks in (flat, still):
        with pytest.raises(UserError, match="nothing moves"):
            motion_fidelity(moving(tracks), moving(tracks))


@pytest.mark.parametrize("make", [lucas_kanade, lambda grid: load_cotracker("no.pth", grid)])
def test_a_grid_without_points_is_refused(make):
    with pytest.raises(UserError, match="at least one point"):
        make(grid=0)


def test_only_videos_are_tracked(tracker):
    with pytest.raises(UserError, match=r"not in \(3, 4, 64, 64\)"):
        tracker(torch.zeros(3, 4, 64, 64))


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[eval\]'"):
        lucas_kanade()


class Predictor(nn.Module):
    """Has the signatures of CoTracker's predictor, version 3.0.0; all points move by 2, -1 pixels a frame."""

    made: "list[Predictor]" = []  # noqa: RUF012

    def __init__(self, checkpoint="./checkpoints/scaled_offline.pth", offline=True, v2=False, window_len=60):
        super().__init__()
        torch.manual_seed(0)
        assert checkpoint is None, "the package must not read pickles"
        assert (offline, v2, window_len) == (True, False, 60)
        self.model = nn.Linear(2, 3)
        self.fed = []
        self.made.append(self)

    def forward(self, video, queries=None, segm_mask=None, grid_size=0, grid_query_frame=0, backward_tracking=False):
        assert queries is None
        assert not self.training
        self.fed.append(video)
        start = grid_points(grid_size, *video.shape[-2:])
        time = torch.arange(video.shape[1])
        tracks = start + time[:, None, None] * torch.tensor([2.0, -1.0])
        visible = (time[:, None] < 3) | (torch.arange(len(start)) == 0)
        return tracks[None], visible[None]


class OlderPredictor(nn.Module):
    def __init__(self, checkpoint="./checkpoints/cotracker2.pth", window_len=8):
        super().__init__()


@pytest.fixture
def package(monkeypatch):
    """Puts a package `cotracker` in place that holds the given predictor."""

    def install(predictor):
        module = ModuleType("cotracker.predictor")
        module.CoTrackerPredictor = predictor
        monkeypatch.setitem(sys.modules, "cotracker", ModuleType("cotracker"))
        monkeypatch.setitem(sys.modules, "cotracker.predictor", module)

    monkeypatch.setattr(Predictor, "made", [])
    return install


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "scaled_offline.pth"
    torch.save({"weight": torch.arange(6.0).view(3, 2), "bias": torch.zeros(3)}, path)
    return path


def test_cotracker_is_fed_bytes_and_its_tracks_come_out_by_point(package, weights):
    package(Predictor)
    tracks = load_cotracker(weights, grid=3)(torch.linspace(-1, 1, 5 * 3 * 8 * 10).view(5, 3, 8, 10))
    (predictor,) = Predictor.made
    assert torch.equal(predictor.model.weight, torch.arange(6.0).view(3, 2))
    (video,) = predictor.fed
    assert video.shape == (1, 5, 3, 8, 10)
    assert torch.allclose(video.flatten(), torch.linspace(0, 255, 1200), atol=1e-3)
    assert tracks.points.shape == (9, 5, 2)
    assert torch.equal(tracks.points[:, 4], grid_points(3, 8, 10) + torch.tensor([8.0, -4.0]))
    assert tracks.visible.tolist() == [[True] * 5] + [[True] * 3 + [False] * 2] * 8


def test_cotracker_leaves_torchs_seed_alone(package, weights):
    package(Predictor)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_cotracker(weights)
    assert torch.equal(torch.rand(1), expected)


def test_cotracker_that_is_not_installed_is_asked_for(package, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "cotracker", None)
    monkeypatch.setitem(sys.modules, "cotracker.predictor", None)
    with pytest.raises(UserError, match=r"pip install git\+https://github.com/facebookresearch/co-tracker"):
        load_cotracker(weights)


def test_cotracker_of_another_version_is_refused(package, weights):
    package(OlderPredictor)
    with pytest.raises(UserError, match="not version 3"):
        load_cotracker(weights)


def test_weights_that_are_not_cotrackers_are_refused(package, tmp_path):
    package(Predictor)
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(4, 4)}, path)
    with pytest.raises(UserError, match="does not hold the weights of CoTracker3"):
        load_cotracker(path)


def test_weights_that_want_to_run_code_are_refused(package, tmp_path):
    package(Predictor)
    path = tmp_path / "hostile.pth"
    torch.save({"weight": Hostile(tmp_path / "ran")}, path, pickle_module=pickle)
    with pytest.raises(UserError, match="wants to run code"):
        load_cotracker(path)
    assert not (tmp_path / "ran").exists()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
