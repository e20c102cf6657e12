"""A base comes out the same from every layout it is kept in, and equals what diffusers makes of the same files."""

import warnings

import pytest
import torch
from base_tensors import entries, value
from bases import tensors, write_base, write_motion_adapter, write_motion_module, write_tokenizer, write_vae
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from huggingface_hub.errors import LocalEntryNotFoundError
from oracles import diffusers_name, error, like_diffusers
from transformers import CLIPTextModel, CLIPTokenizer

import weights.tokenizer
from model import MotionConfig, NoiseSchedule, UNet3D, UserError
from weights.load import Base, load_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("ldm"), "ldm")


@pytest.fixture(scope="module")
def motion_file(tmp_path_factory):
    return write_motion_module(tmp_path_factory.mktemp("motion") / "v3_sd15_mm.ckpt")


@pytest.fixture(scope="module")
def base(folder, motion_file):
    return load_base(folder, motion_file)


@pytest.fixture(scope="module")
def image_base(folder):
    return load_base(folder)


def state(base: Base, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """All weights of a base, by network and name, cast if asked for."""
    networks = {"unet": base.unet, "vae": base.vae, "text": base.text.clip}
    found = {f"{part}.{name}": tensor for part, net in networks.items() for name, tensor in net.state_dict().items()}
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in found.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_every_parameter_holds_what_was_written_under_its_name(base):
    files = ("sd15_diffusers_unet", "sd15_diffusers_vae", "sd15_diffusers_text", "animatediff_v3_motion_module")
    written = {e.name.replace("motion.", "unet."): e for file in files for e in entries(file)}
    found = state(base)
    for name, tensor in found.items():
        part, _, ours = name.partition(".")
        entry = written.pop(f"{part}.{diffusers_name(ours)}" if part == "unet" else name)
        assert torch.equal(tensor, value(entry, torch.float32, 0).reshape(tensor.shape))
    assert all(name.endswith((".pe", "position_ids")) for name in written)


@pytest.mark.parametrize(
    "kept",
    [
        {"layout": "ldm"},
        {"layout": "ldm", "suffix": ".ckpt"},
        {"sharded": True},
        {"suffix": ".bin"},
        {"suffix": ".bin", "sharded": True},
        {"short_text_keys": True},
    ],
    ids=str,
)
def test_every_layout_gives_the_same_weights(image_base, tmp_path, kept):
    assert_same(state(load_base(write_base(tmp_path, **kept))), state(image_base))


@pytest.mark.parametrize(
    "kept", [{"variant": "fp16"}, {"variant": "fp16", "sharded": True}, {"layout": "ldm"}], ids=str
)
def test_float16_copies_give_rounded_weights_and_the_same_fingerprint(image_base, tmp_path, kept):
    rounded = load_base(write_base(tmp_path, dtype=torch.float16, **kept))
    assert rounded.dtype == torch.float32
    assert_same(state(rounded, torch.float16), state(image_base, torch.float16))
    assert rounded.fingerprints["unet"] == image_base.fingerprints["unet"]


def test_the_plain_weights_count_where_a_folder_has_both(image_base, tmp_path):
    both = write_base(tmp_path, variant="fp16", dtype=torch.float16, seed=1)
    write_base(both, seed=0)
    assert_same(state(load_base(both)), state(image_base))


def test_the_fingerprint_tells_checkpoints_apart_and_survives_a_cast(image_base, folder, tmp_path):
    assert load_base(folder, dtype=torch.bfloat16).fingerprints["unet"] == image_base.fingerprints["unet"]
    assert load_base(write_base(tmp_path, seed=1)).fingerprints["unet"] != image_base.fingerprints["unet"]
    assert int(image_base.fingerprints["unet"], 16) >= 0


def test_a_base_is_frozen_and_named_and_has_animatediffs_schedule(base, folder, one_file):
    assert base.name == folder.name
    assert load_base(one_file).name == "base.safetensors"
    assert base.schedule == NoiseSchedule(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    assert base.recipe.appearance_layers == (2, 6)
    for network in (base.unet, base.vae, base.text):
        assert not network.training
        tensors = [*network.parameters(), *network.buffers()]
        assert not any(tensor.requires_grad or tensor.is_meta for tensor in tensors)


def test_weights_are_cast(folder, motion_file):
    cast = load_base(folder, motion_file, dtype=torch.bfloat16)
    assert {p.dtype for network in (cast.unet, cast.text) for p in network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in cast.vae.parameters()} == {torch.float32}  # in half precision its pictures would show it
    assert cast.embed(["a cat"]).dtype == cast.dtype == torch.bfloat16
    assert cast.device == torch.device("cpu")


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_motion_modules_tell_their_version(folder, tmp_path, version):
    file = write_motion_module(tmp_path / "module.safetensors", version)
    from_file = load_base(folder, file)
    expected = {
        "v1": MotionConfig(max_frames=24, pool_norms=True),
        "v2": MotionConfig(max_frames=32, mid_block=True),
        "v3": MotionConfig(max_frames=32),
    }
    assert from_file.unet.config.motion == expected[version]
    from_adapter = load_base(folder, write_motion_adapter(tmp_path / "adapter", version))
    assert from_adapter.unet.config == from_file.unet.config
    assert_same(state(from_adapter), state(from_file))


@pytest.mark.parametrize(
    "wrapped",
    [
        {"wrap": "state_dict"},
        {"wrap": "module"},
        {"wrap": "module", "stray_unet_keys": True},
        {"stray_unet_keys": True},
    ],
    ids=str,
)
def test_wrapped_and_training_snapshots_of_motion_modules_load_alike(base, folder, tmp_path, wrapped):
    file = write_motion_module(tmp_path / "module.ckpt", **wrapped)
    assert_same(state(load_base(folder, file)), state(base))


def test_without_encodings_v3_is_assumed_aloud(folder, tmp_path):
    bare = write_motion_module(tmp_path / "bare.ckpt", "v1", pe=False)
    with pytest.warns(UserWarning, match=r"bare\.ckpt has no positional encodings.*taken for v3"):
        assert load_base(folder, bare).unet.config.motion == MotionConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bare = write_motion_module(tmp_path / "v2.ckpt", "v2", pe=False)
        assert load_base(folder, bare).unet.config.motion.mid_block


def test_encodings_that_are_no_sinusoid_are_refused(folder, tmp_path):
    found = tensors("animatediff_v3_motion_module")
    key = next(key for key in found if key.endswith(".pe"))
    torch.save(found | {key: torch.rand_like(found[key])}, tmp_path / "learned.ckpt")
    with pytest.raises(UserError, match=r"pos_encoder\.pe is not the fixed sinusoid"):
        load_base(folder, tmp_path / "learned.ckpt")


def test_without_a_motion_module_the_unet_is_for_images(image_base):
    unet = image_base.unet
    assert unet.config.motion is None
    assert not [name for name in unet.state_dict() if "temporal" in name]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("folder", {}),
        ("diffusers.safetensors", {}),
        ("old.bin", {"layout": "old"}),
        ("old.safetensors", {"layout": "old", "prefix": "first_stage_model."}),
        ("ldm.ckpt", {"layout": "ldm"}),
        ("ldm.safetensors", {"layout": "ldm", "prefix": "first_stage_model."}),
    ],
)
def test_a_vae_of_its_own_replaces_the_bases(image_base, one_file, tmp_path, name, kept):
    other = load_base(one_file, vae=write_vae(tmp_path / name, seed=1, **kept))
    written = tensors("sd15_diffusers_vae", seed=1)
    assert_same(dict(other.vae.state_dict()), written)
    assert_same(dict(other.unet.state_dict()), dict(image_base.unet.state_dict()))


