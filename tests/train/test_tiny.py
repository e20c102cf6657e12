"""The recipe of the tiny base: small, but whole."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from model import TINY, UserError
from train.pretrain import LOG_EVERY, pretrain
from train.tiny import TinySettings, train_tiny
from weights import load_base

SMALL = {
    "clip_steps": 2,
    "vae_steps": 2,
    "image_steps": 2,
    "video_steps": 2,
    "frames": 8,
    "clips": 4,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = TinySettings(out=str(tmp_path_factory.mktemp("recipe") / "tiny"), device="cpu", **SMALL)
    return settings, train_tiny(settings)


def test_the_recipe_gives_a_base_that_loads(run):
    base = load_base(run[1])
    assert base.unet.config == TINY
    assert (base.recipe.height, base.recipe.width, base.recipe.num_frames) == (64, 64, 16)
    assert base.embed(["a striped red star"]).shape == (1, 24, 64)


def test_the_video_stage_leaves_the_spatial_part_but_for_the_keys_and_values_of_the_text(run):
    image, video = (
        torch.load(f"{run[0].out}/{stage}/state.pt", weights_only=True)["network"] for stage in ("image", "video")
    )
    changed = {name for name in image if not torch.equal(image[name], video[name])}
    assert changed == {name for name in image if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}


def test_latents_have_a_standard_deviation_of_one(run):
    latents = torch.load(f"{run[0].out}/image/latents.pt", weights_only=True).float()
    scale = load_base(run[1]).vae.config.scaling_factor
    assert scale != 0.18215
    assert latents[0].square().add(latents[1].square()).mean().sqrt().item() == pytest.approx(1, abs=0.35)


def test_a_finished_recipe_is_not_run_again(run):
    states = [Path(run[0].out) / stage / "state.pt" for stage in ("clip", "vae", "image", "video")]
    before = [state.stat().st_mtime_ns for state in states]
    train_tiny(run[0])
    assert [state.stat().st_mtime_ns for state in states] == before


@pytest.mark.parametrize(
    "wrong", [{"clip_steps": 0}, {"frames": 0}, {"clip_steps": -1, "start": "."}, {"start": "nowhere"}]
)
def test_settings_that_cannot_be_are_refused_before_any_work(tmp_path, wrong):
    out = tmp_path / "tiny"
    with pytest.raises(UserError, match=r"clip_steps|frames|nowhere"):
        train_tiny(TinySettings(out=str(out), device="cpu", **{**SMALL, **wrong}))
    assert not out.exists()


def test_a_stage_is_not_trained_anew_under_those_built_on_it(tmp_path, run):
    out = tmp_path / "tiny"
    shutil.copytree(run[0].out, out)
    shutil.rmtree(out / "vae")
    with pytest.raises(UserError, match="image and video built on another vae"):
        train_tiny(dataclasses.replace(run[0], out=str(out)))


def test_other_settings_are_refused_in_the_same_folder(run):
    with pytest.raises(UserError, match=r"vae_steps \(2 there, 3 now\)"):
        train_tiny(dataclasses.replace(run[0], vae_steps=3))


def test_a_stage_whose_forerunners_are_missing_says_so(tmp_path):
    settings = TinySettings(out=str(tmp_path / "tiny"), stage="video", device="cpu", **SMALL)
    with pytest.raises(UserError, match="is not done yet"):
        train_tiny(settings)


def test_the_recipe_goes_on_from_a_finished_base(tmp_path, run):
    """One step from the shipped weights at a learning rate that hardly moves them: they stay what they were."""
    settings = TinySettings(out=str(tmp_path / "more"), start=str(run[1]), device="cpu", **SMALL)
    again = load_base(train_tiny(settings))
    first = load_base(run[1])
    for name in ("unet", "vae", "text"):
        old, new = getattr(first, name).state_dict(), getattr(again, name).state_dict()
        distance = sum((old[k].float() - new[k].float()).square().sum() for k in old)
        size = sum(old[k].float().square().sum() for k in old)
        assert 0 < distance < 1e-3 * size
    image, video = (
        torch.load(tmp_path / "more" / stage / "state.pt", weights_only=True)["network"] for stage in ("image", "video")
    )
    kept = [name for name in image if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    assert all(torch.equal(image[name], video[name]) for name in kept)


def test_a_stage_of_no_steps_keeps_what_it_began_with(tmp_path, run):
    """Only the motion modules and the keys and values of the text may have moved, but for fp16 in the files."""
    steps = {**SMALL, "clip_steps": 0, "vae_steps": 0, "image_steps": 0}
    again = load_base(train_tiny(TinySettings(out=str(tmp_path / "on"), start=str(run[1]), device="cpu", **steps)))
    first = load_base(run[1])
    for name in ("unet", "vae", "text"):
        old, new = getattr(first, name).state_dict(), getattr(again, name).state_dict()
        moved = {key for key in old if not torch.equal(old[key], new[key])}
        if name == "unet":
            moves = {
                key for key in old if ".temporal." in key or key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
            }
            assert moved
            assert moved <= moves
        else:
            assert not moved, name


def test_the_autoencoder_is_told_how_far_it_moved_from_the_one_it_began_with(tmp_path, run, monkeypatch):
    monkeypatch.setattr("train.pretrain.LOG_EVERY", 1)
    settings = TinySettings(out=str(tmp_path / "on"), start=str(run[1]), stage="vae", device="cpu", **SMALL)
    rows = (train_tiny(settings) / "log.csv").read_text().splitlines()
    assert rows[0] == "step,pixels,kl,moved"
    first, second = (float(row.split(",")[3]) for row in rows[1:])
    assert first == 0  # nothing has moved before the first step
    assert second > 1e-5


def quadratic(seed_everything: int) -> tuple[torch.nn.Linear, object]:
    torch.manual_seed(seed_everything)
    network = torch.nn.Linear(4, 1)

    def loss(generator):
        x = torch.randn(8, 4, generator=generator)
        return {"square": (network(x)[:, 0] - x.sum(1)).square().mean()}

    return network, loss


def test_pretrain_learns_a_linear_map(tmp_path):
    network, loss = quadratic(0)
    pretrain(network, loss, tmp_path, steps=400, learning_rate=0.05, weight_decay=0.0)
    assert torch.allclose(network.weight, torch.ones(1, 4), atol=1e-2)


def test_pretrain_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    (tmp_path / "a" / "x").mkdir(parents=True), (tmp_path / "b" / "x").mkdir(parents=True)
    whole, loss = quadratic(0)
    pretrain(whole, loss, tmp_path / "a" / "x", steps=60, learning_rate=0.05)
    monkeypatch.setattr("train.pretrain.SAVE_SECONDS", 0.01)
    cut, loss = quadratic(0)

    class KilledError(Exception):
        pass

    calls = iter(range(100))

    def loss_until_killed(generator):
        if next(calls) == 57:
            raise KilledError
        return loss(generator)

    with pytest.raises(KilledError):
        pretrain(cut, loss_until_killed, tmp_path / "b" / "x", steps=60, learning_rate=0.05)
    resumed, loss = quadratic(1)  # another start: the state must overrule it
    pretrain(resumed, loss, tmp_path / "b" / "x", steps=60, learning_rate=0.05)
    assert torch.equal(whole.weight, resumed.weight)
    logs = [(tmp_path / run / "x" / "log.csv").read_text() for run in ("a", "b")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 60 // LOG_EVERY + 1


def test_a_stage_whose_state_was_deleted_is_trained_and_kept_again(tmp_path):
    first, loss = quadratic(0)
    pretrain(first, loss, tmp_path, steps=3, learning_rate=0.1)
    (tmp_path / "state.pt").unlink()
    again, loss = quadratic(0)
    pretrain(again, loss, tmp_path, steps=3, learning_rate=0.1)
    assert torch.equal(torch.load(tmp_path / "state.pt", weights_only=True)["network"]["weight"], first.weight)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(tmp_path):
    network, _ = quadratic(0)
    before = network.weight.detach().clone()

    def loss(generator):
        return {"root": (network.weight.sum() * 0).sqrt()}  # 0, with a slope that is not a number

    with pytest.raises(UserError, match="the gradient of step 0 is not finite"):
        pretrain(network, loss, tmp_path, steps=2, learning_rate=0.1)
    assert torch.equal(network.weight, before)


def test_pretrain_stops_at_a_loss_that_is_not_finite(tmp_path):
    network, _ = quadratic(0)
    with pytest.raises(UserError, match="the loss of step 0 is nan"):
        pretrain(network, lambda g: {"l": network.weight.sum() * float("nan")}, tmp_path, steps=2, learning_rate=0.1)


def test_a_damaged_state_is_said(tmp_path):
    network, loss = quadratic(0)
    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"state\.pt"):
        pretrain(network, loss, tmp_path, steps=2, learning_rate=0.1)
