"""Absorbers: tokens against transformers' own resized table, LoRAs against plain autograd; run folders."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from conftest import small_base
from oracles import error
from safetensors.torch import load_file
from small_runs import absorber, broken_off, logged

import train.absorber
import train.loop
from lora import adapter_names
from model import UserError
from sampling import derived_seed, encode
from train.absorber import random_crops, train_absorber, with_defaults
from weights import learned_tokens, load_base, lora_path, read_embedding, read_lora_header
from weights.inspect import describe

KINDS = {"lora": ["lora.safetensors"], "token": ["embedding.safetensors"]}
KINDS["dual"] = [*KINDS["token"], *KINDS["lora"]]
ALL_SPATIAL = (0, 1, 2, 4, 6, 7, 8)
FAST = {"learning_rate": 1e-3, "token_learning_rate": 1e-2, "dropout": 0.0, "seed": 3}


@pytest.fixture(scope="module")
def base(files):
    """One for all runs, each of which leaves it as it was."""
    return small_base(files)


def crop_latents(base, settings):
    """Mean and standard deviation of the latents of all crops, (crops, 4, 1, h / 8, w / 8)."""
    mean, log_variance = base.vae.encode(random_crops(with_defaults(settings, base))).chunk(2, dim=1)
    return [0.18215 * x[:, :, None] for x in (mean, (log_variance / 2).exp())]


def loss_of(base, settings, latents, text, step):
    """The noise MSE of a random crop in that step, the motion modules bypassed."""
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "step", step))
    i = torch.randint(settings.crops, (1,), generator=generator)
    mean, std = (x[i] for x in latents)
    clean = mean + std * torch.randn(mean.shape, generator=generator)
    t = torch.randint(1000, (1,), generator=generator)
    eps = torch.randn(mean.shape, generator=generator)
    kept = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)[t]
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * eps
    return (base.unet(noisy, t, text, motion=False) - eps).square().mean()


@pytest.mark.parametrize("vectors", [1, 3])
def test_a_token_learns_what_a_row_of_transformers_resized_table_learns(base, material, tmp_path, vectors):
    settings = absorber(material, tmp_path / "run", kind="token", vectors=vectors, steps=6, **FAST)
    text = copy.deepcopy(base.text.clip)
    train_absorber(settings, base)

    [dog] = base.tokenizer("dog", add_special_tokens=False)["input_ids"]
    rows = text.get_input_embeddings().num_embeddings
    text.resize_token_embeddings(rows + vectors, mean_resizing=False)
    table = text.get_input_embeddings().weight.requires_grad_(True)
    table.data[rows:] = start = table.data[dog].clone()
    first, *inner, last = base.tokenizer("a dog")["input_ids"]
    row = [first, *inner[:-1], *range(rows, rows + vectors), inner[-1], last]
    tokens = torch.tensor([row + [base.tokenizer.pad_token_id] * (77 - len(row))])
    latents, momentum, losses = crop_latents(base, settings), torch.zeros_like(table), []
    for step in range(6):
        loss = loss_of(base, settings, latents, text(input_ids=tokens).last_hidden_state, step)
        [gradient] = torch.autograd.grad(loss, table)
        gradient[:rows] = 0
        with torch.no_grad():
            table -= 1e-2 * (0.9 * momentum + 0.1 * gradient).sign()
        momentum = 0.99 * momentum + 0.01 * gradient
        losses.append(loss.item())

    learnt = read_embedding(tmp_path / "run" / "embedding.safetensors")
    assert learnt.token == "<look>"
    assert logged(tmp_path / "run") == pytest.approx(losses, rel=1e-4)
    assert (learnt.vectors - table[rows:]).abs().max() < 1e-5
    assert (learnt.vectors - start).abs().median() > 1e-2
    assert vectors == 1 or not torch.equal(learnt.vectors[0], learnt.vectors[1])


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_base_nothing_changes(base, material, tmp_path, kind):
    networks = (base.unet, base.text, base.vae)
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    table, weight = base.text.clip.embeddings.token_embedding, base.text.clip.embeddings.token_embedding.weight
    train_absorber(absorber(material, tmp_path, kind=kind, **FAST), base)
    for network, state in zip(networks, before, strict=True):
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
        assert not network.training
        assert adapter_names(network) == []
    assert base.text.clip.embeddings.token_embedding is table
    assert table.weight is weight
    assert base.learned == {}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_on_the_loss_of_a_crop(base, material, tmp_path, monkeypatch, kind):
    """Each step's, right before the optimizer takes it; with LoRA and token together, of both."""
    settings = absorber(material, tmp_path, kind=kind, **FAST)
    latents, seen = crop_latents(base, settings), []

    class Watched(train.loop.Lion):
        def step(self, *arguments):
            given = [p for group in self.param_groups for p in group["params"]]
            text = base.text(base.tokens([settings.prompt]))
            expected = torch.autograd.grad(loss_of(base, settings, latents, text, len(seen)), given)
            # queries and keys of a layer that sees one place have no gradient but rounding
            seen.append([error(p.grad, e) for p, e in zip(given, expected, strict=True) if e.abs().max() > 1e-7])
            rates = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
            assert rates == {"lora": [(1e-3, 0.1)], "token": [(1e-2, 0)], "dual": [(1e-3, 0.1), (1e-2, 0)]}[kind]
            return super().step(*arguments)

    monkeypatch.setattr(train.loop, "Lion", Watched)
    train_absorber(settings, base)
    assert len(seen) == 3
    assert max(map(max, seen)) < 1e-3
    pairs = 0 if kind == "token" else 10 * 16  # ten linear layers in each of 16 spatial transformers
    for step, count in zip(seen, (pairs, 2 * pairs, 2 * pairs), strict=True):  # B is zero at first, and A rests
        assert 0.8 * count <= len(step) - (kind != "lora") <= count


