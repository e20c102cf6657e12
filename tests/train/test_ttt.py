"""Stage 3: references, students, and the loss, against independent loops over the same network."""

import json
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from oracles import error
from safetensors.torch import load_file

from lora import (
    adapter_names,
    adapter_parameters,
    adapters,
    add_adapter,
    merge_adapters,
    remove_adapter,
    unmerge_adapters,
)
from model import Recipe, UserError
from sampling import draw_noise, encode, sample_latents
from train.loop import derived_seed
from train.losses import motion_loss
from train.stage import predict
from train.ttt import TTTSettings, references, students, the_one, train_ttt, with_defaults
from weights import load_lora, save_lora

TARGET = "a teddy bear is playing guitar on the snow"
PROMPTS = {"appearance": "a teddy bear", "motion": "a man is playing guitar"}


def write_loras(base, folder, strength):
    """An appearance and a motion LoRA with B of this standard deviation; the network is left as it was."""
    paths = {}
    for name, kind, layers in (("appearance", "spatial", (2, 6)), ("motion", "temporal", (2, 5))):
        add_adapter(base.unet, name, kind, layers, rank=4, generator=torch.Generator().manual_seed(len(name)))
        for p in adapter_parameters(base.unet, name)[1::2]:
            p.data = strength * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.shape[0]))
        paths[name] = str(folder / f"{name}.safetensors")
        save_lora(paths[name], base.unet, {name: (PROMPTS[name], "")}, fingerprints=base.fingerprints)
        remove_adapter(base.unet, name)
    return paths


@pytest.fixture
def settings(base, tmp_path):
    paths = write_loras(base, tmp_path, strength=0.3)
    return TTTSettings(**paths, prompt=TARGET, out=str(tmp_path / "run"), steps=2)


def lora_files(settings):
    """File and adapter's name of both LoRAs."""
    files = {role: Path(getattr(settings, role)) for role in PROMPTS}
    return {role: (file, the_one(file, role)[0]) for role, file in files.items()}


def filled_in(settings, base):
    return with_defaults(settings, base, {role: the_one(Path(getattr(settings, role)), role)[1] for role in PROMPTS})


def texts(base):
    prompts = {**PROMPTS, "student": TARGET, "negative": ""}
    return {role: encode(base, [prompt]) for role, prompt in prompts.items()}


def test_the_papers_numbers_are_the_defaults(base, settings):
    base.recipe = Recipe()
    full = filled_in(TTTSettings(**{**vars(settings), "steps": None}), base)
    assert (full.steps, full.learning_rate, full.reference_steps, full.guidance_scale) == (30, 1e-6, 5, 9.0)
    assert (full.reference, full.reference_spacing, full.reference_every) == ("whole", "trailing", 1)
    assert (full.shared_noise, full.debiased) == (False, False)
    assert (full.appearance_prompt, full.motion_prompt) == (PROMPTS["appearance"], PROMPTS["motion"])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reference", ["whole", "partial"])
def test_references_are_what_the_sampler_gives_with_one_lora_on(base, settings, reference, shared):
    full = filled_in(TTTSettings(**{**vars(settings), "reference": reference, "shared_noise": shared}), base)
    text = texts(base)
    with students(base, lora_files(settings), 0.1):
        for p in (p for name in ("appearance", "motion") for p in adapter_parameters(base.unet, name)):
            p.data += 1.0  # whatever the students have become
        base.unet.train()
        drawn = dict(zip(("appearance", "motion"), references(base, full, text, step=4), strict=True))
        base.unet.eval()
    steps = {"steps": 2, "spacing": "trailing"} if reference == "whole" else {"steps": 3, "only_first": 2}
    for kind, motion in (("appearance", False), ("motion", True)):
        load_lora(base.unet, getattr(settings, kind))
        with adapters(base.unet, {kind: 1.0}):
            expected = sample_latents(
                base,
                text[kind],
                text["negative"],
                [derived_seed(0, kind, 4)],
                motion=motion,
                guidance_scale=9.0,
                shared_noise=shared and kind == "appearance",
                **steps,
            )
        remove_adapter(base.unet, kind)
        assert torch.equal(drawn[kind], expected)


