"""Grids of Customize-A-Video's arms: motions alone, absorbers under the motion LoRA, and joint's motion LoRA alone."""

import dataclasses
import json
from pathlib import Path

import pytest
from grids import QUICK, settings_for
from safetensors.torch import load_file

import eval.ablate
from eval.ablate import Result, ablate
from eval.ablate_page import interval, leaks_table
from eval.grid import Cell, cells
from eval.grid_settings import GridSettings, check_grid
from eval.stages import with_token
from model import UserError
from weights import parse_settings

MOTION = {"name": "rolling", "prompt": "a ball is rolling"}
ARMS = {
    "no absorber": {"motion": QUICK},
    "LoRA": {"absorber": {**QUICK, "kind": "lora", "crops": "2"}, "motion": QUICK},
    "token": {"absorber": {"kind": "token", "steps": "1", "crops": "2"}, "motion": QUICK},
    "dual": {"absorber": {**QUICK, "token": "<it>", "initializer": "dog", "crops": "2"}, "motion": QUICK},
    "joint": {"joint": QUICK},
}


def absorber_grid(tmp_path, material, **changed):
    told = {
        "subjects": {},
        "motions": {"roll": {**MOTION, "video": str(material / "clip.mp4"), "looks": "a ball"}},
        "groups": ["roll"],
        "prompts": ["a toy is {motion}", "a dog is {motion}"],
        "seeds": [0],
        "arms": ARMS,
        "compare": ["dual - no absorber"],
    }
    return settings_for(tmp_path, material, **{**told, **changed})


def test_absorbers_hold_the_looks_and_their_tokens_are_in_the_prompts_of_training_alone(base, tmp_path, material):
    found = cells(absorber_grid(tmp_path, material), base)
    by_arm = {cell.arm: cell for cell in found if cell.prompt == 0}
    words = {
        arm: (getattr(cell.stages.get("absorber"), "prompt", None), cell.stages["motion"].prompt)
        for arm, cell in by_arm.items()
        if arm != "joint"
    }
    assert words == {
        "no absorber": (None, "a ball is rolling"),
        "LoRA": ("a ball", "a ball is rolling"),
        "token": ("a <look> ball", "a <look> ball is rolling"),
        "dual": ("a <it> ball", "a <it> ball is rolling"),
    }
    assert [by_arm[arm].stages["absorber"].initializer for arm in ("LoRA", "token", "dual")] == [None, "ball", "dog"]
    for cell in found:
        assert cell.clips.prompt == [f"a {'dog' if cell.prompt else 'toy'} is rolling"]
        assert cell.images is None
        if "motion" in cell.stages:
            below = [cell.stages["absorber"].out] if "absorber" in cell.stages else []
            assert cell.stages["motion"].absorbers == below
            assert cell.clips.lora == [cell.stages["motion"].out]
    joint = by_arm["joint"].stages["joint"]
    assert (joint.images, joint.appearance_prompt, joint.prompt) == (None, None, "a ball is rolling")
    runs = {its.out for cell in found for its in cell.stages.values()}
    assert len(runs) == 3 + 4 + 1  # prompts share them, and no two arms do
    other = {"LoRA": {**ARMS["LoRA"], "absorber": {**ARMS["LoRA"]["absorber"], "rank": "3"}}}
    anew = next(iter(cells(absorber_grid(tmp_path, material, arms=other, compare=[]), base)))
    assert anew.stages["motion"].out != by_arm["LoRA"].stages["motion"].out  # it is built on another absorber


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_motion_alone_is_trained_generated_and_scored(base, tmp_path, material, monkeypatch):
    trained = []
    for stage, train in list(eval.ablate.TRAIN.items()):

        def counted(its, base, train=train):
            trained.append(its.out)
            return train(its, base)

        monkeypatch.setitem(eval.ablate.TRAIN, stage, counted)
    settings = absorber_grid(tmp_path, material)
    report = ablate(settings, base).read_text()
    assert len(set(trained)) == 8
    told = json.loads((tmp_path / "grid" / "results.json").read_text())["cells"]
    assert len(told) == 2 * len(ARMS)
    for its in told:
        assert {"clip_t", "diversity"} <= its["scores"].keys()
        assert not {"clip_i", "identity"} & its["scores"].keys()
    found = {(its["arm"], its["prompt"]): its for its in told}
    assert found["dual", 0]["parameters"] == found["no absorber", 0]["parameters"]  # the absorber is gone
    assert "photos" not in report.split("Settings:")[0]
    [cell] = [cell for cell in cells(settings, base) if cell.arm == "joint" and cell.prompt == 0]
    joint = Path(cell.stages["joint"].out)
    assert cell.clips.lora == [f"{joint}#motion"]
    both = load_file(joint / "lora.safetensors")
    of_motion = sum(tensor.numel() for name, tensor in both.items() if name.startswith("motion."))
    assert 0 < of_motion < sum(tensor.numel() for tensor in both.values())
    assert found["joint", 0]["parameters"] == of_motion


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"prompts": ["{subject} is {motion}"]}, "holds {subject}, and the group roll has none"),
        ({"arms": {"a": {"appearance": {}}}}, "a: appearance needs a subject, and the group roll has none"),
        ({"arms": {"a": {"absorber": {}}}}, "a: absorber serves the training of a motion LoRA"),
        ({"arms": {"a": {"absorber": {"prompt": "x"}, "motion": {}}}}, "prompt is what the grid decides"),
        ({"arms": {"a": {"absorber": {}, "motion": {"absorbers": ["x"]}}}}, "absorbers is what the grid decides"),
        ({"arms": {"a": {"absorber": {"crops": "0"}, "motion": {}}}}, "a: absorber: crops"),
        ({"arms": {"a": {"absorber": {"initializer": "unheardof"}, "motion": {}}}}, "a: absorber: the initializer"),
        ({"arms": {"a": {"absorber": {"kind": "lora", "layers": ["3"]}, "motion": {}}}}, "a: absorber: layer 3"),
        ({"arms": {"a": {"absorber": {"token": "ball", "steps": "1"}, "motion": QUICK}}}, "a: absorber: .*ball"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(base, tmp_path, material, changed, complaint):
    with pytest.raises(UserError, match=complaint):
        ablate(absorber_grid(tmp_path, material, **{"compare": [], **changed}), base)
    assert not (tmp_path / "grid" / "runs").exists()


def test_an_absorber_of_a_video_needs_its_looks(base, tmp_path, material):
    bare = {"roll": {**MOTION, "video": str(material / "clip.mp4")}}
    with pytest.raises(UserError, match="arms: LoRA: an absorber needs the looks"):
        cells(absorber_grid(tmp_path, material, motions=bare), base)


def test_a_rendered_performer_gives_the_looks(small, tmp_path, material):
    rendered = {"dax": {"name": "dax", "rendered": "4", "prompt": "{performer} is dax"}}
    arms = {"token": {"absorber": {"kind": "token", "initializer": "ball"}, "motion": {}}}
    settings = absorber_grid(tmp_path, material, motions=rendered, groups=["dax"], arms=arms, compare=[])
    stages = cells(settings, small)[0].stages
    article, token, *performer = stages["absorber"].prompt.split()
    assert (article, token, len(performer)) == ("a", "<look>", 3)
    assert stages["motion"].prompt == f"{stages['absorber'].prompt} is dax"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a man", "a <look> man"),
        ("The  red bus", "The  <look> red bus"),
        ("an", "<look> an"),
        ("anna", "<look> anna"),
        ("a <look> man", "a <look> man"),
    ],
)
def test_a_token_stands_behind_the_article(text, expected):
    assert with_token(text, "<look>") == expected


