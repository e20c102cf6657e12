"""The demonstration, on the narrow random base: its files, its second run, its page, its refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval.demo as module
import eval.reading
from eval.demo import DemoSettings, demo, main, scores
from eval.demo_inputs import MOTION_WORD, SUBJECT_WORD, photos, reference_clip
from eval.demo_plan import make_plan, prompts
from eval.reading import Judge, read_clip
from lora import adapter_names
from model import UserError
from sampling import read_video
from train.vocabulary import SPARE_WORDS
from train.world import HELD_OUT_MOTIONS, HELD_OUT_SUBJECTS
from weights import find_record

SMALL = {
    "height": 32,
    "width": 32,
    "num_frames": 3,
    "clips": 2,
    "appearance": {"steps": 1, "rank": 2},
    "motion": {"steps": 1, "rank": 2},
    "ttt": {"steps": 1, "reference_steps": 1},
    "generate": {"steps": 2},
}
LORA = {"settings.json", "inputs.json", "log.csv", "lora.safetensors"}


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    """Settings of a demo that has run."""
    settings = DemoSettings(**files.flags(), **SMALL, out=str(tmp_path_factory.mktemp("demos") / "demo"))
    demo(settings)
    return settings


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("**/*") if file.is_file()}


def out_of(settings):
    return Path(settings.out)


def test_it_leaves_inputs_loras_clips_sheet_and_page(done):
    kinds = ("base", "both", "ttt")
    assert contents(out_of(done)).keys() == {
        *(f"photos/000{i}.png" for i in range(4)),
        *(f"{stage}/{name}" for stage in ("appearance", "motion", "ttt") for name in LORA),
        *(f"clips/{kind}-1-seed{seed}.mp4" for kind in kinds for seed in (0, 1)),
        *(f"clips/{kind}-1-seed{seed}.mp4.record.json" for kind in kinds for seed in (0, 1)),
        *("ttt/report.json", "reference.mp4", "contact-sheet.png", "index.html", "demo.json"),
    }
    clips = {kind: read_video(out_of(done) / f"clips/{kind}-1-seed0.mp4", 3, 32, 32) for kind in kinds}
    assert not torch.equal(clips["base"], clips["both"])


def test_each_kind_of_clip_is_made_with_its_own_loras(done):
    out = out_of(done)
    kept = {kind: find_record(out / f"clips/{kind}-1-seed1.mp4") for kind in module.KINDS}
    loras = {"base": [], "both": [str(out / "appearance"), str(out / "motion")], "ttt": [str(out / "ttt")]}
    assert {kind: its.settings["lora"] for kind, its in kept.items()} == loras
    assert all((its.prompt, its.seed) == ("a zor is dax over the road", 1) for its in kept.values())


def test_the_page_shows_every_file_and_every_step(done):
    page = (out_of(done) / "index.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'src="([^"]*)"', page))
    assert shown == {name for name in contents(out_of(done)) if name.endswith((".mp4", ".png"))} - {"contact-sheet.png"}
    assert "steps 1, learning_rate 1e-05" in page
    assert "steps 2, guidance_scale 9.0, seed 0 1" in page
    assert "Scores" not in page  # the judge knows the tiny base's world alone


def test_a_second_run_loads_no_base_and_leaves_the_same_files(done, monkeypatch, capsys):
    before = contents(out_of(done))
    monkeypatch.setattr(module, "open_base", lambda settings: pytest.fail("the base was loaded"))
    demo(done)
    assert contents(out_of(done)) == before
    assert capsys.readouterr().out.count("(was done)") == 5


def test_what_was_stopped_goes_on_to_the_same_result(done, tmp_path, monkeypatch):
    stopped = replace(done, out=str(tmp_path / "demo"))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "train_motion", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo(stopped)
    seconds = json.loads((tmp_path / "demo" / "demo.json").read_text())["seconds"]
    assert seconds.keys() == {"inputs", "appearance", "motion"}
    with monkeypatch.context() as patched:
        patched.setattr(module, "train_motion", lambda *_: pytest.fail("trained"))
        with pytest.raises(UserError, match="generate: eta must be from 0"):
            demo(replace(stopped, generate={"eta": 3}))
    demo(stopped)
    first, second = contents(out_of(done)), contents(tmp_path / "demo")
    assert first.keys() == second.keys()
    pictures = [name for name in first if name.endswith(".png")]
    assert all(first[name] == second[name] for name in pictures)
    for name in (name for name in first if name.endswith(".mp4")):  # their records name the LoRAs of either folder
        clips = [read_video(folder / name, 3, 32, 32) for folder in (out_of(done), tmp_path / "demo")]
        assert torch.equal(*clips)


def test_another_subject_wants_another_folder(done):
    with pytest.raises(UserError, match=r"subject_number \(4 there, 3 now\)"):
        demo(replace(done, subject_number=3))
    with pytest.raises(UserError, match="steps"):
        demo(replace(done, motion={"steps": 2, "rank": 2}))


@pytest.mark.parametrize(("base", "seen"), [("tiny", "a wug is resting"), ("sd15.safetensors", "a wug")])
def test_photos_of_ones_own_are_described_as_the_base_wants_it(material, base, seen):
    settings = DemoSettings(base=base, images=str(material / "photos"), subject_prompt="a wug")
    assert make_plan(settings).looks.prompt == seen


def test_photos_and_a_clip_of_ones_own(files, material, tmp_path):
    settings = DemoSettings(
        **files.flags(),
        **{**SMALL, "clips": 1},
        out=str(tmp_path / "a demo"),
        images=str(material / "photos"),
        video=str(material / "clip.mp4"),
        subject_prompt="a <b>teddy</b> bear",
        motion_prompt="a man runs",
        prompt="a teddy bear runs",
    )
    demo(settings)
    out = tmp_path / "a demo"
    assert len(list((out / "photos").iterdir())) == 3
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;teddy&lt;/b&gt; bear" in page
    assert "<b>" not in page
    assert (out / "clips" / "ttt.mp4").is_file()
    kept = json.loads((out / "appearance" / "settings.json").read_text())
    assert kept["images"] == str(material / "photos")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "photos"], "--subject_prompt"),
        (["--video", "clip.mp4"], "--motion_prompt"),
        (["--video", "clip.mp4", "--motion_prompt", "a man runs"], "--prompt"),
        (["--images", "nowhere", "--subject_prompt", "a bear"], "nowhere"),
        (["--video", "nowhere.mp4", "--motion_prompt", "a", "--prompt", "b"], "nowhere.mp4"),
        (["--subject_number", "5"], "subject_number must be from 0 to 4"),
        (["--motion_number", "-1"], "motion_number must be from 0 to 4"),
        (["--clips", "0"], "clips must be"),
        (["--seed", "-1"], "seed from 0"),
        (["--num_frames", "0"], "num_frames"),
        (["--subject_prompt", " "], "prompt is empty"),
    ],
)
def test_bad_flags_are_refused_before_any_work(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "open_base", lambda settings: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=re.escape(message)):
        main(flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tables",
    [{"appearance": {"images": "a"}}, {"ttt": {"height": 32}}, {"generate": {"stepz": 3}}, {"motion": {"base": "b"}}],
)
def test_bad_tables_are_refused(tables, tmp_path):
    with pytest.raises(UserError, match=r"images|height|stepz|base"):
        make_plan(DemoSettings(out=str(tmp_path / "demo"), **tables))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ttt": {"steps": 0}}, "ttt: steps must be at least 1"),
        ({"ttt": {"dropout": 1}}, "ttt: rank must be at least 1 and dropout within"),
        ({"ttt": {"reference_steps": 2000}}, "ttt: reference_steps must be from 1 to 1000"),
        ({"appearance": {"learning_rate": 5}}, "appearance: steps must be"),
        ({"appearance": {"layers": [9]}}, "appearance: layer 9 has no spatial transformer"),
        ({"motion": {"layers": [-1]}}, "motion: layer -1 has no motion module"),
        ({"motion": {"rank": 0}}, "motion: rank must be at least 1"),
        ({"motion": {"frame_step": 2}}, "motion: fps, frame_step and start"),
        ({"generate": {"steps": 5000}}, "generate: 5000 sampling steps"),
        ({"generate": {"eta": 3}}, "generate: eta must be from 0"),
        ({"num_frames": 33}, "num_frames must be at most 32"),
        ({"width": 64}, "rendered square, and not 32 high and 64 wide"),
    ],
    ids=str,
)
def test_numbers_that_a_step_would_refuse_are_refused_before_any_work(change, message, base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_base", lambda settings: base)
    names = [name for name, _ in base.unet.named_modules()]
    with pytest.raises(UserError, match=re.escape(message)):
        demo(DemoSettings(out=str(tmp_path / "demo"), **change))
    assert not (tmp_path / "demo").exists()
    assert not adapter_names(base.unet)
    assert [name for name, _ in base.unet.named_modules()] == names


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("judge", "judge.safetensors")])
def test_scores_that_no_judge_could_give_are_told_before_any_work(base, text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_base", lambda settings: base)
    monkeypatch.setattr(eval.reading, "JUDGE", tmp_path / "judge.safetensors")
    if text is not None:
        (tmp_path / "judge.safetensors").write_text(text)
    with pytest.raises(UserError, match=message):
        demo(DemoSettings(out=str(tmp_path / "demo"), height=64, width=64))
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis.txt: give --out a new name"):
        demo(DemoSettings(out=str(tmp_path)))
    with pytest.raises(UserError, match="is no folder"):
        demo(DemoSettings(out=str(tmp_path / "thesis.txt")))
    (tmp_path / "demo.json").write_text('{"settings": 1}')
    with pytest.raises(UserError, match="no demo's record"):
        demo(DemoSettings(out=str(tmp_path)))


def test_a_base_without_motion_modules_is_refused_and_nothing_written(files, tmp_path):
    settings = DemoSettings(base=str(files.folder), device="cpu", out=str(tmp_path / "demo"))
    with pytest.raises(UserError, match="--motion_module"):
        demo(settings)
    assert not (tmp_path / "demo").exists()


def test_prompts_follow_the_subject():
    assert prompts(DemoSettings()) == ("a zor", "a plain yellow circle is dax", "a zor is dax over the road")
    assert {SUBJECT_WORD, MOTION_WORD} <= set(SPARE_WORDS)
    assert prompts(DemoSettings(subject_prompt="a wug"))[2] == "a wug is dax over the road"


@pytest.mark.parametrize("number", range(5))
def test_every_held_out_subject_and_motion_can_be_rendered(number):
    assert len(HELD_OUT_SUBJECTS) == len(HELD_OUT_MOTIONS) == 5
    pictures, clip = photos(number, 32, seed=1)[0], reference_clip(number, 6, 32, seed=1)
    assert pictures.shape == (4, 3, 32, 32)
    assert clip.shape == (6, 3, 32, 32)
    assert torch.equal(pictures, photos(number, 32, seed=1)[0])
    assert not torch.equal(pictures, photos(number, 32, seed=2)[0])
    # four backgrounds, and a subject that moves
    assert len({tuple((10 * p[:, 0, 0]).round().tolist()) for p in pictures}) == 4
    assert (clip.diff(dim=0).abs().mean(dim=(1, 2, 3)) > 1e-3).all()


def test_scores_are_of_what_was_rendered_for_the_tiny_base(monkeypatch):
    judge = Judge().eval()  # untrained: what it sees is the same in the same frames
    monkeypatch.setattr(module, "load_judge", lambda: judge)
    pictures, reference = photos(0, 64, seed=0)[0][:1].repeat(4, 1, 1, 1), reference_clip(0, 4, 64, seed=0)
    videos = {"both": torch.stack([reference, reference.flip(0)]), "ttt": pictures[None]}
    found = scores(DemoSettings(), pictures, reference, videos)
    assert found["path"]["both"][0] == 0
    assert found["path"]["both"][1] > 0
    assert found["identity"]["ttt"] == pytest.approx([1], abs=1e-4)  # four frames that are the photos themselves
    assert max(found["identity"]["both"]) < 0.95
    x, y = read_clip(judge, reference.transpose(0, 1)[None]).path[0, :, :2].unbind(1)
    away, wide = torch.hypot(x - x[0], y - y[0]).mean(), torch.hypot(x.max() - x.min(), y.max() - y.min())
    assert found["path"]["still"] == pytest.approx([(away / wide).item()])
    assert scores(DemoSettings(images="mine"), pictures, reference, videos).keys() == {"path"}
    assert scores(DemoSettings(video="mine"), pictures, reference, videos).keys() == {"identity"}
    assert scores(DemoSettings(base="sd15"), pictures, reference, videos) == {}
    small = {kind: clips[..., ::2, ::2] for kind, clips in videos.items()}
    assert scores(DemoSettings(), pictures[..., ::2, ::2], reference[..., ::2, ::2], small) == {}
