"""What a motion is learned from: one clip, random windows of a longer one, several clips that share it."""

import pytest
import torch
from conftest import small_base
from small_runs import motion

import train.motion
from model import LatentDistribution, UserError
from sampling import read_video, write_media
from train.motion import train_motion, windows
from weights import read_lora_header


@pytest.fixture(scope="module")
def base(files):
    """One for all runs, each of which leaves it as it was."""
    return small_base(files)


def seen(base, material, out, monkeypatch, **changes):
    """The clean latents and the text of every step, the latents' noise left out."""
    steps, predict = [], train.motion.predict

    def watched(unet, schedule, latents, text, *rest, **options):
        steps.append((latents, text))
        return predict(unet, schedule, latents, text, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.motion, "predict", watched)
        patch.setattr(train.motion, "draw", lambda latents, generator: latents.mean)
        train_motion(motion(material, out, **{"learning_rate": 1e-12, "rank": 1, **changes}), base)
    return steps


def means(base, frames):
    """Scaled means of the latents of each frame, (f, 4, h / 8, w / 8)."""
    return 0.18215 * base.vae.encode(frames).chunk(2, dim=1)[0]


def starts(latents, frames):
    """Where in the clip each member's window (b, 4, f, h, w) lies; every frame of it must be the clip's."""
    length = latents.shape[2]
    found = []
    for its in latents.transpose(1, 2):
        fits = [torch.allclose(its, frames[i : i + length], atol=1e-5) for i in range(len(frames) - length + 1)]
        assert sum(fits) == 1
        found.append(fits.index(True))
    return found


def test_windows_lie_within_the_clip_and_start_everywhere():
    frames = torch.arange(9.0).reshape(1, 1, 9, 1, 1)
    generator = torch.Generator().manual_seed(0)
    cut = windows(LatentDistribution(frames, -frames), 4, 300, generator)
    assert cut.mean.shape == (300, 1, 4, 1, 1)
    assert torch.equal(cut.std, -cut.mean)
    first = cut.mean[:, :, :1]
    assert torch.equal(cut.mean, first + torch.arange(4.0).reshape(1, 1, 4, 1, 1))
    counts = first.flatten().int().bincount()
    assert len(counts) == 6
    assert counts.min() > 25


def test_a_clip_of_the_steps_own_length_draws_nothing():
    """So that runs on it are what they were before there were windows."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    frames = torch.rand(1, 4, 3, 2, 2)
    cut = windows(LatentDistribution(frames, frames), 3, 2, generator)
    assert torch.equal(cut.mean, frames.expand(2, -1, -1, -1, -1))
    assert torch.equal(generator.get_state(), before)


def test_a_step_sees_a_window_of_a_longer_clip(base, material, tmp_path, monkeypatch):
    changes = {"clip_frames": 5, "steps": 5, "batch_size": 2}
    steps = seen(base, material, tmp_path / "run", monkeypatch, **changes)
    frames = means(base, read_video(material / "clip.mp4", 5, 32, 32))
    found = [starts(latents, frames) for latents, _ in steps]
    assert {start for step in found for start in step} == {0, 1, 2}
    assert any(len(set(step)) > 1 for step in found)
    again = seen(base, material, tmp_path / "again", monkeypatch, **changes)
    assert [starts(latents, frames) for latents, _ in again] == found


def test_several_videos_share_one_lora_each_under_its_words(base, material, tmp_path, monkeypatch):
    other = torch.rand(5, 3, 32, 32) * 2 - 1
    for i, frame in enumerate(other):
        write_media(tmp_path / "frames" / f"{i}.png", frame[None])
    changes = {"more_videos": [str(tmp_path / "frames")], "steps": 6, "clip_frames": 4}
    steps = seen(base, material, tmp_path / "run", monkeypatch, more_prompts=["a dog runs"], **changes)
    clips = [means(base, read_video(path, 4, 32, 32)) for path in (material / "clip.mp4", tmp_path / "frames")]
    texts = base.embed(["a man runs", "a dog runs"])
    which = []
    for latents, text in steps:
        which.append(next(i for i in (0, 1) if torch.allclose(text[0], texts[i], atol=1e-5)))
        starts(latents, clips[which[-1]])
    assert set(which) == {0, 1}
    header = read_lora_header(tmp_path / "run")
    assert [entry.prompt for entry in header.adapters.values()] == ["a man runs"]
    steps = seen(base, material, tmp_path / "same", monkeypatch, **{**changes, "steps": 2})
    assert all(torch.allclose(text[0], texts[0], atol=1e-5) for _, text in steps)


def test_a_finished_run_knows_its_videos_by_their_contents(base, material, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((material / "clip.mp4").read_bytes())
    first = motion(material, tmp_path / "run", steps=1, more_videos=[str(tmp_path / "a.mp4")])
    assert train_motion(first, base) == train_motion(first, base)
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "a.mp4").rename(tmp_path / "moved" / "a.mp4")
    assert train_motion(motion(material, tmp_path / "run", steps=1, more_videos=[str(moved)]), base)
    write_media(moved, torch.rand(5, 3, 32, 32), fps=8)
    for videos in ([str(moved)], []):
        with pytest.raises(UserError, match=r"the contents of video 2: a\.mp4"):
            train_motion(motion(material, tmp_path / "run", steps=1, more_videos=videos), base)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clip_frames": 2}, "clip_frames must be at least num_frames, 3, and is 2"),
        ({"clip_frames": 6}, r"clip\.mp4 .* 5 of the 6 .* Lower clip_frames\."),
        ({"num_frames": 6}, r"clip\.mp4 .* 5 of the 6 .* Lower num_frames\."),
        ({"more_videos": ["none.mp4"]}, "none.mp4 does not exist"),
        ({"more_prompts": ["a dog"]}, "1 --more_prompts for 0 --more_videos: give one for each"),
        ({"more_videos": ["clip", "clip"], "more_prompts": ["a dog"]}, "1 --more_prompts for 2 --more_videos"),
        ({"more_videos": ["clip"], "clip_frames": 6}, r"clip\.mp4.*5"),
    ],
)
def test_bad_sources_are_refused_and_leave_nothing(base, material, tmp_path, changes, says):
    if "clip" in changes.get("more_videos", []):
        changes = {**changes, "more_videos": [str(material / "clip.mp4") for _ in changes["more_videos"]]}
    with pytest.raises(UserError, match=says):
        train_motion(motion(material, tmp_path / "run", **changes), base)
    assert not (tmp_path / "run").exists()