def test_new_references_come_every_step_or_as_asked(base, settings):
    full = filled_in(settings, base)
    with students(base, lora_files(settings), 0.1):
        first, again, later = (references(base, full, texts(base), step) for step in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, later, strict=True))


def independent_sample(base, seed, text, negative, motion):
    """Two trailing DDIM steps of diffusers' scheduler with guidance 9, the network called twice a step."""
    scheduler = DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(2)
    latents = draw_noise(seed, (4, 3, 4, 4))
    for t in scheduler.timesteps:
        with_text, without = (base.unet(latents, t.item(), words, motion=motion) for words in (text, negative))
        latents = scheduler.step(without + 9 * (with_text - without), t, latents).prev_sample
    return latents


@torch.no_grad()
def independent_losses(base, step):
    """Two mean squared errors under the target prompt, noise and t drawn as a step draws them."""
    text = texts(base)
    generator = torch.Generator().manual_seed(derived_seed(0, "step", step))
    alphas = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)
    losses = []
    for kind, motion in (("appearance", False), ("motion", True)):
        z = independent_sample(base, derived_seed(0, kind, step), text[kind], text["negative"], motion)
        t = torch.randint(1000, (1,), generator=generator)
        eps = torch.randn(z.shape, generator=generator)
        noisy = alphas[t].sqrt() * z + (1 - alphas[t]).sqrt() * eps
        losses.append((base.unet(noisy, t, text["student"]) - eps).square().mean().item())
    return losses


def logged_losses(folder, step):
    row = (folder / "log.csv").read_text().splitlines()[1 + step].split(",")
    assert row[0] == str(step)
    return [float(value) for value in row[1:3]]


def test_with_both_b_at_zero_the_losses_are_an_independent_loops_over_the_base(base, tmp_path):
    paths = write_loras(base, tmp_path, strength=0.0)
    train_ttt(TTTSettings(**paths, prompt=TARGET, out=str(tmp_path / "run"), steps=1), base)
    assert logged_losses(tmp_path / "run", 0) == pytest.approx(independent_losses(base, 0), rel=1e-4)


def test_with_loras_the_first_losses_are_those_of_merged_networks(base, settings, tmp_path):
    """The same loop, each network made by merging its LoRAs into the weights; dropout 0, so that nothing else acts."""
    train_ttt(TTTSettings(**{**vars(settings), "dropout": 0.0, "steps": 1}), base)
    text, losses = texts(base), []
    generator = torch.Generator().manual_seed(derived_seed(0, "step", 0))
    names = {kind: next(iter(load_lora(base.unet, getattr(settings, kind)))) for kind in PROMPTS}
    with torch.no_grad():
        for kind, motion in (("appearance", False), ("motion", True)):
            merge_adapters(base.unet, {names[kind]: 1.0})
            z = independent_sample(base, derived_seed(0, kind, 0), text[kind], text["negative"], motion)
            unmerge_adapters(base.unet)
            merge_adapters(base.unet, dict.fromkeys(names.values(), 1.0))
            prediction, target = predict(base.unet, base.schedule, z, text["student"], generator)
            unmerge_adapters(base.unet)
            losses.append((prediction - target).square().mean().item())
    assert logged_losses(tmp_path / "run", 0) == pytest.approx(losses, rel=1e-3)


def test_thirty_steps_leave_the_trained_loras_as_they_were(base, settings, tmp_path):
    before = {kind: load_file(getattr(settings, kind)) for kind in PROMPTS}
    thirty = TTTSettings(**{**vars(settings), "steps": 30, "reference_every": 10})
    seen = {}
    original = base.unet.forward

    def watching(*args, **options):
        for kind in PROMPTS:
            seen[kind] = [p.detach().clone() for p in adapter_parameters(base.unet, f"{kind}_reference")]
        return original(*args, **options)

    base.unet.forward = watching
    lora = train_ttt(thirty, base)
    del base.unet.forward
    trained = load_file(lora)
    for kind, tensors in before.items():
        assert all(torch.equal(value, load_file(getattr(settings, kind))[key]) for key, value in tensors.items())
        kept = {p.shape: [] for p in seen[kind]}
        for p in seen[kind]:
            kept[p.shape].append(p)
        for value in tensors.values():
            assert any(torch.equal(value, p) for p in kept[value.shape])
        moved = max((trained[key] - value).abs().max().item() for key, value in tensors.items())
        largest = max(value.abs().max().item() for value in tensors.values())
        rounding = 1.2e-7 * largest
        assert 1e-5 < moved < 30 * (1e-6 * (1 + 0.1 * largest) + rounding)  # Lion: a learning rate a step, and decay
        assert all(not torch.equal(trained[key], value) for key, value in tensors.items())
    assert adapter_names(base.unet) == []


