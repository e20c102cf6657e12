"""The base that comes with the program: small, quick to load, and in every wheel."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

import weights
from model import TINY, NoiseSchedule
from train.tiny import RECIPE
from train.vocabulary import words
from train.world import BACKGROUNDS, COLOURS, WORLD_MOTIONS, WORLD_SHAPES, random_scenes, render
from weights import load_base
from weights.detect import detect
from weights.inspect import describe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "weights" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return load_base(device="cpu")


def files() -> list[Path]:
    return [path for path in sorted(FOLDER.rglob("*")) if path.is_file()]


def test_it_is_small_enough_to_ship():
    sizes = [path.stat().st_size for path in files()]
    assert 20e6 < sum(sizes) <= 32e6
    assert max(sizes) <= 15e6
    assert not [path for path in files() if path.name.startswith(".") or path.suffix in (".pt", ".bin", ".ckpt")]


def test_it_loads_quickly(tiny):
    start = time.process_time()
    load_base("tiny", device="cpu")
    assert time.process_time() - start < 3


def test_it_is_a_stable_diffusion_with_motion_modules_of_a_hundredth_the_size(tiny):
    assert tiny.name == "tiny"
    assert tiny.unet.config == TINY
    assert sum(p.numel() for p in tiny.unet.parameters()) < 13e6
    assert tiny.vae.config.factor == 8
    assert tiny.text.config.max_position_embeddings == 24
    assert set(tiny.fingerprints) == {"unet", "motion_module", "vae", "text_encoder"}
    assert tiny.source == {"base": "tiny", "motion_module": None, "vae": None, "tokenizer": None}
    assert tiny.schedule == NoiseSchedule()


def test_its_recipe_is_its_own(tiny):
    recipe = tiny.recipe
    assert (recipe.height, recipe.width, recipe.num_frames) == (64, 64, 16)
    assert recipe.num_frames <= TINY.motion.max_frames
    assert (FOLDER / "recipe.json").is_file()
    assert recipe == RECIPE  # what `python -m train.tiny` would write


def test_inspect_names_it():
    assert detect(FOLDER).kind == "diffusers folder"
    described = describe(FOLDER)
    assert "It belongs in --base" in described
    assert "unreadable" not in described


def test_its_autoencoder_is_scaled_for_the_world_and_gives_it_back(tiny):
    times = torch.linspace(0, 1, 4).expand(16, -1)
    frames, _ = render(random_scenes(16, torch.Generator().manual_seed(1), times))
    latents = tiny.vae.encode_latents(frames)
    assert 0.9 < (latents.mean.square() + latents.std.square()).mean().sqrt().item() < 1.1
    assert (tiny.vae.decode_latents(latents.mean) - frames).abs().mean() < 0.06


def test_its_vocabulary_has_every_word_of_the_world(tiny):
    numbers = tiny.tokenizer(words())["input_ids"]
    assert all(len(found) == 3 for found in numbers)  # the start, the word, the end
    assert tiny.embed(["a striped red star is circling clockwise over the sand"]).shape == (1, 24, 64)


@pytest.mark.parametrize("names", [tuple(WORLD_SHAPES), WORLD_MOTIONS, tuple(COLOURS), tuple(BACKGROUNDS)])
def test_its_text_states_tell_every_two_words_apart(tiny, names):
    """Left from right as well: what the end of a prompt does not tell, the UNet can hardly learn to paint."""
    with torch.no_grad():
        ends = tiny.embed([f"a {name}" for name in names])[:, -1]
    apart = torch.pdist(ends) / ends.norm(dim=1).mean()
    assert apart.min() > 0.3


def test_its_text_encoder_is_the_tower_of_its_scorer(tiny):
    clip = CLIPModel.from_pretrained(FOLDER / "clip").float()
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in clip.state_dict().items()}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tiny.text.clip.state_dict().items())


def test_a_wheel_carries_every_file_of_it():
    """Asked of setuptools itself: what build_py would put into the package, without building anything."""
    code = (
        "from distutils.core import run_setup\n"
        "command = run_setup('setup.py', stop_after='init').get_command_obj('build_py')\n"
        "command.ensure_finalized()\n"
        "for package, source, _, names in command.data_files:\n"
        "    print(*(f'{source}/{name}' for name in names), sep='\\n')\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", f"import setuptools\n{code}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    packed = {(ROOT / line).resolve() for line in out.splitlines() if line and (ROOT / line).is_file()}
    assert set(files()) <= packed
    assert {path.relative_to(FOLDER).parts[0] for path in files()} >= {"unet", "clip", "tokenizer", "recipe.json"}


def test_it_lies_in_the_package_that_is_imported(tiny):
    assert Path(weights.__file__).parent / "tiny" == weights.load.TINY
    assert tiny.tokenizer_folder == weights.load.TINY / "tokenizer"
