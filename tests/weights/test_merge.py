"""A merged checkpoint is the base with its LoRAs on, in either layout, or it is not there at all."""

import json
import os
import warnings
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from base_tensors import tensors
from bases import write_base, write_motion_module
from exports import metadata
from merges import KOHYA, OWN, merged, random_inputs, write_loras
from oracles import error
from safetensors.torch import load_file

import customttt
import weights.save
import weights.save_ldm
from lora import add_adapter, remove_adapter
from model import UserError
from sampling.generate import loaded_loras
from weights import load_base, read_json, save_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*not of Stable Diffusion 1.5's size")
TEDDY = "teddy"
SCHEDULE = ("betas", "alphas_cumprod", "alphas_cumprod_prev")


@pytest.fixture(scope="module")
def loras(files, tmp_path_factory):
    """Two LoRAs for the narrow base."""
    return write_loras(load_base(files.folder, files.adapter, device="cpu"), tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def small(files, loras):
    """What to merge: the narrow base with AnimateDiff v3, and both LoRAs."""
    return {"base": str(files.folder), "motion_module": str(files.adapter), "lora": loras}


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """That merged, in either layout."""
    root = tmp_path_factory.mktemp("made")
    return {layout: merged(root / layout / TEDDY, layout=layout, **small) for layout in ("diffusers", "ldm")}


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def opened(out):
    """A merge of either layout as our own base."""
    if (out / "model_index.json").is_file():
        return load_base(out, device="cpu")
    motion = out / f"{out.name}_mm.safetensors"
    return load_base(out / f"{out.name}.safetensors", motion if motion.is_file() else None, device="cpu")


def predictions(base):
    latents, tokens = random_inputs()
    with torch.no_grad():
        text = base.text(tokens)
        return base.unet(latents, 500, text), text


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_a_merge_is_the_base_with_its_loras_on(files, tmp_path, version):
    motion = write_motion_module(tmp_path / "mm.ckpt", version, wrap="state_dict")
    base = load_base(files.folder, motion, device="cpu")
    plain, loras = predictions(base), write_loras(base, tmp_path)
    with loaded_loras(base, loras):
        expected = predictions(base)
    assert all(error(a, b) > 0.1 for a, b in zip(plain, expected, strict=True))
    for layout in ("diffusers", "ldm"):
        out = merged(tmp_path / layout, loras, base=str(files.folder), motion_module=str(motion), layout=layout)
        back = opened(out)
        assert back.unet.config == base.unet.config
        for ours, theirs in zip(predictions(back), expected, strict=True):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        assert back.fingerprints["vae"] == base.fingerprints["vae"]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_one_files_have_the_names_shapes_and_numbers_of_the_published_ones(loras, tmp_path, version):
    """At strength 0 everything comes back, bit for bit, but for the noise schedule of the training."""
    base = write_base(tmp_path, "ldm")
    motion = write_motion_module(tmp_path / "mm.safetensors", version)
    nothing = [lora.rpartition(":")[0] + ":0" for lora in loras]
    out = merged(tmp_path / TEDDY, nothing, base=str(base), motion_module=str(motion), layout="ldm")
    for file, published in (("teddy", "sd15_ldm_single_file"), ("teddy_mm", f"animatediff_{version}_motion_module")):
        expected = {key: tensor for key, tensor in tensors(published).items() if not key.endswith(SCHEDULE)}
        found = load_file(out / f"{file}.safetensors")
        assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}
        sinusoids = [key for key in found if key.endswith(".pe")]
        assert all(torch.allclose(found[key], expected[key], atol=1e-5, rtol=0) for key in sinusoids)
        assert not [key for key in found if key not in sinusoids and not found[key].equal(expected[key])]


def test_what_is_merged_leaves_its_files_alone(small, tmp_path):
    """Tensors are mapped from the files, where these can be."""
    folder = tmp_path / "files"
    motion = write_motion_module(folder / "mm.safetensors")
    for suffix in (".safetensors", ".ckpt"):
        base = write_base(folder, "ldm", suffix=suffix)
        before = contents(folder)
        merged(tmp_path / TEDDY, small["lora"], base=str(base), motion_module=str(motion), layout="ldm")
        assert contents(folder) == before


