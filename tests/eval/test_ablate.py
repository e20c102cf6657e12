"""A grid of ablations on a narrow random base: what is trained, what is skipped, and how arms are compared."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from grids import ARMS, settings_for
from safetensors.torch import load_file

import eval.ablate
from eval.ablate import ablate
from eval.checks import KIND_OF
from eval.grid import cells
from eval.grid_settings import GridSettings, check_grid
from lora import adapter_parameters, add_adapter
from model import SD15_V3, UNet3D, UserError
from sampling import read_video
from sampling.generate import loaded_loras
from weights import parse_settings


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_grid_trains_each_run_once_scores_every_cell_and_goes_on_where_it_stopped(
    base, tmp_path, material, monkeypatch
):
    settings = settings_for(tmp_path, material)
    sampled = []
    generate = eval.ablate.generate_files

    def counted(its, base):
        sampled.append(its.out)
        if len(sampled) == 4:
            raise KeyboardInterrupt
        return generate(its, base)

    monkeypatch.setattr(eval.ablate, "generate_files", counted)
    with pytest.raises(KeyboardInterrupt):
        ablate(settings, base)
    report = ablate(settings, base)
    assert len(sampled) == 2 * len(ARMS) + 1
    grid = tmp_path / "grid"
    trained = sorted(path.name.rsplit("-", 1)[0] for path in (grid / "runs").iterdir())
    expected = ["appearance-toy-s0", "appearance-toy-s0", "joint-toy+roll-s0", "motion-roll-s0", "ttt-toy+roll-s0"]
    assert trained == sorted(expected + [name.replace("s0", "s1") for name in expected])
    results = json.loads((grid / "results.json").read_text())["cells"]
    assert [(its["arm"], its["seed"]) for its in results] == [(arm, seed) for seed in (0, 1) for arm in ARMS]
    told = {(its["arm"], its["seed"]): its for its in results}
    assert told["base", 0]["parameters"] == told["base", 0]["seconds"] == 0
    assert told["TTT", 1]["moved"]["prediction"]["relative change by test-time training"] > 0
    [run] = (grid / "runs").glob("ttt-toy+roll-s0-*")
    held = sum(tensor.numel() for tensor in load_file(run / "lora.safetensors").values())
    assert told["TTT", 0]["parameters"] == told["both", 0]["parameters"] == held
    assert told["other layers", 0]["parameters"] != held
    assert all(np.isfinite(list(its["scores"].values())).all() for its in results)
    page = report.read_text()
    assert "data:image/png" in page
    assert "TTT - both" in page
    sampled.clear()
    ablate(replace(settings, seeds=[1]), base)  # a part of it, from what is there
    assert not sampled


def test_arms_start_from_the_same_noise_and_differ_by_their_loras_alone(base, tmp_path, material):
    found = cells(settings_for(tmp_path, material), base)
    by_arm = {cell.arm: cell for cell in found if cell.seed == 0}
    seeds = [cell.clips.seed for cell in by_arm.values()]
    assert all(its == seeds[0] for its in seeds)
    assert len(set(seeds[0])) == 2
    assert {cell.clips.prompt[0] for cell in found} == {"a toy is rolling on the sand"}
    other = next(cell for cell in found if cell.seed == 1)
    assert not set(other.clips.seed) & set(seeds[0])
    assert by_arm["both"].clips.lora == [by_arm["both"].stages[name].out for name in ("appearance", "motion")]
    assert by_arm["TTT"].clips.lora == [by_arm["TTT"].stages["ttt"].out]
    assert by_arm["TTT"].stages["ttt"].appearance == by_arm["looks"].stages["appearance"].out
    assert by_arm["other layers"].stages["appearance"].layers == [0, 1]
    assert by_arm["other layers"].stages["appearance"].out != by_arm["looks"].stages["appearance"].out
    assert by_arm["other layers"].stages["motion"].out == by_arm["both"].stages["motion"].out
    assert by_arm["looks"].stages["appearance"].trigger == "toy"
    assert by_arm["both"].stages["motion"].prompt == "a ball is rolling"
    its, both = by_arm["joint"].stages["joint"], by_arm["both"].stages
    looks, moves = both["appearance"], both["motion"]
    assert (its.images, its.appearance_prompt, its.trigger) == (looks.images, looks.prompt, looks.trigger)
    assert (its.video, its.prompt, its.seed) == (moves.video, moves.prompt, moves.seed)
    assert by_arm["joint"].clips.lora == [its.out]


def test_rendered_inputs_are_drawn_anew_with_each_seed(small, tmp_path, material):
    settings = settings_for(
        tmp_path,
        material,
        subjects={"house": {"name": "a zor", "rendered": "4", "prompt": "a zor is resting"}},
        motions={"patrol": {"name": "dax", "rendered": "4", "prompt": "{performer} is dax"}},
        groups=["house+patrol"],
        arms={"both": {"appearance": {}, "motion": {}}},
        compare=[],
    )
    first, second = cells(settings, small)
    assert first.images != second.images
    clips = [read_video(cell.reference, 2, 64, 64) for cell in (first, second)]
    assert not torch.equal(*clips)
    prompts = [cell.stages["motion"].prompt for cell in (first, second)]
    assert all(prompt.endswith(" is dax") and len(prompt.split()) == 6 for prompt in prompts)
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"groups": ["toy+run"]}, "groups: toy\\+run is not"),
        ({"groups": ["toy"]}, "groups: toy is not"),
        ({"groups": []}, "needs groups"),
        ({"seeds": [1, 1]}, "seeds: one is given twice"),
        ({"prompts": ["a {dog}"]}, "nothing else in braces"),
        ({"arms": {"a": {"looks": {}}}}, "looks is no stage"),
        ({"arms": {"a": {"motion": {}, "ttt": {}}}}, "ttt needs appearance and motion"),
        ({"arms": {"a": {"joint": {}, "motion": {}}}}, "joint trains both LoRAs by itself"),
        ({"arms": {"a": {"joint": {"video": "x"}}}}, "joint: video is what the grid decides"),
        ({"arms": {"a": {"joint": {"appearance_learning_rate": "0"}}}}, "arms: a: joint: appearance_learning_rate"),
        ({"arms": {"a": {"joint": {"rank": "0"}}}}, "arms: a: joint: rank must be at least 1"),
        ({"arms": {"a b": {}, "A-B": {}}}, "folders would be the same"),
        ({"arms": {"a - b": {}}}, "without ' - '"),
        ({"arms": {None: {}}}, "None is no title"),
        ({"arms": {"a": {None: {}}}}, "None is no stage"),
        ({"arms": {"a": {"motion": {None: "1"}}}}, "None is not a setting"),
        ({"arms": {"a": {"generate": {"height": "32"}}}}, "height is what the grid decides"),
        ({"arms": {"a": {"motion": {"frame_step": "2"}}}}, "frame_step is what the grid decides"),
        ({"arms": {"a": {}, "b": {"motion": {"steps": "0"}}}}, "arms: b: motion: steps must be at least 1"),
        ({"arms": {"a": {}, "b": {"motion": {"layers": ["4"]}}}}, "arms: b: motion: layer 4 has no motion module"),
        ({"arms": {"a": {"generate": {"steps": "0"}}}}, "arms: a: generate"),
        ({"arms": {"a": {"motion": {"speed": "1"}}}}, "speed"),
        ({"arms": {"a": {"motion": {"seed": "1"}}}}, "seed is what the grid decides"),
        ({"arms": {"a": {"generate": {"prompt": "x"}}}}, "prompt is what the grid decides"),
        ({"compare": ["both"]}, "compare"),
        ({"compare": ["both - all"]}, "compare"),
        ({"paper": {"ours": {}}}, "paper: ours is no arm"),
        ({"paper": {"both": "0.3"}}, "paper: both: a table of clip_t"),
        ({"paper": {"both": {"CLIP-T": "0.3"}}}, "paper: both: a table of clip_t"),
        ({"prompts": ["a {subject.__class__}"]}, "nothing else in braces"),
        ({"subjects": {"../toy": {"name": "a", "images": "b"}}}, "'../toy' is no short name"),
        ({"subjects": {None: {"name": "a", "images": "b"}}}, "None is no short name"),
        ({"motions": {"m+n": {"name": "a", "prompt": "b", "video": "c"}}}, "'m\\+n' is no short name"),
        ({"motions": {"roll": {"name": "x", "prompt": "y", "rendered": "1", "fps": "8"}}}, "has no others"),
        ({"subjects": {"toy": {"name": "a toy"}}}, "give images or rendered"),
        ({"subjects": {"toy": {"name": "a toy", "rendered": "5"}}}, "from 0 to 4"),
        ({"motions": {"roll": {"name": "x", "prompt": "y", "video": "none.mp4"}}}, "none.mp4 does not exist"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_trained(base, tmp_path, material, changed, complaint):
    with pytest.raises(UserError, match=complaint):
        ablate(settings_for(tmp_path, material, **{"compare": [], **changed}), base)
    assert not (tmp_path / "grid" / "runs").exists()


def test_the_grid_of_the_tiny_results_is_one(tmp_path):
    file = Path(__file__).parents[2] / "docs" / "results" / "tiny-grid.yaml"
    settings = parse_settings(GridSettings, ["--config", str(file), "--out", str(tmp_path)])
    assert len(settings.groups) >= 5
    assert len(settings.seeds) >= 3
    assert {"without TTT", "TTT, 5 reference steps", "TTT, 10 reference steps"} <= set(settings.arms)


def test_the_grid_of_the_papers_table_1_is_one_and_its_arms_have_the_papers_parameters(tmp_path):
    """12.12 M, 30.46 M, and 28.86 M where the paper prints 28.26 M, at Stable Diffusion's width and rank 32."""
    file = Path(__file__).parents[2] / "docs" / "results" / "tiny-table1.yaml"
    settings = parse_settings(GridSettings, ["--config", str(file), "--out", str(tmp_path)])
    check_grid(settings)
    assert {arm: "joint" in stages for arm, stages in settings.arms.items()} == {
        "Full LoRA": False,
        "DiffDirector": True,
        "CustomTTT": False,
    }
    full = settings.arms["Full LoRA"]
    with torch.device("meta"):
        unet = UNet3D(SD15_V3)
        for stage, kind in KIND_OF.items():
            add_adapter(unet, stage, kind, map(int, full[stage]["layers"]), rank=32)
    assert sum(p.numel() for stage in KIND_OF for p in adapter_parameters(unet, stage)) == 28_864_512


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_arm_without_loras_generates_with_the_base_alone(base, tmp_path, material):
    settings = settings_for(tmp_path, material, arms={"base": {}}, seeds=[0], compare=[], clips=1)
    ablate(settings, base)
    [cell] = cells(settings, base)
    with loaded_loras(base, []):
        expected = eval.ablate.generate_files(replace(cell.clips, out=str(tmp_path / "alone.mp4")), base)
    assert Path(cell.clips.out).read_bytes() == expected[0].read_bytes()


