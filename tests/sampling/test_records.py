"""A clip tells what it was made with, and is made again from it, bit for bit."""

import json
import shutil

import pytest
import torch
from two_loras import write_loras

import sampling.generate
from model import UserError
from sampling import write_media
from sampling.again import generate_again
from sampling.generate import GenerateSettings, generate_files, main
from weights import Embedding, find_record, load_base, record_file, run_command, save_embedding
from weights.inspect import describe

PROMPT = "a teddy bear"


@pytest.fixture
def made(base, tmp_path):
    """Clips of two prompts with two seeds, sampled three at once with two LoRAs."""
    loras = write_loras(base, tmp_path, 0.3)

    def make(name="clip.mp4", **changes):
        given = {"prompt": [PROMPT, "a ball"], "seed": [1, 2], "batch_size": 3, "steps": 2, "fps": 5, "eta": 0.5}
        lora = [f"{loras['appearance']}:0.7", loras["motion"]]
        return generate_files(GenerateSettings(**{**given, "lora": lora, "out": f"{tmp_path}/{name}", **changes}), base)

    make.lora = tmp_path / "motion.safetensors"
    return make


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """A folder with a clip of one LoRA, and its record."""
    folder = tmp_path_factory.mktemp("plain")
    sizes = {"num_frames": 2, "height": 32, "width": 32, "steps": 1, "guidance_scale": 1.0}
    base = load_base(files.folder, files.adapter, device="cpu")
    lora = write_loras(base, folder, 0.3)["motion"]
    (clip,) = generate_files(
        GenerateSettings(prompt=[PROMPT], seed=[1], lora=[lora], out=str(folder / "c.mp4"), **sizes), base
    )
    return folder, json.loads(record_file(clip).read_text())


def contents(path):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file.read_bytes() for file in [*files, record_file(path)]]


def test_a_clip_is_made_again_bit_for_bit_with_those_it_was_sampled_with(made, monkeypatch):
    clips = made()
    sampled, numbers, before = [], set(), torch.get_num_threads()
    sample = sampling.generate.sample_videos

    def spied(base, prompts, seeds, **options):
        sampled.append((prompts, seeds))
        numbers.add(torch.get_num_threads())
        return sample(base, prompts, seeds, **options)

    monkeypatch.setattr(sampling.generate, "sample_videos", spied)
    torch.set_num_threads(before + 1)
    try:
        again = [generate_again(clip) for clip in (clips[1], clips[3])]  # from the files: with another recipe there
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    for (new,), old in zip(again, (clips[1], clips[3]), strict=True):
        assert new == old.with_name(f"{old.stem}-again{old.suffix}")
        assert contents(new) == contents(old)
    assert sampled == [((PROMPT, PROMPT, "a ball"), (1, 2, 1)), (("a ball",), (2,))]
    assert numbers == {before}


@pytest.mark.parametrize("name", ["clip.gif", "clip", "clip.v1/"])
def test_clips_without_a_tag_are_made_again_from_the_json_beside_them(made, name):
    (clip,) = made(name, seed=[1], prompt=[PROMPT])
    (again,) = generate_again(clip)
    assert again.name == (f"{clip.name}-again" if clip.is_dir() else "clip-again.gif")
    assert "generate --from" in describe(clip)
    assert PROMPT in describe(record_file(clip))
    assert contents(again) == contents(clip)


def test_a_clip_tells_its_own_prompt_and_seed_and_every_setting(made, base, tmp_path):
    records = [find_record(clip) for clip in made()]
    assert [(its.prompt, its.seed) for its in records] == [(PROMPT, 1), (PROMPT, 2), ("a ball", 1), ("a ball", 2)]
    its = records[0]
    settings = GenerateSettings(**its.settings, prompt=[its.prompt], seed=[its.seed], out="x")
    assert (settings.steps, settings.eta, settings.num_frames) == (2, 0.5, None)
    assert (its.filled["num_frames"], its.filled["device"], its.filled["dtype"]) == (3, "cpu", "float32")
    assert its.fingerprints == base.fingerprints
    assert its.versions["torch"] == torch.__version__