def test_an_average_of_training_and_other_known_extras_are_left_aside(image_base, tmp_path):
    found = tensors("sd15_ldm_single_file")
    ema = {f"model_ema.{''.join(key.split('.')[1:])}": t + 1 for key, t in found.items() if key.startswith("model.")}
    torch.save({"state_dict": found | ema | {"posterior_variance": torch.ones(1000)}}, tmp_path / "ema.ckpt")
    assert_same(state(load_base(tmp_path / "ema.ckpt")), state(image_base))


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_unet_gives_what_diffusers_gives_from_the_same_files(folder, tmp_path, version):
    adapter = write_motion_adapter(tmp_path, version)
    loaded = load_base(folder, adapter).unet
    ours = UNet3D(like_diffusers(loaded.config)).eval()  # diffusers pools where AnimateDiff does not
    ours.load_state_dict(loaded.state_dict())
    image = UNet2DConditionModel.from_pretrained(folder / "unet")
    theirs = UNetMotionModel.from_unet2d(image, MotionAdapter.from_pretrained(adapter)).eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 5, 8, 8, generator=generator)
    text = torch.randn(1, 7, 128, generator=generator)
    with torch.no_grad():
        assert error(ours(latents, 500, text), theirs(latents, 500, text.repeat(5, 1, 1)).sample) < 1e-4


