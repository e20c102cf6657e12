"""The judge as a tracker of the rendered world's subjects, against their true tracks."""

import torch

from eval import load_judge
from eval.fidelity import motion_fidelity
from eval.rendered import judge_tracker
from eval.tracks import Tracks, true_tracks
from train.world import WORLD_MOTIONS, random_scenes, render


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
