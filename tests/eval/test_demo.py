"""The demonstration, on the narrow random base: its files, its second run, its page, its refusals."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import eval.demo as module
from eval.demo import DemoSettings, demo, main, scores
from eval.demo_inputs import MOTION_WORD, SUBJECT_WORD, photos, reference_clip
from eval.demo_plan import make_plan, prompts
from eval.page import Clip, Page, Row, Score, Step, demo_page, demo_sheet, score_table, spread
from eval.reading import Judge
from model import UserError
from sampling import read_video
from train.vocabulary import SPARE_WORDS
from train.world import HELD_OUT_MOTIONS, HELD_OUT_SUBJECTS

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
        *(f"clips/{kind}.mp4.settings.json" for kind in kinds),
        *("ttt/report.json", "reference.mp4", "contact-sheet.png", "index.html", "demo.json"),
    }
    clips = {kind: read_video(out_of(done) / f"clips/{kind}-1-seed0.mp4", 3, 32, 32) for kind in kinds}
    assert not torch.equal(clips["base"], clips["both"])


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
    demo(stopped)
    first, second = contents(out_of(done)), contents(tmp_path / "demo")
    assert first.keys() == second.keys()
    same = [name for name in first if name.endswith((".mp4", ".png"))]
    assert all(first[name] == second[name] for name in same)


def test_another_subject_wants_another_folder(done):
    with pytest.raises(UserError, match=r"subject_number \(0 there, 3 now\)"):
        demo(replace(done, subject_number=3))
    with pytest.raises(UserError, match="steps"):
        demo(replace(done, motion={"steps": 2, "rank": 2}))


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
    assert prompts(DemoSettings()) == ("a zor", "a plain blue square is dax", "a zor is dax over the road")
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


def test_the_sheet_has_five_rows_of_eight_and_enlarges_by_whole_pixels():
    pictures = [torch.full((3, 64, 64), -0.5), torch.full((3, 64, 64), 0.5)]
    clip = torch.linspace(-1, 1, 16).view(16, 1, 1, 1).expand(16, 3, 64, 64)
    sheet = demo_sheet(pictures, clip, [clip, -clip, clip[:4]])
    assert sheet.shape == (3, 5 * 130 + 2, 8 * 130 + 2)

    def cell(row, column):
        top, left = 2 + 130 * row, 2 + 130 * column
        return sheet[:, top : top + 128, left : left + 128]

    assert (cell(0, 1) == 0.5).all()
    assert (cell(0, 2) == 1).all()
    for row, expected in ((1, clip), (2, clip), (3, -clip)):
        assert torch.equal(torch.stack([cell(row, i)[0, 0, 0] for i in range(8)]), spread(expected)[:, 0, 0, 0])
    assert (cell(1, 0) == -1).all()
    assert (cell(1, 7) == 1).all()
    assert (cell(4, 4) == 1).all()
    assert demo_sheet(pictures, clip, [clip] * 3).shape == sheet.shape
    # pictures too large to need it stay as they are
    assert demo_sheet([torch.zeros(3, 256, 256)], torch.zeros(2, 3, 256, 256), []).shape == (3, 518, 2066)


def test_scores_are_of_what_was_rendered_for_the_tiny_base(monkeypatch):
    judge = Judge().eval()  # untrained: what it sees is the same in the same frames
    monkeypatch.setattr(module, "load_judge", lambda: judge)
    pictures, reference = photos(0, 64, seed=0)[0], reference_clip(0, 4, 64, seed=0)
    videos = {"both": torch.stack([reference, reference.flip(0)]), "ttt": pictures[None]}
    found = scores(DemoSettings(), pictures, reference, videos)
    assert found["path"]["both"][0] == 0
    assert found["path"]["both"][1] > 0
    assert found["identity"]["ttt"][0] > max(found["identity"]["both"])
    assert scores(DemoSettings(images="mine"), pictures, reference, videos).keys() == {"path"}
    assert scores(DemoSettings(video="mine"), pictures, reference, videos).keys() == {"identity"}
    assert scores(DemoSettings(base="sd15"), pictures, reference, videos) == {}
    small = {kind: clips[..., ::2, ::2] for kind, clips in videos.items()}
    assert scores(DemoSettings(), pictures[..., ::2, ::2], reference[..., ::2, ::2], small) == {}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def page(evil):
    rows = [
        Row("base", "alone", [Clip(f"{evil}.mp4", 0, {"path": 0.5}), Clip("b.mp4", 1, {"path": 0.7})]),
        Row(evil, evil, [Clip("c.mp4", 0)]),
    ]
    steps = [Step(evil, 12.3, {evil: [evil]})]
    return Page(evil, evil, evil, evil, [f"{evil}.png"], f"{evil}.mp4", evil, rows, steps, {"path": Score(evil, evil)})


def test_nothing_that_is_shown_becomes_html():
    evil = "\"'><script>alert(1)</script>&amp;"
    tags, plain = Tags(), Tags()
    tags.feed(demo_page(page(evil)))
    plain.feed(demo_page(page("word")))
    assert [name for name, _ in tags.seen] == [name for name, _ in plain.seen]
    assert [attributes.keys() for _, attributes in tags.seen] == [attributes.keys() for _, attributes in plain.seen]
    assert tags.text == plain.text.replace("word", evil)
    sources = [attributes["src"] for name, attributes in tags.seen if name == "video"]
    assert sources[0] == "%22%27%3E%3Cscript%3Ealert%281%29%3C/script%3E%26amp%3B.mp4"


def test_the_table_holds_means_and_says_how_to_read_them():
    lines = score_table(page("thing")).splitlines()
    assert lines[1].split() == ["base", "0.600"]
    assert lines[2].split() == ["thing", "-"]
    assert lines[-1] == "thing: thing"
    assert score_table(replace(page("thing"), legend={})) == ""