def test_what_is_changed_in_a_grid_is_made_anew_and_nothing_stale_is_used(small, tmp_path, material):
    told = {
        "subjects": {"it": {"name": "a zor", "rendered": "0"}},
        "motions": {"so": {"name": "dax", "rendered": "0", "prompt": "{performer} is dax"}},
        "groups": ["it+so"],
        "arms": {"both": {"appearance": {}, "motion": {}}},
        "compare": [],
        "seeds": [0],
    }
    [first] = cells(settings_for(tmp_path, material, **told), small)
    changes = [
        {"subjects": {"it": {"name": "a zor", "rendered": "3"}}},
        {"motions": {"so": {"name": "dax", "rendered": "3", "prompt": "{performer} is dax"}}},
        {"subjects": {"it": {"name": "a zor", "rendered": "0", "trigger": "zor"}}},
        {"arms": {"both": {"appearance": {"rank": "3"}, "motion": {}}}},
        {"arms": {"both": {"appearance": {}, "motion": {}, "generate": {"steps": "7"}}}},
        {"arms": {"both": {"joint": {}}}},
    ]
    for change in changes:
        [other] = cells(settings_for(tmp_path, material, **{**told, **change}), small)
        assert other.clips.out != first.clips.out
    [again] = cells(settings_for(tmp_path, material, **told), small)
    assert again == first
    small.fingerprints["unet"] = "another"
    [other] = cells(settings_for(tmp_path, material, **told), small)
    assert other.clips.out != first.clips.out
    assert all(other.stages[stage].out != first.stages[stage].out for stage in first.stages)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_clips_are_scored_anew_when_what_scores_them_changes(base, tmp_path, material, monkeypatch):
    settings = settings_for(tmp_path, material, arms={"base": {}}, seeds=[0], compare=[], clips=1)
    scored = []
    score = eval.ablate.score_clips
    monkeypatch.setattr(eval.ablate, "score_clips", lambda *args: (scored.append(args), score(*args))[1])
    ablate(settings, base)
    ablate(settings, base)
    assert len(scored) == 1
    ablate(replace(settings, scores={"protocol": "loveu", "still": "0"}), base)
    assert len(scored) == 2
    [record] = (tmp_path / "grid" / "cells").glob("*/*/scores.json")
    for nonsense in ("[]", "{", '{"scores": 1}'):
        record.write_text(nonsense)
        ablate(settings, base)
    assert len(scored) == 5
    other = tmp_path / "photos"
    shutil.copytree(material / "photos", other)
    (other / "2.png").unlink()
    subjects = {"toy": {"name": "a toy", "images": str(other), "trigger": "toy"}}
    ablate(replace(settings, subjects=subjects), base)
    assert len(scored) == 6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_titles_and_prompts_may_hold_what_plots_could_take_for_formulas(base, tmp_path, material):
    told = {"arms": {"$\\frac$ & <b>": {}}, "prompts": ["a $\\frac{subject}$"], "seeds": [0], "compare": [], "clips": 1}
    page = ablate(settings_for(tmp_path, material, **told), base).read_text()
    assert "<b>" not in page


def test_without_matplotlib_it_says_so_before_any_work(base, tmp_path, material, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib"):
        ablate(settings_for(tmp_path, material), base)
    assert not (tmp_path / "grid").exists()