def test_motions_alone_are_drawn_whole_and_what_leaked_is_told_by_attribute(tmp_path, material):
    one = {("roll", prompt, 0): float(prompt) for prompt in range(2)}
    assert interval(one) == (0.0, 1.0)  # cells of one group
    two = {(group, prompt, 0): value for group, value in (("roll", 0.0), ("jump", 1.0)) for prompt in range(2)}
    assert interval(two) == (0.0, 1.0)
    settings = absorber_grid(tmp_path, material, arms={"a": {}}, compare=[])
    cell = Cell("a", "roll", 0, 0, {}, None, None, Path("."), {})  # type: ignore[arg-type]
    cells_of = [cell, dataclasses.replace(cell, prompt=1)]
    scores = [{"leak_colour": 1.0, "leak_shape": 0.25}, {"leak_colour": 0.5}]
    results = [Result(its, score, 1.0, 1, {}) for its, score in zip(cells_of, scores, strict=True)]
    table = leaks_table(settings, results)
    assert table.head == ["arm", "leak_shape", "leak_colour"]
    assert table.rows == [["a", "0.250 (n = 1)", "0.750"]]


def test_the_grid_of_the_absorbers_is_one(tmp_path):
    file = Path(__file__).parents[2] / "docs" / "results" / "tiny-absorbers.yaml"
    settings = parse_settings(GridSettings, ["--config", str(file), "--out", str(tmp_path)])
    check_grid(settings)
    assert len(settings.groups) >= 5
    assert len(settings.prompts) >= 4
    assert len(settings.seeds) * settings.clips >= 3
    assert {"no absorber", "LoRA", "token", "dual", "joint"} <= set(settings.arms)