def test_the_tag_travels_with_the_file_and_the_json_stands_in_for_it(made, tmp_path):
    clip, *_ = made(prompt=["null"], seed=[7])  # a text that parsers like to take for nothing
    expected = contents(clip)[0]
    kept = record_file(clip).rename(tmp_path / "kept.json")
    moved = clip.rename(tmp_path / "renamed.mp4")
    assert find_record(moved).prompt == "null"
    (again,) = generate_again(moved)
    assert again.read_bytes() == expected
    (again,) = generate_again(kept, out=str(tmp_path / "b.mp4"))
    assert again.read_bytes() == expected


def test_flags_win_and_what_they_leave_alone_stays(made, tmp_path, base):
    clip = made()[0]
    (other,) = generate_again(clip, out=str(tmp_path / "other.mp4"), seed=[9])
    (direct,) = made("direct.mp4", prompt=[PROMPT], seed=[9])
    assert other.read_bytes() == direct.read_bytes()
    main(["--from", str(clip), "--out", str(tmp_path / "short.mp4"), "--num_frames", "2", "--lora", str(made.lora)])
    short = find_record(tmp_path / "short.mp4")
    assert (short.settings["num_frames"], short.settings["lora"], short.seed) == (2, [str(made.lora)], 1)
    assert "num_frames" not in short.filled


def test_a_lora_that_is_another_or_gone_is_named(made, tmp_path, base):
    clip = made()[0]
    before = sorted(tmp_path.iterdir())
    digest = find_record(clip).files["lora"][str(made.lora)]
    shutil.copy(tmp_path / "appearance.safetensors", made.lora)
    with pytest.raises(UserError, match=rf"^\S*motion\.safetensors is not what .* {digest}"):
        generate_again(clip, base)
    made.lora.unlink()
    with pytest.raises(UserError, match=rf"motion\.safetensors \(SHA-256 {digest}\), which is not there.*--lora"):
        generate_again(clip, base)
    assert sorted(tmp_path.iterdir()) == [path for path in before if path != made.lora]
    (new,) = generate_again(clip, base, lora=[str(tmp_path / "appearance.safetensors")])
    assert list(find_record(new).files["lora"]) == [str(tmp_path / "appearance.safetensors")]


def test_flags_name_another_base(plain, files, tmp_path):
    folder, _ = plain
    base = shutil.copytree(files.folder, tmp_path / "base")
    main(["--from", str(folder / "c.mp4"), "--base", str(base), "--out", str(tmp_path / "new.mp4")])
    assert find_record(tmp_path / "new.mp4").settings["base"] == str(base)


def test_another_base_is_refused_by_its_parts_unless_asked_for(made, base):
    clip = made(lora=[])[0]
    base.fingerprints = {**base.fingerprints, "vae": "0" * 16}
    with pytest.raises(UserError, match="differs in: vae"):
        generate_again(clip, base)
    assert generate_again(clip, base, vae=base.source["base"])[0].exists()
    with pytest.raises(UserError, match="differs in: vae"):
        generate_again(clip, base, motion_module=base.source["motion_module"])


def test_other_versions_are_warned_about(made, base):
    clip = made()[0]
    table = json.loads(record_file(clip).read_text())
    table["versions"]["torch"] = "1.0"
    clip.unlink()
    record_file(clip).write_text(json.dumps(table))
    with pytest.warns(UserWarning, match=rf"torch 1\.0 \(now {torch.__version__.replace('+', '.')}\)"):
        generate_again(record_file(clip), base)


def test_a_clip_of_others_and_the_clip_itself_are_refused(made, material, tmp_path):
    with pytest.raises(UserError, match=r"has no record.*record\.json"):
        generate_again(material / "clip.mp4")
    with pytest.raises(UserError, match=r"nowhere\.mp4 does not exist"):
        generate_again(tmp_path / "nowhere.mp4")
    clip = made()[0]
    with pytest.raises(UserError, match="the clip itself"):
        generate_again(clip, out=str(clip))
    for name in (".", "/", ""):
        with pytest.raises(UserError, match="has no record"):
            generate_again(name)