def test_vae_and_text_encoder_give_what_their_libraries_give_from_the_same_files(folder, one_file):
    ours = load_base(one_file, tokenizer=folder / "tokenizer")
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    prompts = ["a teddy bear is playing guitar on the snow", ""]
    tokens = tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert error(ours.vae.encode(images), vae.encode(images).latent_dist.parameters) < 1e-4
        assert error(ours.embed(prompts), clip(tokens).last_hidden_state) < 1e-4


def test_the_tokenizer_is_read_only_when_text_is_needed(tmp_path, one_file):
    empty = tmp_path / "empty"
    empty.mkdir()
    base = load_base(one_file, tokenizer=empty)
    with pytest.raises(UserError, match=r"empty holds no tokenizer.*vocab\.json and merges\.txt.*--tokenizer"):
        base.embed(["a cat"])
    write_tokenizer(empty, 1024)
    assert base.embed(["a cat"]).shape == (1, 77, 128)


def test_a_named_tokenizer_counts_before_the_folders_own(folder, tmp_path):
    assert load_base(folder).tokenizer_folder == folder / "tokenizer"
    other = write_tokenizer(tmp_path / "other", 1024)
    assert load_base(folder, tokenizer=other).tokenizer_folder == other
    with pytest.raises(UserError, match=r"nowhere was given as the tokenizer.*vocab\.json"):
        load_base(folder, tokenizer=tmp_path / "nowhere")


def test_a_tokenizer_saved_by_a_new_transformers_serves_too(folder, one_file, tmp_path):
    CLIPTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    ours, theirs = load_base(one_file, tokenizer=tmp_path), load_base(folder)
    assert torch.equal(ours.embed(["a teddy bear"]), theirs.embed(["a teddy bear"]))


def test_a_one_file_base_takes_clips_tokenizer_from_the_hubs_cache(one_file, folder, monkeypatch):
    def cached(repository, name, local_files_only):
        assert repository == "openai/clip-vit-large-patch14"
        assert local_files_only
        return str(folder / "tokenizer" / name)

    monkeypatch.setattr(weights.tokenizer, "hf_hub_download", cached)
    assert load_base(one_file).embed(["a cat"]).shape == (1, 77, 128)


def test_without_a_tokenizer_anywhere_the_error_says_which_files_go_where(one_file, monkeypatch):
    def offline(repository, name, local_files_only):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(weights.tokenizer, "hf_hub_download", offline)
    with pytest.raises(
        UserError, match=r"vocab\.json and merges\.txt .*huggingface\.co/openai/clip.* --tokenizer FOLDER"
    ):
        load_base(one_file).embed(["a cat"])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "vocab.json").write_text("{"), "is damaged"),
        (lambda folder: write_tokenizer(folder, 49408), "counts up to 49407, and .* knows 1024"),
    ],
)
def test_a_wrong_tokenizer_is_refused(one_file, tmp_path, damage, says):
    damage(write_tokenizer(tmp_path, 1024))
    with pytest.raises(UserError, match=says):
        load_base(one_file, tokenizer=tmp_path).embed(["a cat"])


def test_what_is_cut_from_a_long_prompt_is_told_to_the_letter(image_base):
    kept, lost = "bear " * 74 + "Guitar", "playing  the GUITAR, at night"
    with pytest.warns(UserWarning, match="longer than 75 tokens") as told:
        cut = image_base.embed(["a cat", f"{kept} {lost}"])
    assert [str(warning.message).split(": ", 1)[1] for warning in told] == [repr(lost)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(image_base.embed([kept])[0], cut[1])
    assert not torch.equal(cut[0], cut[1])
