"""Stage 3 as a run: what it trains and keeps, its memory, its report, how it stops and goes on."""

import json
import weakref
from collections import Counter

import pytest
import torch
from oracles import error
from safetensors.torch import load_file
from two_loras import PROMPTS, TARGET, filled_in, lora_files, texts, write_loras

from lora import (
    adapter_names,
    adapter_parameters,
    adapters,
    add_adapter,
    remove_adapter,
)
from model import UserError
from sampling import draw_noise, encode, read_video
from sampling.generate import GenerateSettings, generate_files
from train.losses import motion_loss
from train.stage import predict
from train.ttt import TTTSettings, references, students, train_ttt
from weights import load_lora, read_lora_header, save_lora


@pytest.fixture
def settings(base, tmp_path):
    paths = write_loras(base, tmp_path, strength=0.3)
    return TTTSettings(**paths, prompt=TARGET, out=str(tmp_path / "run"), steps=2)


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


def test_both_loras_keep_the_words_they_were_trained_with(base, settings):
    header = read_lora_header(train_ttt(settings, base))
    assert {name: entry.prompt for name, entry in header.adapters.items()} == PROMPTS
    assert header.settings["prompt"] == TARGET


def test_previews_show_the_prompt_to_be_generated(base, settings, tmp_path):
    train_ttt(TTTSettings(**{**vars(settings), "preview_every": 2, "seed": 4}), base)
    preview = read_video(tmp_path / "run" / "previews" / "step-00002.mp4", 3, 32, 32)
    clip = GenerateSettings(prompt=[TARGET], out=str(tmp_path / "c.mp4"), lora=[str(tmp_path / "run")], seed=[4])
    generate_files(clip, base)
    assert torch.equal(read_video(tmp_path / "c.mp4", 3, 32, 32), preview)


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
