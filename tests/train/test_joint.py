"""Joint training against loops written from MotionDirector's recipe: what learns from what, and what is kept."""

import math
from itertools import count

import pytest
import torch
from oracles import sampled_latents
from safetensors.torch import load_file
from small_runs import joint

import train.joint as module
import train.stage as stage
from lora import adapter_names, adapter_parameters, adapters
from model import SD15_V3, Recipe, UNet3D, UserError
from sampling import derived_seed, encode, read_image, read_video
from train.joint import both_adapters, input_files, train_joint, with_defaults
from weights import load_base, read_lora_header

KINDS = ("appearance", "motion")
SOURCES = {"photos": {}, "frames": {"images": None, "appearance_prompt": None}}
CAPTIONS = ["a teddy bear", "a red ball on the beach", "a teddy bear"]  # of the pictures in `material`


def step_generator(seed, step):
    return torch.Generator().manual_seed(derived_seed(seed, "step", step))


def is_masked(seed, step):
    return torch.rand((), generator=step_generator(seed, step)).item() < 0.2


def seed_of(*masked):
    """A seed whose first steps are masked as asked."""
    return next(seed for seed in count() if [is_masked(seed, i) for i in range(len(masked))] == list(masked))


def noisy(latents, generator):
    t = torch.randint(1000, (1,), generator=generator)
    eps = torch.randn(latents.shape, generator=generator)
    kept = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)[t]
    return kept.sqrt() * latents + (1 - kept).sqrt() * eps, t, eps


def brute_force(base, material, source, seed, step):
    """Both losses of a step as the recipe tells them, each with the adapters of its pass; None is masked."""
    generator = step_generator(seed, step)
    masked = torch.rand((), generator=generator).item() < 0.2
    frames = read_video(material / "clip.mp4", 3, 32, 32)
    clip, t, eps = noisy(sampled_latents(base, frames, torch.randn(1, 4, 3, 4, 4, generator=generator)), generator)
    if source == "photos":
        i = int(torch.randint(3, (1,), generator=generator))
        image = read_image(material / "photos" / f"{i}.png", 32, 32)[None]
        latents = sampled_latents(base, image, torch.randn(1, 4, 1, 4, 4, generator=generator))
        picture, words = noisy(latents, generator), encode(base, [CAPTIONS[i]])
    else:
        k = int(torch.randint(3, (), generator=generator))
        picture, words = (clip[:, :, [k]], t, eps[:, :, [k]]), encode(base, ["a man runs"])
    looks = None
    if not masked:
        with adapters(base.unet, {"appearance": 1.0}):
            looks = (base.unet(*picture[:2], words, motion=False) - picture[2]).square().mean()
    with adapters(base.unet, {"motion": 1.0} if masked else {"appearance": 1.0, "motion": 1.0}):
        error = base.unet(clip, t, encode(base, ["a man runs"])) - eps
    anchor = int(torch.randint(3, (), generator=generator))
    phi = [2**0.5 * error[:, :, i] - error[:, :, anchor] for i in range(3)]
    return looks, error.square().mean() + sum(e.square().mean() for e in phi) / 3


