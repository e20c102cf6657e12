"""The judge as a tracker of the rendered world's subjects, against their true tracks."""

import pytest
import torch

from eval import load_judge
from eval.fidelity import motion_fidelity
from eval.rendered import judge_tracker
from eval.track_errors import TrackErrorSettings, measure, strays
from eval.tracks import Tracks, true_tracks
from train.world import MOTIONS, WORLD_MOTIONS, random_scenes, render


def test_the_judge_tracks_a_rendered_subject_as_it_truly_moves():
    generator = torch.Generator().manual_seed(3)
    scenes = random_scenes(24, generator)
    straight = [i for i in range(24) if WORLD_MOTIONS[scenes.motion[i]].startswith(("moving", "circling"))]
    assert len(straight) > 5
    videos, track = render(scenes)[0], judge_tracker(load_judge())
    for i, true in enumerate(true_tracks(scenes)):
        if i not in straight:
            continue
        seen = track(videos[i].transpose(0, 1))
        assert seen.visible.all()
        way = (seen.points - seen.points[:, :1]).mean(dim=0) - (true.points - true.points[:, :1]).mean(dim=0)
        assert way.norm(dim=-1).mean() < 1  # pixels
        assert motion_fidelity(seen, true) > 0.85
        backwards = Tracks(true.points.flip(1), true.visible)
        if WORLD_MOTIONS[scenes.motion[i]].startswith("moving"):
            assert motion_fidelity(seen, backwards) < -0.85


def test_the_judge_tracks_nothing_where_it_sees_no_subject():
    scenes = random_scenes(1, torch.Generator().manual_seed(0))
    scenes.poses[..., 0] = 5  # far beyond the frame
    tracks = judge_tracker(load_judge())(render(scenes)[0][0].transpose(0, 1))
    assert tracks.points.shape == (0, 16, 2)


def test_strays_are_distances_from_the_point_that_started_there():
    true = Tracks(torch.tensor([[[8.0, 8.0], [10.0, 8.0]], [[20.0, 8.0], [22.0, 8.0]]]), torch.ones(2, 2).bool())
    found = Tracks(
        torch.tensor([[[20.0, 8.0], [22.0, 11.0]], [[60.0, 60.0], [60.0, 60.0]], [[8.0, 8.0], [6.0, 8.0]]]),
        torch.tensor([[True, True], [True, True], [True, False]]),
    )
    off, seen = strays(found, true)
    assert off.tolist() == [[4.0], [3.0]]
    assert seen.tolist() == [[False], [True]]


def test_the_table_of_errors_has_a_row_for_each_motion():
    pytest.importorskip("cv2")
    rows = {row[0]: row[1:] for row in measure(TrackErrorSettings(clips=2)).rows}
    assert list(rows) == list(MOTIONS)
    assert rows["resting"][:3] == ["0.00"] * 3
    assert rows["resting"][4:] == ["-", "-"]
    assert float(rows["moving left"][1]) < 0.5 < float(rows["spinning"][1])