@pytest.mark.parametrize(("layout", "dtype"), [("diffusers", "float16"), ("ldm", "bfloat16")])
def test_half_precision_is_a_rounding_of_the_sum(small, made, tmp_path, layout, dtype):
    dtype_, exact = getattr(torch, dtype), opened(made[layout])
    out = merged(tmp_path / TEDDY, layout=layout, dtype=dtype, **small)
    kept = [load_file(path) for path in out.rglob("*.safetensors")]
    constant = (".pe", ".position_ids")
    assert {t.dtype for found in kept for key, t in found.items() if not key.endswith(constant)} == {dtype_}
    back = opened(out)
    for name in ("unet", "vae", "text"):
        rounded = {key: tensor.to(dtype_).float() for key, tensor in getattr(exact, name).state_dict().items()}
        assert all(torch.equal(tensor, rounded[key]) for key, tensor in getattr(back, name).state_dict().items())


def test_numbers_that_the_dtype_cannot_hold_are_not_written(small, tmp_path):
    loras = [small["lora"][0].rpartition(":")[0] + ":1e6"]
    with pytest.raises(UserError, match=r"float16 cannot hold the UNet's layers\.2\..*another --dtype"):
        merged(tmp_path / TEDDY, **(small | {"lora": loras}), dtype="float16")
    assert not list(tmp_path.iterdir())


def test_the_record_says_what_went_in_and_nothing_of_where_it_was(small, loras, made):
    for out in made.values():
        text = (out / "customttt.json").read_text()
        record = json.loads(text)
        files = [lora.rpartition(":")[0] for lora in loras]
        digests = [sha256(Path(file).read_bytes()).hexdigest() for file in files]
        assert [(lora["name"], lora["sha256"], lora["strength"]) for lora in record["loras"]] == [
            (OWN, digests[0], 0.9),
            (KOHYA, digests[1], 0.6),
        ]
        assert record["loras"][0]["trigger"] == "zor"
        assert (record["base"]["name"], record["base"]["motion_module"]) == ("sd15", "motion")
        assert record["base"]["fingerprints"] == load_base(small["base"], small["motion_module"]).fingerprints
        assert sorted(record.pop("files")) == sorted(set(contents(out)) - {"customttt.json"})
        assert str(out.parents[2]) not in text
    for name in ("teddy", "teddy_mm"):
        header = metadata(made["ldm"] / f"{name}.safetensors")
        assert json.loads(header["customttt_merge"]) == record
        assert header["format"] == "pt"


def test_tiny_keeps_its_recipe_and_fits_diffusers_layout_alone(tmp_path):
    tiny = load_base("tiny", device="cpu")
    path = tmp_path / "lora.safetensors"
    add_adapter(tiny.unet, "a", "spatial", (2,), rank=2)
    save_lora(path, tiny.unet, {"a": ("", "")})
    remove_adapter(tiny.unet, "a")
    back = load_base(merged(tmp_path / "out", [str(path)]), device="cpu")
    assert back.recipe == tiny.recipe
    assert back.embed(["a red star"]).equal(tiny.embed(["a red star"]))
    with pytest.raises(UserError, match=r"no place for numbers of heads and groups.*norm_num_groups = 8 would be"):
        merged(tmp_path / "ldm", [str(path)], layout="ldm")
    assert not (tmp_path / "ldm").exists()


def test_stable_diffusions_own_folder_gets_no_recipe_and_nothing_but_its_tokenizer(small, files, tmp_path):
    tokenizer = tmp_path / "clip"
    tokenizer.mkdir()
    for name, content in contents(files.folder / "tokenizer").items():
        (tokenizer / name).write_bytes(content)
    (tokenizer / "model.safetensors").write_bytes(b"a whole CLIP, as in the hub's cache")
    out = merged(tmp_path / TEDDY, **small, tokenizer=str(tokenizer))
    assert not (out / "recipe.json").exists()
    assert contents(out / "tokenizer") == contents(files.folder / "tokenizer")


