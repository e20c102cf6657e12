"""`customttt score`: files in, a table and JSON out."""

import json
from dataclasses import asdict

import pytest
import torch
from one_scene import scenes_of

import customttt
from eval.score import ScoreSettings, found_clips, score_files, table
from eval.scoring import ScorerSettings, open_scorers, score_clips, score_diversity
from model import UserError
from sampling import write_media
from sampling.generate import GenerateSettings, clip_files
from sampling.whole import read_whole
from train.world import render
from weights import Record, record_file

pytest.importorskip("cv2")

PROMPTS = ["a plain blue square is moving right over the sand", "a dotted red star over the road"]
LOOKS = [("square", "plain", "blue", "sand"), ("star", "dotted", "red", "road")]


def clip_of(looks, motion="moving right", seed=0):
    return render(scenes_of(1, *looks, motion, seed=seed))[0][0].transpose(0, 1)


def record(prompt, seed):
    nothing = {name: {} for name in ("settings", "filled", "files", "fingerprints", "versions")}
    whole = Record(
        customttt="0", prompt=prompt, seed=seed, prompts=[prompt], seeds=[seed], base="tiny", threads=1, **nothing
    )
    return asdict(whole)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Clips with all that `customttt score` reads of the records that `customttt generate` leaves: two prompts with two
    seeds; photos and reference.
    """
    root = tmp_path_factory.mktemp("made")
    settings = GenerateSettings(prompt=PROMPTS, seed=[0, 1], out=str(root / "clips" / "x.mp4"))
    for prompt, seed, path in clip_files(settings):
        write_media(path, clip_of(LOOKS[PROMPTS.index(prompt)], seed=seed), fps=8, metadata=record(prompt, seed))
    write_media(root / "photos", clip_of(LOOKS[1], "resting")[:2])
    write_media(root / "reference.mp4", clip_of(LOOKS[0]), fps=8)
    return root


def flags(root, **more):
    given = {"video": root / "clips", "images": root / "photos", "reference": root / "reference.mp4", "device": "cpu"}
    return [word for name, value in (given | more).items() if value is not None for word in (f"--{name}", str(value))]


def test_a_whole_run_and_its_json_are_the_numbers_of_score_clips(made, tmp_path, capsys):
    assert customttt.command(["score", *flags(made, out=tmp_path / "s.json", published="true")]) is None
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "s.json").read_text())
    files = sorted((made / "clips").glob("*.mp4"))
    prompts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [(clip["video"], clip["prompt"]) for clip in result["clips"]] == list(
        zip(map(str, files), prompts, strict=True)
    )
    scorers = open_scorers(ScorerSettings(device="cpu"))
    videos = [read_whole(file)[0] for file in files]
    images = read_whole(made / "photos")[0]
    expected = score_clips(scorers, videos, prompts, images, read_whole(made / "reference.mp4")[0])
    diverse = score_diversity(scorers, videos, prompts)
    assert result["diversity"] == pytest.approx(diverse)
    for clip, row, prompt in zip(result["clips"], expected, prompts, strict=True):
        found = {name: clip[name] for name in result["means"] if clip[name] is not None}
        assert found == pytest.approx(row | {"diversity": diverse[prompt]})
        assert (clip["frames"], clip["fps"]) == (16, 8)
    for name, value in result["means"].items():
        numbers = [clip[name] for clip in result["clips"] if clip[name] is not None]
        assert value == pytest.approx(sum(numbers) / len(numbers))
    # the first clip is the reference: it moves the same, and what it shows of it was asked for; points that are lost
    # stand still from then on, which is like nothing, so that even here fidelity is not 1
    first = result["clips"][0]
    assert 0.9 < first["motion_fidelity"] <= 1
    assert first["path_error"] == pytest.approx(0, abs=1e-5)
    assert (first["leak_shape"], result["clips"][2]["leak_shape"]) == (None, 0)
    lines = shown.splitlines()
    row = next(line.split() for line in lines if line.startswith(files[0].name))
    assert row[1:] == ["-" if first[name] is None else f"{first[name]:.3f}" for name in result["means"]]
    for text in (
        "mean of 4",
        "tiny CLIP, DreamVideo's protocol",
        "Lucas-Kanade",
        "chance level: ",
        "published fidelity:",
    ):
        assert text in shown
    assert result["notes"] == []
    assert max(map(len, lines)) < 150


def test_what_cannot_be_taken_is_a_dash_and_said(made, tmp_path, capsys):
    write_media(tmp_path / "still.gif", clip_of(LOOKS[1])[:1].repeat(16, 1, 1, 1), fps=8)
    write_media(tmp_path / "short.mp4", clip_of(LOOKS[1])[:9], fps=8)
    more = {"video": tmp_path, "images": None}
    with pytest.warns(UserWarning, match="has no motion fidelity") as warned:
        result = score_files(ScoreSettings(video=[str(tmp_path)], reference=str(made / "reference.mp4"), device="cpu"))
    assert result["notes"] == [str(warning.message) for warning in warned]
    said = "\n".join(result["notes"])
    assert "no --prompt, and none was kept beside short.mp4 and 1 more" in said
    assert "short.mp4 has 9 frames and the reference 16: the first 9" in said
    assert "still.gif has no motion fidelity" in said
    short, still = result["clips"]
    assert still["motion_fidelity"] is None
    assert short["motion_fidelity"] > 0
    assert "clip_t" not in still
    (line,) = (line for line in table(result).splitlines() if line.startswith("still.gif"))
    assert " - " in line
    with pytest.raises(UserError, match="nothing moves in the"), pytest.warns(UserWarning, match="none was kept"):
        customttt.command(["score", *flags(made, **more, reference=tmp_path / "still.gif")])


def test_the_reference_is_taken_at_the_clips_rate(made, tmp_path):
    twice = clip_of(LOOKS[0]).repeat_interleave(2, dim=0)
    write_media(tmp_path / "fast.mp4", twice, fps=16)
    video = [str(made / "clips" / "x-1-seed0.mp4")]
    common = {"video": video, "reference": str(tmp_path / "fast.mp4"), "device": "cpu"}
    with pytest.warns(UserWarning, match="of its 32 frames 16 were taken"):
        result = score_files(ScoreSettings(**common))
    assert result["clips"][0]["path_error"] < 0.03
    with pytest.warns(UserWarning, match="the reference 32: the first 16"):
        slow = score_files(ScoreSettings(**common, resample=False))
    assert result["clips"][0]["motion_fidelity"] > slow["clips"][0]["motion_fidelity"] + 0.2


def test_prompts_given_go_before_those_kept(made):
    files = [str(made / "clips" / f"x-{i}-seed0.mp4") for i in (1, 2)]
    kept = score_files(ScoreSettings(video=files, device="cpu"))["clips"]
    same = score_files(ScoreSettings(video=files, prompt=PROMPTS, device="cpu"))["clips"]
    swapped = score_files(ScoreSettings(video=files, prompt=PROMPTS[::-1], device="cpu"))["clips"]
    assert kept == same
    assert all(a["clip_t"] > b["clip_t"] + 0.1 for a, b in zip(kept, swapped, strict=True))
    one = score_files(ScoreSettings(video=files, prompt=PROMPTS[:1], device="cpu"))
    assert [clip["prompt"] for clip in one["clips"]] == PROMPTS[:1] * 2
    assert one["clips"][0]["diversity"] == one["diversity"][PROMPTS[0]] > 0


def test_folders_of_clips_and_of_pictures(made, tmp_path):
    for name in ("b10", "b9"):
        write_media(tmp_path / name, torch.zeros(2, 3, 8, 8))
    assert found_clips([str(tmp_path)]) == [tmp_path / "b9", tmp_path / "b10"]
    assert found_clips([str(tmp_path / "b9")]) == [tmp_path / "b9"]
    write_media(tmp_path / "a.gif", torch.zeros(2, 3, 8, 8))
    assert found_clips([str(tmp_path)]) == [tmp_path / "a.gif"]
    assert [path.name for path in found_clips([str(made / "clips")])] == [
        f"x-{i}-seed{j}.mp4" for i in (1, 2) for j in (0, 1)
    ]


def test_bad_input_is_named(made, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no clip at all\n" * 100)
    (tmp_path / "nothing.mp4").write_bytes(b"")
    write_media(tmp_path / "one.png", torch.zeros(1, 3, 8, 8))
    clip = made / "clips" / "x-1-seed0.mp4"
    for given, said in [
        ({"video": tmp_path / "missing"}, "missing does not exist"),
        ({"video": tmp_path / "empty"}, "empty holds no clips"),
        ({"video": tmp_path / "text.mp4"}, r"text\.mp4 cannot be read"),
        ({"video": tmp_path / "nothing.mp4"}, "0 bytes"),
        ({"video": tmp_path / "one.png"}, "has one frame"),
        ({"images": tmp_path / "missing.png"}, r"missing\.png cannot be opened"),
        ({"reference": tmp_path / "missing.mp4"}, r"missing\.mp4 cannot be opened"),
        ({"images": made / "reference.mp4"}, "given as a photo, and is a video of 16 frames"),
        ({"prompt": "  "}, "--prompt is empty"),
        ({"clip": tmp_path / "nowhere"}, "openai/clip-vit-base-patch32"),
        ({"lpips": tmp_path / "nowhere"}, "LPIPS needs"),
        ({"tracker": "cotracker"}, "scaled_offline"),
    ]:
        with pytest.raises(UserError, match=said):
            customttt.command(["score", *flags(made, **{"video": clip, "prompt": "a star", **given})])
    with pytest.raises(UserError, match="2 prompts for 1 clips"):
        score_files(ScoreSettings(video=[str(clip)], prompt=["a", "b"], device="cpu"))
    with pytest.raises(UserError, match="given twice"):
        score_files(ScoreSettings(video=[str(clip), str(clip)], device="cpu"))


def test_records_of_nonsense_do_not_stop_it(made, tmp_path):
    texts = ["{", "[]", '{"customttt": "0"}', json.dumps({**record("a", 0), "prompt": 3})]
    for i, text in enumerate(texts):
        write_media(tmp_path / f"{i}.gif", clip_of(LOOKS[0]))
        record_file(tmp_path / f"{i}.gif").write_text(text)
    with pytest.warns(UserWarning, match="does not tell its prompt") as said:
        result = score_files(ScoreSettings(video=[str(tmp_path)], device="cpu"))
    assert len(said) == len(texts) + 1
    assert "clip_t" not in result["means"]


def test_prompts_are_found_where_nothing_can_be_written(made, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args: False)
    files = [str(made / "clips" / "x-1-seed0.mp4")]
    assert score_files(ScoreSettings(video=files, device="cpu"))["clips"][0]["prompt"] == PROMPTS[0]
