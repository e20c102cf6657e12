"""`customttt generate --embedding`: the clip is that of the embedded prompt, and mistakes are said."""

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import UserError
from sampling import read_video, sample_videos
from sampling.generate import GenerateSettings, clip_files, generate_files, main
from train.run import RunSettings, section, up_to_date
from weights import Embedding, find_record, learned_tokens, save_embedding, with_source

WIDTH = 128


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "embedding" / "cat.safetensors"
    path.parent.mkdir()
    save_file({"emb_params": torch.randn(3, WIDTH)}, path)
    return path


def clip(base, out, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_files(GenerateSettings(out=str(out), seed=[1], **options), base)
    return read_video(out, 3, 32, 32)


@pytest.mark.parametrize("where", ["prompt", "negative_prompt"])
def test_the_clip_is_that_of_the_embedded_prompt(base, file, tmp_path, where):
    words = {"prompt": "a dog plays", "negative_prompt": "red"} | {where: "a <cat> plays"}
    with pytest.warns(UserWarning, match="nothing was learned for <cat> in 'a <cat> plays'"):
        plain = sample_videos(base, [words["prompt"]], [1], words["negative_prompt"])[0]
    with learned_tokens(base, [Embedding("<cat>", load_file(file)["emb_params"])]):
        expected = sample_videos(base, [words["prompt"]], [1], words["negative_prompt"])[0]
    words["prompt"] = [words["prompt"]]
    written = clip(base, tmp_path / "clip", embedding=[f"{file}:<cat>"], **words)
    assert (written - expected).abs().max() < 1.01 / 127.5
    assert (written - plain).abs().max() > 0.05
    assert base.learned == {}
    assert find_record(tmp_path / "clip").settings["embedding"] == [f"{file}:<cat>"]


def test_a_token_that_no_prompt_contains_is_warned_about(base, file, tmp_path):
    options = {"prompt": ["a category"], "embedding": [str(file)], "steps": 1}
    with pytest.raises(UserWarning, match="no prompt contains 'cat'"):
        clip(base, tmp_path / "clip", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_files(GenerateSettings(out=str(tmp_path / "c"), **options | {"prompt": ["a category", "Cat's"]}), base)


def test_an_absorbers_run_folder_is_taken_for_its_token(base, file, tmp_path):
    save_embedding(tmp_path / "looks" / "embedding.safetensors", Embedding("<look>", load_file(file)["emb_params"]))
    prompt = {"prompt": ["a <look> plays"], "steps": 1}
    own = clip(base, tmp_path / "a", embedding=[str(tmp_path / "looks")], **prompt)
    renamed = clip(base, tmp_path / "b", embedding=[f"{tmp_path / 'looks'}:<x>"], prompt=["a <x> plays"], steps=1)
    assert own.equal(clip(base, tmp_path / "c", embedding=[f"{file}:<look>"], **prompt))
    assert own.equal(renamed)


def test_files_in_the_wrong_place_are_sent_to_the_right_one(base, file, tmp_path):
    sd15 = tmp_path / "sd15.safetensors"
    save_file({"<x>": torch.zeros(1, 768)}, sd15)
    settings = {"prompt": ["a cat of"], "out": str(tmp_path / "clip.mp4")}
    for given, says in (
        ({"lora": [str(sd15)]}, "textual-inversion embedding.*belongs in --embedding.*a LoRA is wanted"),
        ({"embedding": [str(file), f"{file}:CAT"]}, "have the same token"),
        ({"embedding": [f"{sd15}:cat"]}, "768 wide"),
        ({"embedding": [f"{file}:of"]}, "a word of CLIP's own"),
        ({"embedding": [f"{tmp_path}/none.pt:x"]}, "none.pt:x is no file"),
    ):
        with pytest.raises(UserError, match=says):
            generate_files(GenerateSettings(**settings, **given), base)
    assert list(tmp_path.glob("clip*")) == []


def test_the_command_takes_several(files, file, tmp_path):
    flags = [word for name, value in files.flags().items() for word in (f"--{name}", value)]
    flags += ["--num_frames", "1", "--height", "32", "--width", "32", "--steps", "1", "--embedding", str(file)]
    main([*flags, f"{file}:<b>", "--prompt", "cat and <b>", "--out", str(tmp_path / "clip.png")])
    assert find_record(tmp_path / "clip.png").settings["embedding"] == [str(file), f"{file}:<b>"]


def test_a_runs_clip_takes_them_too(file, tmp_path):
    run = RunSettings(out=str(tmp_path), generate={"prompt": ["a <cat>"], "embedding": [f"{file}:<cat>"]})
    settings = section(GenerateSettings, run, "generate", out=str(tmp_path / "video"))
    assert settings.embedding == [f"{file}:<cat>"]
    file.write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        clip_files(settings)


def test_a_run_makes_its_clip_again_when_an_embedding_is_another(base, file, tmp_path):
    settings = GenerateSettings(
        prompt=["a cat"], out=str(tmp_path / "c.png"), embedding=[str(file)], num_frames=1, steps=1
    )
    generate_files(settings, base)
    settings = with_source(settings, base)
    assert up_to_date(settings)
    save_file({"emb_params": torch.randn(3, WIDTH)}, file)
    assert not up_to_date(settings)