def test_both_students_receive_gradient_and_the_references_none(base, settings):
    with students(base, lora_files(settings), 0.1), adapters(base.unet, {"appearance": 1.0, "motion": 1.0}):
        z = torch.randn(1, 4, 3, 4, 4)
        prediction, target = predict(base.unet, base.schedule, z, texts(base)["student"], torch.Generator())
        (prediction - target).square().mean().backward()
        for kind in PROMPTS:
            assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(base.unet, kind))
            assert all(p.grad is None for p in adapter_parameters(base.unet, f"{kind}_reference"))


class Box:
    def __init__(self, value):
        self.value = value


class Activations:
    """Bytes of the distinct tensors, parameters apart, that autograd holds on to: now, and at most."""

    def __init__(self, unet):
        self.unet, self.weights = unet, set()
        self.held, self.sizes, self.now, self.most = Counter(), {}, 0, 0

    def pack(self, tensor):
        box, storage = Box(tensor.detach()), tensor.untyped_storage()
        key = storage.data_ptr()
        if not self.weights:
            self.weights = {p.untyped_storage().data_ptr() for p in self.unet.parameters()}
        if key not in self.weights:
            if not self.held[key]:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
            self.held[key] += 1
            self.most = max(self.most, self.now)
            weakref.finalize(box, self.release, key)
        return box

    def release(self, key):
        self.held[key] -= 1
        if not self.held[key]:
            self.now -= self.sizes[key]

    def counted(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.value)


def test_a_step_saves_no_more_activations_than_115_percent_of_a_motion_lora_step(base, settings):
    """The two losses are backpropagated one after the other; one UNet serves references and student."""
    full = TTTSettings(**{**vars(settings), "steps": 1, "num_frames": 4, "height": 64, "width": 64})
    add_adapter(base.unet, "alone", "temporal", (2, 5), rank=4, dropout=0.1)
    base.unet.train()
    text, z = texts(base)["student"], torch.randn(1, 4, 4, 8, 8)
    motion_step, ttt_step = Activations(base.unet), Activations(base.unet)
    with adapters(base.unet, {"alone": 1.0}), motion_step.counted():
        motion_loss(*predict(base.unet, base.schedule, z, text, torch.Generator()), torch.Generator()).backward()
    remove_adapter(base.unet, "alone")
    with ttt_step.counted():
        train_ttt(full, base)
    assert motion_step.most > 1e6
    assert ttt_step.most <= 1.15 * motion_step.most, (ttt_step.most, motion_step.most)


def test_a_partial_reference_is_noised_by_the_one_step_it_came_down(base, settings):
    from train.ttt import partial_prediction

    full = filled_in(TTTSettings(**{**vars(settings), "reference": "partial"}), base)
    seen = {}

    class Network:
        dtype, device = torch.float32, torch.device("cpu")

        def __call__(self, noisy, timestep, text):
            seen.update(noisy=noisy, timestep=timestep)
            return noisy

    real, base.unet = base.unet, Network()
    z = torch.randn(1, 4, 3, 4, 4)
    _, target = partial_prediction(base, full, z, None, torch.Generator().manual_seed(1))
    base.unet = real
    # 3 sampling steps visit 667, 334, 1; after 2 of them z is at the level of step 1, and goes back up to 334
    betas = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
    kept = torch.prod(1 - betas[2:335]).float()
    assert seen["timestep"] == 334
    assert torch.allclose(seen["noisy"], kept.sqrt() * z + (1 - kept).sqrt() * target, atol=1e-4)


def test_the_debiased_option_changes_the_temporal_loss_alone(base, settings, tmp_path):
    rows = []
    for name, debiased in (("plain", False), ("debiased", True)):
        changes = {"out": str(tmp_path / name), "debiased": debiased, "steps": 1}
        train_ttt(TTTSettings(**{**vars(settings), **changes}), base)
        rows.append(logged_losses(tmp_path / name, 0))
    assert rows[0][0] == rows[1][0]
    assert rows[1][1] > 2 * rows[0][1]


