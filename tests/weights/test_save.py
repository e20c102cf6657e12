"""A base that was saved comes back as it was, and diffusers and transformers make the same of its files."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bases import write_base, write_motion_adapter, write_tokenizer
from diffusers import AnimateDiffPipeline, AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from oracles import error, like_diffusers, randomise
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

import model
import weights.load
import weights.save
from model import SD15_V1, TINY, MotionConfig, Recipe, TextConfig, TextEncoder, UNet3D, UserError, VAEConfig
from weights import load_base, save_base
from weights.detect import detect
from weights.inspect import describe

pytestmark = pytest.mark.usefixtures("one_thread")
UNET = replace(TINY, block_out_channels=(16, 32, 32, 32), cross_attention_dim=16)
VAE = VAEConfig(block_out_channels=(8, 16, 16, 32), norm_num_groups=8, scaling_factor=0.71)
TEXT = TextConfig(
    vocab_size=1024,
    hidden_size=16,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=24,
)
RECIPE = Recipe(motion_layers=(1, 7), rank=8, guidance_scale=5.5, appearance_learning_rate=3e-4, height=64, width=64)
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
SHARD = 800_000


@pytest.fixture(scope="module")
def networks():
    unet, vae, text = UNet3D(UNET), model.AutoencoderKL(VAE), TextEncoder(TEXT)
    return {"unet": randomise(unet, 1), "vae": randomise(vae, 2), "text": randomise(text, 3)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEXT.vocab_size)


@pytest.fixture(scope="module")
def folder(networks, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "small"
    save_base(folder, **networks, tokenizer_folder=tokenizer, recipe=RECIPE, shard_bytes=SHARD)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load_base(folder, device="cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("motion_module", [None, "motion_adapter"])
def test_weights_come_back_rounded_to_float16(folder, networks, motion_module):
    back = load_base(folder, motion_module and folder / motion_module, device="cpu")
    for name, network in networks.items():
        wrote, read = network.state_dict(), getattr(back, name).state_dict()
        assert wrote.keys() == read.keys()
        assert not [key for key in wrote if not torch.equal(wrote[key].half().float(), read[key])]


def test_in_float32_nothing_is_rounded(networks, tokenizer, tmp_path):
    save_base(tmp_path, **networks, tokenizer_folder=tokenizer, recipe=RECIPE, dtype=torch.float32)
    back = load_base(tmp_path, device="cpu").unet.state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in networks["unet"].state_dict().items())


def test_configs_and_recipe_come_back(base, folder):
    assert (base.unet.config, base.vae.config, base.text.config, base.recipe) == (UNET, VAE, TEXT, RECIPE)
    assert base.name == folder.name
    assert set(base.fingerprints) == {"unet", "vae", "text_encoder", "motion_module"}
    assert base.source == {"base": str(folder), "motion_module": None, "vae": None, "tokenizer": None}
    assert base.embed(["a red ball"]).shape == (1, 24, 16)


def test_a_whole_clip_may_lie_beside_it(base, networks, tokenizer, tmp_path):
    text = {name: value for name, value in vars(networks["text"].config).items() if name != "hidden_act"}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    )
    save_base(tmp_path, **networks, tokenizer_folder=tokenizer, recipe=RECIPE, clip=randomise(clip))
    back, clip = CLIPModel.from_pretrained(tmp_path / "clip").float().eval(), clip.half().float().eval()
    inputs = torch.arange(24)[None], random(1, 3, 32, 32)
    with torch.no_grad():
        assert error(back(*inputs).text_embeds, clip(*inputs).text_embeds) < 1e-4
        assert error(back(*inputs).image_embeds, clip(*inputs).image_embeds) < 1e-4
    assert load_base(tmp_path, device="cpu").fingerprints == base.fingerprints


def test_a_named_motion_module_counts_before_the_folders_own(base, networks, tokenizer, folder, tmp_path):
    others = networks | {"unet": randomise(UNet3D(UNET), 9)}
    save_base(tmp_path, **others, tokenizer_folder=tokenizer, recipe=RECIPE)
    mixed = load_base(folder, tmp_path / "motion_adapter", device="cpu")
    assert mixed.fingerprints["unet"] == base.fingerprints["unet"]
    assert mixed.fingerprints["motion_module"] != base.fingerprints["motion_module"]
    assert mixed.source["motion_module"] == str(tmp_path / "motion_adapter")


def test_any_folder_may_bring_its_motion_adapter(tmp_path):
    folder = write_base(tmp_path)
    assert load_base(folder, device="cpu").unet.config.motion is None
    write_motion_adapter(folder / "motion_adapter")
    assert load_base(folder, device="cpu").unet.config.motion == MotionConfig()


def test_a_large_network_is_cut_into_files_as_diffusers_cuts_it(folder, tmp_path):
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"diffusion_pytorch_model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    UNet2DConditionModel.from_pretrained(folder / "unet").half().save_pretrained(tmp_path, max_shard_size=SHARD)
    theirs = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(theirs["weight_map"]) == set(index["weight_map"])
    assert theirs["metadata"]["total_size"] == index["metadata"]["total_size"]
    largest = max(t.numel() * 2 for t in UNet3D(UNET).state_dict().values())
    assert all((folder / "unet" / name).stat().st_size < max(SHARD, largest) + 60_000 for name in files)


def test_what_was_there_before_is_not_read_any_more(base, networks, tokenizer, tmp_path):
    first = networks | {"unet": randomise(UNet3D(UNET), 9)}
    again = {"tokenizer_folder": tokenizer, "recipe": RECIPE}
    for sizes in ((10**9, SHARD), (SHARD, 10**9)):
        (tmp_path / "clip").mkdir(exist_ok=True)
        save_base(tmp_path, **first, **again, shard_bytes=sizes[0])
        save_base(tmp_path, **networks, **again, shard_bytes=sizes[1])
        assert load_base(tmp_path, device="cpu").fingerprints == base.fingerprints
        assert (tmp_path / INDEX).is_file() == (sizes[1] == SHARD)
    assert (tmp_path / "clip").is_dir()
    assert not list(tmp_path.rglob(".[wf]*"))


@pytest.mark.parametrize("writer", ["save_file", "write_json"])
@pytest.mark.parametrize("error_", [KeyboardInterrupt, OSError])
def test_what_is_broken_off_leaves_the_former_base(networks, tokenizer, tmp_path, monkeypatch, writer, error_):
    again = {"tokenizer_folder": tokenizer, "recipe": RECIPE, "shard_bytes": SHARD}
    save_base(tmp_path, **networks, **again)
    before, write, calls = contents(tmp_path), getattr(weights.save, writer), []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise error_
        write(*arguments, **options)

    monkeypatch.setattr(weights.save, writer, fail)
    with pytest.raises((KeyboardInterrupt, UserError)):
        save_base(tmp_path, **(networks | {"unet": randomise(UNet3D(UNET), 9)}), **again)
    assert contents(tmp_path) == before


def test_a_kill_at_any_moment_leaves_no_network_half_new(networks, tokenizer, tmp_path, monkeypatch):
    again = {"tokenizer_folder": tokenizer, "recipe": RECIPE}
    others = {name: randomise(type(network)(network.config), 9) for name, network in networks.items()}
    save_base(tmp_path / "old", **networks, **again, shard_bytes=SHARD)
    save_base(tmp_path / "new", **others, **again, shard_bytes=SHARD)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    moved, rename = [], Path.rename

    def watched(source, target):
        moved.append(source.name)
        for moment in (1, 2):
            now = contents(tmp_path / "old")
            for name in ("unet", "vae", "text_encoder", "motion_adapter", "tokenizer"):
                states = [{file: b for file, b in each.items() if file.startswith(f"{name}/")} for each in (old, new)]
                assert {file: b for file, b in now.items() if file.startswith(f"{name}/")} in [*states, {}]
            if moment == 1:
                rename(source, target)

    monkeypatch.setattr(Path, "rename", watched)
    save_base(tmp_path / "old", **others, **again, shard_bytes=SHARD)
    assert contents(tmp_path / "old") == new
    assert len(moved) == 10


def test_diffusers_makes_the_same_unet_of_the_files(base, folder):
    image = UNet2DConditionModel.from_pretrained(folder / "unet")
    theirs = UNetMotionModel.from_unet2d(image, MotionAdapter.from_pretrained(folder / "motion_adapter")).eval()
    ours = UNet3D(like_diffusers(base.unet.config)).eval()  # diffusers pools where AnimateDiff does not
    ours.load_state_dict(base.unet.state_dict())
    latents, text = random(1, 4, 5, 8, 8), random(1, 7, 16)
    with torch.no_grad():
        assert error(ours(latents, 500, text), theirs(latents, 500, text.repeat(5, 1, 1)).sample) < 1e-4
        frame = base.unet(latents[:, :, :1], 500, text, motion=False)[:, :, 0]
        assert error(frame, image.eval()(latents[:, :, 0], 500, text).sample) < 1e-4


def test_diffusers_and_transformers_make_the_same_vae_and_text_encoder_of_the_files(base, folder):
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        ["a red ball", ""], padding="max_length", max_length=24, return_tensors="pt"
    )
    images = random(2, 3, 32, 24).clamp(-1, 1)
    with torch.no_grad():
        moments = vae.encode(images).latent_dist.parameters
        assert error(base.vae.encode(images), moments) < 1e-4
        assert error(base.vae.decode(moments[:, :4]), vae.decode(moments[:, :4]).sample) < 1e-4
        assert error(base.embed(["a red ball", ""]), clip(tokens.input_ids).last_hidden_state) < 1e-4
    assert vae.config.scaling_factor == VAE.scaling_factor
    assert (clip.config.bos_token_id, clip.config.eos_token_id) == (TEXT.vocab_size - 2, TEXT.vocab_size - 1)


def test_diffusers_opens_the_whole_folder_as_an_animatediff_pipeline(base, folder):
    pipeline = AnimateDiffPipeline.from_pretrained(folder)
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, base.schedule.alphas_cumprod)
    assert pipeline.scheduler.config.beta_schedule == "linear"
    pipeline.scheduler.set_timesteps(25)
    assert pipeline.scheduler.timesteps.tolist() == base.schedule.timesteps(25)
    assert pipeline.unet.config.sample_size == 8


def test_the_folder_is_known_for_what_it_is(folder):
    assert detect(folder).kind == "diffusers folder"
    described = describe(folder)
    assert "belongs in --base" in described
    assert "motion_adapter" in described


def test_files_in_other_places_are_told_apart(folder):
    kinds = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder", "motion_adapter": "motion adapter"}
    assert {name: detect(folder / name).kind for name in kinds} == kinds


def test_tiny_is_the_folder_in_the_package_and_its_absence_is_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights.load, "TINY", folder)
    tiny = load_base(device="cpu")
    assert (tiny.name, tiny.source["base"], tiny.source["motion_module"]) == ("tiny", "tiny", None)
    assert tiny.unet.config == UNET
    monkeypatch.setattr(weights.load, "TINY", tmp_path / "tiny")
    with pytest.raises(UserError, match="this installation lacks the tiny base"):
        load_base("tiny")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unet": UNet3D(replace(UNET, motion=None))}, "has none"),
        ({"tokenizer_folder": Path("nowhere")}, "nowhere is no folder"),
        ({"tokenizer_folder": Path(__file__).parent}, r"holds no tokenizer: vocab\.json and merges\.txt"),
        ({"recipe": replace(RECIPE, rank=0)}, r"recipe\.json: rank must be at least 1, and is 0"),
        (
            {"unet": UNet3D(replace(UNET, motion=replace(SD15_V1.motion, norm_num_groups=8, pool_norms=False)))},
            "v1|pool",
        ),
        (
            {"vae": model.AutoencoderKL(replace(VAE, block_out_channels=(8, 16, 16)))},
            "vae cannot be kept in this layout",
        ),
    ],
    ids=["no motion", "no folder", "no tokenizer", "no rank", "half a v1", "three levels"],
)
def test_what_the_layout_cannot_say_is_not_written(networks, tokenizer, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        save_base(tmp_path / "out", **(networks | {"tokenizer_folder": tokenizer, "recipe": RECIPE} | change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_weights_that_float16_cannot_hold_are_not_written(networks, tokenizer, tmp_path, value):
    vae = randomise(model.AutoencoderKL(VAE))
    with torch.no_grad():
        vae.quant_conv.weight[0, 0] = value
    with pytest.raises(UserError, match=r"vae is not written: quant_conv\.weight has numbers that are not finite"):
        save_base(tmp_path, **(networks | {"vae": vae}), tokenizer_folder=tokenizer, recipe=RECIPE)
    assert not list(tmp_path.iterdir())


def test_the_encodings_in_the_file_are_the_sinusoids_diffusers_computes(folder):
    theirs = MotionAdapter.from_pretrained(folder / "motion_adapter")
    fresh = MotionAdapter.from_config(theirs.config).state_dict()
    found = {name: pe for name, pe in theirs.state_dict().items() if name.endswith(".pe")}
    assert len(found) == 20
    assert all(torch.allclose(pe, fresh[name], atol=1e-6) for name, pe in found.items())
    assert all(a.shape[1] == b.shape[1] == 32 for a, b in pairwise(found.values()))