def gradient(unet, name):
    """Of all of an adapter in one vector, 0 where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in adapter_parameters(unet, name)]
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients_of_a_step_are_brute_force(base, material, tmp_path, monkeypatch, source, masked):
    """The appearance LoRA's gradient is that of its own pass alone, though it is on in the clip's; masked it is off."""
    checked = []

    def spy(unet, names, losses, settings, folder, preview, further):
        for name in names:
            for p in adapter_parameters(unet, name):
                p.data = 0.1 * torch.randn(p.shape)
        seed = settings.seed
        looks, moves = brute_force(base, material, source, seed, 0)
        expected = {"motion": torch.autograd.grad(moves, adapter_parameters(unet, "motion"))}
        if looks is not None:
            expected["appearance"] = torch.autograd.grad(looks, adapter_parameters(unet, "appearance"))
        with adapters(unet, dict.fromkeys(names, 1.0)):
            for name, loss in losses(0, step_generator(seed, 0)):
                assert name in ("appearance_loss", "motion_loss")
                wanted = looks if name == "appearance_loss" else moves
                if wanted is None:
                    assert loss is None
                    continue
                assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
                before = gradient(unet, "appearance")
                loss.backward()
                assert torch.equal(gradient(unet, "appearance"), before) == (name == "motion_loss")
        for name in KINDS:
            if name not in expected:  # Lion would go on with its momentum, and decay, where there is a gradient of 0
                assert all(p.grad is None for p in adapter_parameters(unet, name))
                continue
            wanted = torch.cat([g.flatten() for g in expected[name]])
            assert (gradient(unet, name) - wanted).norm() < 5e-3 * wanted.norm()
        assert all(p.requires_grad for name in KINDS for p in adapter_parameters(unet, name))
        checked.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "train", spy)
    with pytest.raises(KeyboardInterrupt):
        train_joint(joint(material, tmp_path, dropout=0.0, seed=seed_of(masked), **SOURCES[source]), base)
    assert checked


def test_one_step_in_five_leaves_the_appearance_lora_out(base, material, tmp_path, monkeypatch):
    left_out = []

    def spy(unet, names, losses, settings, folder, preview, further):
        left_out.extend(next(losses(step, step_generator(0, step)))[1] is None for step in range(1000))
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "train", spy)
    monkeypatch.setattr(module, "predict_noised", lambda unet, noisy, text, motion=True: (noisy.target, noisy.target))
    with pytest.raises(KeyboardInterrupt):
        train_joint(joint(material, tmp_path), base)
    assert sum(left_out) / 1000 == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("masked", [False, True])
def test_both_move_at_their_own_rates_and_a_masked_lora_not_at_all(base, material, tmp_path, masked):
    """The first step of Lion takes B from zero to plus or minus the learning rate."""
    settings = joint(
        material, tmp_path, steps=1, seed=seed_of(masked), appearance_learning_rate=1e-3, learning_rate=4e-3
    )
    tensors = load_file(train_joint(settings, base))
    for name, rate in (("appearance", 0.0 if masked else 1e-3), ("motion", 4e-3)):
        moved = [value for key, value in tensors.items() if key.startswith(f"{name}.") and "lora_B" in key]
        largest = torch.stack([value.abs().max() for value in moved])
        assert torch.allclose(largest, torch.full_like(largest, rate))


def test_a_masked_step_is_logged_without_a_loss_of_looks(base, material, tmp_path):
    train_joint(joint(material, tmp_path, steps=2, seed=seed_of(True, False)), base)
    head, *rows = ((tmp_path / "log.csv").read_text()).splitlines()
    assert head == "step,appearance_loss,motion_loss,seconds"
    values = [[float(value) for value in row.split(",")] for row in rows]
    assert [math.isnan(row[1]) for row in values] == [True, False]
    assert all(math.isfinite(row[2]) for row in values)


def test_a_run_that_was_broken_off_ends_with_the_same_bits(base, material, tmp_path, monkeypatch):
    def told(out, **changes):
        seed = seed_of(False, True, False)
        common = {"steps": 3, "save_every": 1, "seed": seed, "learning_rate": 1e-2, "appearance_learning_rate": 1e-2}
        return joint(material, tmp_path / out, **common, **changes)

    def stopping(done):
        raise KeyboardInterrupt

    whole = load_file(train_joint(told("whole"), base))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "previewer", lambda *_: stopping)
        with pytest.raises(KeyboardInterrupt):
            train_joint(told("cut", preview_every=2), base)
    assert adapter_names(base.unet) == []
    assert (tmp_path / "cut" / "state.pt").is_file()
    resumed = load_file(train_joint(told("cut", preview_every=0), base))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    logs = [(tmp_path / run / "log.csv").read_text().splitlines() for run in ("whole", "cut")]
    whole_rows, cut_rows = ([row.rpartition(",")[0] for row in log] for log in logs)
    assert whole_rows == cut_rows


def test_gradient_checkpointing_trains_the_same_loras(base, material, tmp_path):
    """What is recomputed in a backward pass is computed with the adapters of its forward pass."""
    rates = {"learning_rate": 1e-2, "appearance_learning_rate": 1e-2, "steps": 2, "seed": seed_of(False, True)}
    plain = load_file(train_joint(joint(material, tmp_path / "a", **rates), base))
    less = load_file(train_joint(joint(material, tmp_path / "b", gradient_checkpointing=True, **rates), base))
    assert all(torch.allclose(plain[key], less[key], atol=1e-6) for key in plain)


def test_rank_32_has_the_parameters_of_the_papers_diffdirector(base, material, tmp_path):
    base.recipe = Recipe()
    full = with_defaults(joint(material, tmp_path), base)
    with torch.device("meta"):
        unet = UNet3D(SD15_V3)
    with both_adapters(unet, full):
        assert sum(p.numel() for name in KINDS for p in adapter_parameters(unet, name)) == 30_461_952
    assert adapter_names(unet) == []


def test_the_recipe_of_diffdirector_is_the_default(base, material, tmp_path):
    base.recipe = Recipe()
    full = with_defaults(joint(material, tmp_path, steps=None), base)
    assert (full.steps, full.rank, full.batch_size, full.dropout, full.weight_decay) == (500, 32, 1, 0.1, 0.1)
    assert (full.appearance_learning_rate, full.learning_rate) == (1e-5, 5e-5)


@pytest.mark.parametrize(("source", "looks"), [("photos", "a teddy bear"), ("frames", "a man runs")])
def test_one_file_holds_both_loras_and_their_words(base, material, tmp_path, source, looks):
    trigger = looks.split()[1]
    lora = train_joint(joint(material, tmp_path / "run", trigger=trigger, **SOURCES[source]), base)
    found = read_lora_header(lora).adapters
    assert {name: (its.prompt, its.trigger) for name, its in found.items()} == {
        "appearance": (looks, trigger),
        "motion": ("a man runs", ""),
    }
    specs = {name: (its.spec.kind, its.spec.layers, its.spec.targets) for name, its in found.items()}
    assert specs["appearance"] == ("spatial", (0, 1, 2, 4, 6, 7, 8), "all")
    assert specs["motion"] == ("temporal", (0, 1, 2, 3, 5, 6, 7, 8), "blocks")
    assert adapter_names(base.unet) == []
    before = lora.stat().st_mtime_ns
    assert train_joint(joint(material, tmp_path / "run", trigger=trigger, **SOURCES[source]), base) == lora
    assert lora.stat().st_mtime_ns == before


def test_a_photo_and_a_frame_of_one_name_are_two_inputs(material, tmp_path):
    named = input_files(joint(material, tmp_path, video=str(material / "photos")))
    assert {"images/0.png", "video/0.png", "images/1.txt"} <= set(named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"appearance_prompt": None}, "--images and --appearance_prompt go together"),
        ({"images": None}, "--images and --appearance_prompt go together"),
        ({"trigger": "sks"}, "'sks' is not in the prompt 'a teddy bear'"),
        ({"images": "nowhere"}, "nowhere"),
        ({"video": "nowhere.mp4"}, "nowhere.mp4 does not exist"),
        ({"num_frames": 6}, "5"),
        ({"height": 36}, "divisible by 8"),
        ({"appearance_learning_rate": 0.0}, "appearance_learning_rate must be above 0 and at most 1, and is 0"),
        ({"appearance_learning_rate": math.nan}, "appearance_learning_rate must be above 0"),
        ({"learning_rate": 2.0}, "learning_rate above 0 and at most 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, and is 0"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_settings_leave_no_folder_and_a_clean_network(base, material, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_joint(joint(material, tmp_path / "run", **changes), base)
    assert not (tmp_path / "run").exists()
    assert adapter_names(base.unet) == []


def test_a_base_without_motion_modules_says_what_to_give(files, material, tmp_path):
    base = load_base(files.folder, device="cpu")
    sizes = {"num_frames": 3, "height": 32, "width": 32}
    with pytest.raises(UserError, match="--motion_module"):
        train_joint(joint(material, tmp_path / "run", **sizes), base)
    assert adapter_names(base.unet) == []