HOSTILE = {
    "a wrong type": ({"seed": "one"}, "seed"),
    "an unknown key": ({"run": "rm"}, "run is not a setting"),
    "an unknown setting": ({"settings": {"stepz": 1}}, "stepz"),
    "a wrong type of a setting": ({"settings": {"steps": [1]}}, "steps"),
    "a wrong number": ({"seed": 2**32, "seeds": [2**32]}, "a seed must be"),
    "a wrong dtype": ({"filled": {"dtype": "int8"}}, "dtype"),
    "what cannot be left open": ({"filled": {"out": "evil.mp4"}}, "out cannot be left open"),
    "threads": ({"threads": 10**6}, "threads"),
    "no batch": ({"prompts": ["another"], "seeds": [1]}, "sampled with it"),
    "an odd batch": ({"seeds": [1, 2]}, "sampled with it"),
    "texts that are none": ({"files": {"lora": {"a": 1}}}, "tables of texts"),
    "a table that is none": ({"versions": [1]}, "versions"),
    "a device": ({"settings": {"lora": ["/dev/zero"]}, "files": {}}, "/dev/zero is no file"),
    "a name too long": ({"settings": {"lora": ["x" * 5000]}, "files": {}}, "cannot be opened"),
    "a base too long": ({"settings": {"base": "x" * 5000}, "files": {}}, "cannot be opened"),
    "a lora unnamed": ({"files": {}}, "is not what"),
    "something huge": ({"prompt": "x" * 2_000_000}, "no record|more than"),
    "nothing": (None, "no record|missing"),
}


@pytest.mark.parametrize("place", ["tag", "json"])
@pytest.mark.parametrize(("changes", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_record_of_nonsense_is_an_error_and_writes_nothing(plain, tmp_path, monkeypatch, changes, said, place):
    _, table = plain
    table = {} if changes is None else {**table, **changes}
    if place == "tag":
        clip = tmp_path / "x.mp4"
        write_media(clip, torch.zeros(2, 3, 16, 16), metadata=table or {"title": "holiday"})
    else:
        clip = tmp_path / "x.mp4.record.json"
        clip.write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        generate_again(clip)
    assert list(tmp_path.iterdir()) == [clip]


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"customttt": ' + "9" * 10_000 + "}", "null"])
def test_a_file_that_is_no_json_is_said(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        generate_again(tmp_path / "x.json")


def test_inspect_shows_the_record_and_no_control_characters(plain, tmp_path):
    _, table = plain
    evil = {**table, "prompt": "red \x1b[2J bear", "prompts": ["red \x1b[2J bear"], "seed": 77, "seeds": [77]}
    for name in ("x.mp4", "x.gif"):
        write_media(tmp_path / name, torch.zeros(2, 3, 16, 16), metadata=evil)
    record_file(tmp_path / "x.gif").write_text(json.dumps(evil))
    for name in ("x.mp4", "x.gif"):
        shown = describe(tmp_path / name)
        assert "\x1b" not in shown
        assert "red  [2J bear" in shown
        for part in ("77", *table["files"]["lora"], *table["files"]["lora"].values(), torch.__version__):
            assert str(part) in shown
    record_file(tmp_path / "x.gif").write_text("{")
    assert "unreadable" in describe(tmp_path / "x.gif")


def test_an_error_shows_no_control_characters(plain, tmp_path, capsys):
    _, table = plain
    (tmp_path / "x.json").write_text(json.dumps({**table, "settings": {"\x1b[2J": 1}}))
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["--from", str(tmp_path / "x.json")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ")
    assert "is not a setting" in said
    assert "\x1b" not in said


def test_an_embedding_that_is_another_is_named(made, base, tmp_path):
    file = tmp_path / "look.safetensors"
    vectors = torch.randn(2, base.text.config.hidden_size, generator=torch.Generator().manual_seed(0))
    save_embedding(file, Embedding("<look>", vectors))
    (clip,) = made(embedding=[str(file)], prompt=["a <look> cat"], seed=[1], name="tokened.mp4")
    (again,) = generate_again(clip, base)
    assert again.read_bytes() == clip.read_bytes()
    save_embedding(file, Embedding("<look>", vectors + 1))
    with pytest.raises(UserError, match=r"look\.safetensors is not what .*--embedding"):
        generate_again(clip, base)