def test_a_one_file_base_needs_a_tokenizer_for_diffusers_layout_alone(small, tmp_path):
    base = str(write_base(tmp_path / "base", "ldm"))
    out = merged(tmp_path / TEDDY, layout="ldm", **(small | {"base": base}))
    assert sorted(contents(out)) == ["customttt.json", "teddy.safetensors", "teddy_mm.safetensors"]
    with pytest.raises(UserError, match="--tokenizer FOLDER"):
        merged(tmp_path / "folder", **(small | {"base": base}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", TEDDY]


def test_without_motion_modules(small, loras, tmp_path):
    image = {"base": small["base"], "motion_module": None}
    with pytest.raises(UserError, match=r"--motion_module"):
        merged(tmp_path / TEDDY, loras, layout="ldm", **image)  # the first has a motion part
    with pytest.raises(UserError, match=r"has no motion modules.*--layout ldm"):
        merged(tmp_path / TEDDY, loras[1:], **image)
    out = merged(tmp_path / TEDDY, loras[1:], layout="ldm", **image)
    assert sorted(contents(out)) == ["customttt.json", "teddy.safetensors"]
    base = load_base(small["base"], device="cpu")
    with loaded_loras(base, loras[1:]):
        assert error(predictions(opened(out))[0], predictions(base)[0]) < 1e-4


def test_a_merge_replaces_a_merge_and_an_empty_folder(small, loras, tmp_path):
    out = tmp_path / TEDDY
    out.mkdir()
    merged(out, **small)
    merged(out, **(small | {"lora": loras[:1]}), layout="ldm")
    assert sorted(contents(out)) == ["customttt.json", "teddy.safetensors", "teddy_mm.safetensors"]
    assert len(read_json(out / "customttt.json")["loras"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == [TEDDY]


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda out: out.write_text("mine"), "is a file: --out names a folder"),
        (lambda out: (out.mkdir(), (out / "mine.txt").touch()), "has files in it, and no merge wrote them"),
        (lambda out: (out.mkdir(), (out / "customttt.json").write_text("[]")), "no merge wrote them"),
        (
            lambda out: (out.mkdir(), (out / "customttt.json").write_text('{"files": ["a"]}'), (out / "mine").touch()),
            "mine in it is no file of the merge",
        ),
        (lambda out: (out.parent.rmdir(), out.parent.write_text("")), "is no folder"),
    ],
    ids=["a file", "somebody's folder", "no record", "a merge and more", "below a file"],
)
def test_what_is_dearer_than_a_merge_stays(small, tmp_path, prepare, says):
    out = tmp_path / "models" / TEDDY
    out.parent.mkdir()
    prepare(out)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=says):
        merged(out, **small)
    assert contents(tmp_path) == before


def test_what_is_read_is_not_replaced(small, tmp_path):
    out = merged(tmp_path / TEDDY, **small)
    for name in ("base", "motion_module"):
        with pytest.raises(UserError, match="is to be read, and would be replaced"):
            merged(out, **(small | {name: str(out if name == "base" else out / "motion_adapter")}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told_before_anything_is_loaded(small, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="locked is read-only"):
        merged(tmp_path / "locked" / TEDDY, **(small | {"base": "tiny", "motion_module": None}))


@pytest.mark.parametrize(("former", "stop"), [(False, KeyboardInterrupt), (True, OSError)])
@pytest.mark.parametrize(("layout", "module"), [("ldm", weights.save_ldm), ("diffusers", weights.save)])
def test_what_is_broken_off_leaves_nothing(small, tmp_path, monkeypatch, layout, module, stop, former):
    out = tmp_path / TEDDY
    if former:
        out.mkdir()
        (out / "customttt.json").write_text('{"files": []}')
    before, write, calls = contents(tmp_path), module.save_file, []

    def fail(*arguments, **options):
        write(*arguments, **options)
        calls.append(arguments)
        if len(calls) == 2:
            raise stop

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises((KeyboardInterrupt, UserError)):
        merged(out, layout=layout, **small)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [TEDDY] * former


def test_a_merge_needs_a_lora_that_is_there(small, tmp_path):
    with pytest.raises(UserError, match="nothing to merge"):
        merged(tmp_path / TEDDY, **(small | {"lora": []}))
    with pytest.raises(UserError, match="--lora is missing"):
        customttt.command(["merge", "--out", str(tmp_path / TEDDY)])
    with pytest.raises(UserError, match="gone does not exist"):
        merged(tmp_path / TEDDY, **(small | {"lora": [str(tmp_path / "gone")]}))
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote_and_where_it_goes(small, loras, tmp_path, capsys):
    out = str(tmp_path / TEDDY)
    flags = ["--base", small["base"], "--motion_module", small["motion_module"], "--out", out, "--layout", "ldm"]
    with pytest.warns(UserWarning, match="not of Stable Diffusion 1.5's size"):
        customttt.command(["merge", *flags, "--dtype", "float16", "--lora", *loras])
    said = capsys.readouterr().out
    assert f"wrote {out}: sd15 with {loras[0]}, {loras[1]}, float16" in said
    assert "for the prompt: zor" in said
    assert "models/checkpoints" in said
    with pytest.raises(UserError, match="--device is not a setting"):
        customttt.command(["merge", *flags, "--device", "cuda", "--lora", *loras])


def test_a_folder_of_diffusers_is_merged_without_a_warning(small, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged(tmp_path / TEDDY, **small)