def test_a_lora_sits_on_all_spatial_layers_unless_told_otherwise(base, material, tmp_path):
    train_absorber(absorber(material, tmp_path / "all"), base)
    train_absorber(absorber(material, tmp_path / "two", kind="lora", layers=[2, 6], targets="attention"), base)
    entry = read_lora_header(tmp_path / "all").adapters["absorber"]
    assert (entry.spec.kind, entry.spec.layers, entry.prompt) == ("spatial", ALL_SPATIAL, "a <look> dog")
    entry = read_lora_header(tmp_path / "two").adapters["absorber"]
    assert (entry.spec.layers, entry.spec.targets) == ((2, 6), "attention")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_holds_what_was_learnt(base, material, tmp_path, kind):
    assert train_absorber(absorber(material, tmp_path / "run", kind=kind, preview_every=3), base) == tmp_path / "run"
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names == {"inputs.json", "log.csv", "previews", "settings.json", *KINDS[kind]}
    assert (tmp_path / "run" / "previews" / "step-00003.mp4").is_file()
    if kind != "lora":
        with learned_tokens(base, [read_embedding(tmp_path / "run" / "embedding.safetensors")]):
            assert error(encode(base, ["a <look> dog"]), encode(base, ["a dog dog"])) > 1e-6


def test_the_rate_of_a_token_is_measured_by_the_table(base, material, tmp_path):
    """Lion moves each number by the rate in the first step: a hundredth of the standard deviation of the table's."""
    table = base.text.clip.embeddings.token_embedding.weight
    [dog] = base.tokenizer("dog", add_special_tokens=False)["input_ids"]
    train_absorber(absorber(material, tmp_path, kind="token", steps=1), base)
    moved = (read_embedding(tmp_path / "embedding.safetensors").vectors - table[dog]).abs()
    assert torch.allclose(moved, table.std() / 100, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_ends_with_the_same_files(base, material, tmp_path, kind):
    changes = {**FAST, "dropout": 0.1, "kind": kind, "steps": 5, "save_every": 2}
    train_absorber(absorber(material, tmp_path / "whole", **changes), base)
    run = tmp_path / "run"
    with broken_off(3):
        train_absorber(absorber(material, run, **changes), base)
    assert (run / "state.pt").is_file()
    assert not any((run / name).exists() for name in KINDS[kind])
    train_absorber(absorber(material, run, **changes), base)
    assert not list(run.glob("state*"))
    assert logged(run) == logged(tmp_path / "whole")
    for name in KINDS[kind]:
        found, expected = load_file(run / name), load_file(tmp_path / "whole" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_kill_between_the_two_files_of_a_dual_run_loses_neither(base, material, tmp_path, monkeypatch):
    settings = absorber(material, tmp_path / "run", save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("train.folder.save_lora", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_absorber(settings, base)
    assert (tmp_path / "run" / "embedding.safetensors").is_file()
    train_absorber(settings, base)
    train_absorber(absorber(material, tmp_path / "whole"), base)
    for name in KINDS["dual"]:
        found, expected = load_file(tmp_path / "run" / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["token", "dual"])
def test_a_finished_run_returns_at_once_and_another_is_refused(base, material, tmp_path, monkeypatch, kind):
    run = tmp_path / "run"
    train_absorber(absorber(material, run, kind=kind, steps=1), base)
    monkeypatch.setattr(train.absorber, "random_crops", lambda settings: 1 / 0)
    assert train_absorber(absorber(material, run, kind=kind, steps=1), base) == run
    others = [{"crops": 7}, {"prompt": "a big <look> dog"}, {"vectors": 2}, {"crop_to": 0.5}, {"initializer": "bear"}]
    others += [{"kind": other} for other in KINDS if other != kind]
    for other in others:
        [key] = other
        with pytest.raises(UserError, match=rf"other settings: .*\b{key} "):
            train_absorber(absorber(material, run, **{"kind": kind, "steps": 1, **other}), base)
    photos = absorber(material, run, kind=kind, steps=1, video=str(material / "photos"))
    with pytest.raises(UserError, match=r"the contents of 0\.png, .*the contents of clip\.mp4"):
        train_absorber(photos, base)


def test_it_trains_without_motion_modules_and_gives_the_same(files, material, tmp_path):
    found = []
    for name, adapter in (("image", None), ("video", files.adapter)):
        base = load_base(files.folder, adapter, device="cpu")
        settings = absorber(material, tmp_path / name, rank=4, num_frames=3, height=32, width=32)
        train_absorber(settings, base)
        found.append([load_file(tmp_path / name / file) for file in KINDS["dual"]])
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in ours)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "a dog"}, r"the token <look> is not in the prompt 'a dog': .*\(a <look> dog\)"),
        ({"prompt": "a <look>", "token": "look"}, None),
        ({"kind": "lora", "prompt": "a <look> dog"}, "holds the token <look>, which --kind lora does not learn"),
        ({"prompt": "a red dog", "token": "red"}, r"'red' is a word of CLIP's own: take another --token"),
        ({"prompt": "a RED dog", "token": "red"}, r"'red' is a word of CLIP's own"),
        ({"prompt": "a emb_params", "token": "emb_params"}, "'emb_params'.* take another"),
        ({"token": " "}, "token must not be empty"),
        ({"initializer": None}, "give --initializer, a plain word"),
        ({"initializer": "red dog"}, "the initializer 'red dog' is 2 tokens to CLIP"),
        ({"initializer": " "}, "the initializer ' ' is 0 tokens"),
        ({"vectors": 74}, r"'a <look> dog' with 74 vectors for <look> does not fit into the 75 tokens"),
        ({"vectors": 10**9}, "fewer --vectors"),
        ({"vectors": 0}, "crops and vectors must be at least 1"),
        ({"crops": 0}, "crops and vectors must be at least 1"),
        ({"crop_from": 0.0}, "crop_from and crop_to between 0 and 1"),
        ({"crop_from": 0.7}, "crop_from and crop_to between 0 and 1 and in this order: got 6, 1, 0.7 and 0.67"),
        ({"crop_to": 1.1}, "crop_from and crop_to"),
        ({"crop_to": float("nan")}, "crop_from and crop_to"),
        ({"token_learning_rate": 0.0}, "token_learning_rate must be above 0"),
        ({"token_learning_rate": float("nan")}, "token_learning_rate must be above 0"),
        ({"num_frames": 6}, r"clip\.mp4.*5"),
        ({"height": 36}, "divisible by 8"),
        ({"layers": [3]}, "layer 3 has no spatial transformer"),
        ({"video": "nowhere.mp4"}, "nowhere.mp4 does not exist"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(base, material, tmp_path, monkeypatch, changes, says):
    if "token" in changes or "initializer" in changes:
        monkeypatch.setattr(train.absorber, "encode_videos", lambda *arguments: 1 / 0)  # told before the long work
    settings = absorber(material, tmp_path / "run", **changes)
    if says is None:
        monkeypatch.undo()
        assert train_absorber(settings, base)
        return
    with pytest.raises(UserError, match=says) as caught:
        train_absorber(settings, base)
    assert not re.search(r"/tmp\w+/", str(caught.value))
    assert not (tmp_path / "run").exists()
    assert base.learned == {}
    assert adapter_names(base.unet) == []


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("token", {"rank": 4, "layers": [2]}, "--kind token learns no LoRA: no effect of rank and layers$"),
        ("token", {"learning_rate": 1e-4}, "no effect of learning_rate$"),
        ("lora", {"vectors": 2}, "--kind lora learns no token: no effect of vectors$"),
        ("lora", {"initializer": "dog", "token": "<it>"}, "no effect of token and initializer$"),
    ],
)
def test_flags_of_what_is_not_learned_are_named(base, material, tmp_path, kind, changes, says):
    settings = absorber(material, tmp_path / "run", kind=kind, steps=1)
    with pytest.warns(UserWarning, match=says):
        train_absorber(replace(settings, **changes), base)
    train_absorber(replace(settings, out=str(tmp_path / "plain")), base)
    name = KINDS[kind][0]
    ours, plain = (load_file(tmp_path / run / name) for run in ("run", "plain"))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_what_is_just_short_enough_for_the_text_encoder_is_learned(base, material, tmp_path):
    run = train_absorber(absorber(material, tmp_path / "run", kind="token", vectors=73, steps=1), base)
    assert read_embedding(run).vectors.shape == (73, 128)


def test_a_folder_with_a_learned_word_alone_is_sent_where_it_belongs(base, material, tmp_path):
    run = train_absorber(absorber(material, tmp_path / "run", kind="token", steps=1), base)
    assert "It belongs in --absorbers or --embedding" in describe(run)
    with pytest.raises(UserError, match="it learned a word alone, which belongs in --embedding"):
        lora_path(run)
    both = train_absorber(absorber(material, tmp_path / "both", kind="dual", steps=1), base)
    (both / "lora.safetensors").unlink()  # as a kill between its two files leaves it
    assert "unfinished: start it again" in describe(both)
    with pytest.raises(UserError, match="the run in it is not finished"):
        lora_path(both)
    looks = train_absorber(absorber(material, tmp_path / "looks", kind="lora", steps=1), base)
    with pytest.raises(UserError, match="looks is a folder without a learned word"):
        read_embedding(looks)