def test_a_stopped_run_goes_on_to_the_same_loras(base, settings, tmp_path, monkeypatch):
    four = {**vars(settings), "steps": 4, "save_every": 1, "reference_every": 2}
    whole = load_file(train_ttt(TTTSettings(**{**four, "out": str(tmp_path / "whole")}), base))

    import train.ttt as module

    original, calls = module.predict, []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, "predict", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_ttt(TTTSettings(**{**four, "out": str(tmp_path / "cut")}), base)
    monkeypatch.setattr(module, "predict", original)
    resumed = load_file(train_ttt(TTTSettings(**{**four, "out": str(tmp_path / "cut")}), base))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_report_says_how_far_weights_and_outputs_moved(base, settings, tmp_path):
    lora = train_ttt(settings, base)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for kind in PROMPTS:
        old, new = load_file(getattr(settings, kind)), load_file(lora)
        for matrix in "AB":
            keys = [key for key in old if f"lora_{matrix}" in key]
            moved = max((new[key] - old[key]).abs().max().item() for key in keys)
            assert report[kind][f"largest change of {matrix}"] == pytest.approx(moved, rel=1e-3)
        pairs = [key.removesuffix("A.weight") for key in old if key.endswith("lora_A.weight")]
        change, size = 0.0, 0.0
        for pair in pairs:
            before, after = (t[f"{pair}B.weight"] @ t[f"{pair}A.weight"] for t in (old, new))
            change, size = change + (after - before).square().sum().item(), size + before.square().sum().item()
        assert report[kind]["relative change of B A"] == pytest.approx((change / size) ** 0.5, rel=1e-3)
    text = encode(base, [TARGET])
    with students(base, lora_files(settings), 0.0):
        _, z_t = references(base, filled_in(settings, base), texts(base), step=0)
    noise = base.schedule.add_noise(z_t, draw_noise(0, (4, 3, 4, 4)), torch.tensor([500]))
    with torch.no_grad():
        predictions = [base.unet(noise, 500, text)]
        for files in (list(PROMPTS), ["run/lora"]):
            names = [name for f in files for name in load_lora(base.unet, tmp_path / f"{f}.safetensors")]
            with adapters(base.unet, dict.fromkeys(names, 1.0)):
                predictions.append(base.unet(noise, 500, text))
            for name in names:
                remove_adapter(base.unet, name)
    plain, together, trained = predictions
    by_ttt, by_loras = report["prediction"].values()
    assert by_ttt == pytest.approx(((trained - together).norm() / together.norm()).item(), rel=1e-3)
    assert by_loras == pytest.approx(((together - plain).norm() / plain.norm()).item(), rel=1e-3)
    assert error(trained, together) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"appearance": "motion.safetensors"}, r"one spatial LoRA, and .* holds motion \(temporal\)"),
        ({"motion": "appearance.safetensors"}, "one temporal LoRA"),
        ({"motion": "nowhere"}, "nowhere"),
        ({"reference_steps": 0}, "reference_steps"),
        ({"reference_steps": 4, "reference": "partial"}, "from 1 to 3"),
        ({"reference_every": -1}, "reference_every"),
    ],
)
def test_bad_settings_are_explained_and_the_network_left_clean(base, settings, tmp_path, changes, message):
    changes = {k: str(tmp_path / v) if str(v).endswith("safetensors") else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message):
        train_ttt(TTTSettings(**{**vars(settings), **changes}), base)
    assert adapter_names(base.unet) == []
    assert not (tmp_path / "run").exists()


def test_a_lora_without_a_prompt_needs_one(base, settings, tmp_path):
    add_adapter(base.unet, "appearance", "spatial", (2,), rank=2)
    save_lora(tmp_path / "mute.safetensors", base.unet, {"appearance": ("", "")})
    remove_adapter(base.unet, "appearance")
    mute = {**vars(settings), "appearance": str(tmp_path / "mute.safetensors")}
    with pytest.raises(UserError, match="--appearance_prompt"):
        train_ttt(TTTSettings(**mute), base)
    train_ttt(TTTSettings(**{**mute, "appearance_prompt": "a bear", "steps": 1}), base)
