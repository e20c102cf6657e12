"""All steps from one file, and what is done is skipped."""

import os
import shutil

import pytest
import torch
import yaml
from clips import smooth

import train.run as module
from model import UserError
from sampling import read_video, write_media
from sampling.generate import GenerateSettings
from train.appearance import AppearanceSettings
from train.motion import MotionSettings
from train.run import RunSettings, main, run, section
from train.ttt import TTTSettings
from weights import find_record, record_file, sha256


@pytest.fixture
def config(files, tmp_path):
    """A run file of few steps on the narrow base, and the material it names."""
    (tmp_path / "photos").mkdir()
    smooth().save(tmp_path / "photos" / "a.png")
    write_media(tmp_path / "clip.mp4", torch.rand(3, 3, 32, 32) * 2 - 1, fps=8)
    table = {
        **files.flags(),
        "out": str(tmp_path / "run"),
        "height": 32,
        "width": 32,
        "num_frames": 2,
        "appearance": {"images": str(tmp_path / "photos"), "prompt": "a teddy bear", "steps": 1, "rank": 2},
        "motion": {"video": str(tmp_path / "clip.mp4"), "prompt": "a man runs", "steps": 1, "rank": 2},
        "ttt": {"prompt": "a teddy bear runs", "steps": 1, "reference_steps": 1},
        "generate": {"steps": 2, "seed": [1, 2]},
    }

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**table, **changes}))
        return ["--config", str(path)]

    write.table = table
    return write


def test_one_file_gives_both_loras_and_the_clips(config, tmp_path, capsys):
    main(config())
    found = {str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").glob("**/*") if file.is_file()}
    folder = {"settings.json", "inputs.json", "log.csv", "lora.safetensors"}
    assert found == {
        *(f"appearance/{name}" for name in folder),
        *(f"motion/{name}" for name in folder),
        *(f"ttt/{name}" for name in {*folder, "report.json"}),
        "video-1-seed1.mp4",
        "video-1-seed1.mp4.record.json",
        "video-1-seed2.mp4",
        "video-1-seed2.mp4.record.json",
    }
    clips = [read_video(tmp_path / "run" / f"video-1-seed{seed}.mp4", 2, 32, 32) for seed in (1, 2)]
    assert not torch.equal(*clips)


def test_what_is_done_is_skipped_without_loading_the_base(config, tmp_path, monkeypatch, capsys):
    main(config())
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("**/*")}

    def fail(settings):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(module, "open_base", fail)
    capsys.readouterr()
    main(config())
    assert capsys.readouterr().out.count("(was done)") == 5
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").glob("**/*")} == before


def test_only_what_is_missing_is_done_again(config, tmp_path, capsys):
    main(config())
    kept = (tmp_path / "run" / "ttt" / "lora.safetensors").stat().st_mtime_ns
    main(config(generate={"steps": 2, "seed": [3]}))
    assert (tmp_path / "run" / "video.mp4").is_file()
    assert (tmp_path / "run" / "ttt" / "lora.safetensors").stat().st_mtime_ns == kept


def test_contents_count_and_not_the_clock(config, tmp_path, monkeypatch):
    main(config())
    clips = [tmp_path / "run" / f"video-1-seed{seed}.mp4" for seed in (1, 2)]
    lora = tmp_path / "run" / "ttt" / "lora.safetensors"
    made = []
    generate = module.generate_files
    monkeypatch.setattr(module, "generate_files", lambda *given: made.append(1) or generate(*given))
    os.utime(lora, (2e9, 2e9))  # as new as can be, and the same
    os.utime(clips[0], (1e9, 1e9))
    main(config())
    assert not made
    shutil.copy(tmp_path / "run" / "appearance" / "lora.safetensors", lora)
    os.utime(lora, (1e8, 1e8))  # another one, and older than the clips
    main(config())
    assert len(made) == 1
    assert {find_record(clip).files["lora"][str(lora.parent)] for clip in clips} == {sha256(lora)}
    main(config())
    assert len(made) == 1
    shutil.copy(clips[0], clips[1])  # what a record says counts, not that there is a file
    main(config())
    assert len(made) == 2
    record_file(clips[1]).unlink()  # a kill may come between the clip and the record beside it
    main(config())
    assert len(made) == 3
    assert find_record(record_file(clips[1])) == find_record(clips[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"appearance": {"images": "x", "prompt": "y", "stepz": 1}}, "appearance: stepz.* steps"),
        ({"motion": {"prompt": "y"}}, "motion: video"),
        ({"ttt": {"prompt": "y", "base": "z"}}, "ttt: base must be the same for all steps"),
        ({"generate": {"steps": "many"}}, "generate: steps"),
        ({"bases": "x"}, "bases"),
        ({"appearance": {}}, "appearance: prompt is missing"),
        ({"generate": {"lora": ["nope"]}}, "nope does not exist"),
        ({"motion": {"video": "nope.mp4", "prompt": "y"}}, "nope"),
        ({"num_frames": 4}, "3"),
        ({"height": 100}, "104"),
    ],
)
def test_mistakes_anywhere_are_found_before_the_first_step(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        main(config(**changes))
    assert not (tmp_path / "run").exists()


def test_flags_win_over_the_file(config, tmp_path):
    main([*config(), "--out", str(tmp_path / "elsewhere")])
    assert (tmp_path / "elsewhere" / "ttt" / "lora.safetensors").is_file()
    assert not (tmp_path / "run").exists()


def test_the_python_way_is_the_same(config, tmp_path):
    clips = run(RunSettings(**config.table))
    assert clips == [tmp_path / "run" / "video-1-seed1.mp4", tmp_path / "run" / "video-1-seed2.mp4"]
    assert all(clip.is_file() for clip in clips)


@pytest.mark.parametrize(
    ("table", "out"),
    [
        ("appearance", "../elsewhere"),
        ("motion", "run/../../elsewhere"),
        ("ttt", "/tmp/elsewhere"),
        ("generate", "~/../x.mp4"),
    ],
)
def test_a_file_of_settings_writes_nowhere_but_in_its_run_folder(tmp_path, monkeypatch, table, out):
    monkeypatch.chdir(tmp_path)
    settings = RunSettings(out="run", **{table: {"out": out, "prompt": "p"}})
    cls = {"appearance": AppearanceSettings, "motion": MotionSettings, "ttt": TTTSettings, "generate": GenerateSettings}
    with pytest.raises(UserError, match=f"{table}: out: .* is not inside run"):
        section(cls[table], settings, table)
    inside = {"appearance": {"out": "run/looks", "prompt": "p", "images": "x"}}
    assert section(AppearanceSettings, RunSettings(out="run", **inside), "appearance").out == "run/looks"
