"""Motion trained behind absorbers: against losses with them put in by hand; frozen, gone afterwards, of any tool."""

import copy
from contextlib import ExitStack

import bases
import pytest
import torch
from absorbed_runs import PROMPT, STILL, clip, reversed_clip, run
from conftest import small_base
from lora_files import CLIP, SPATIAL, dotted, kohya, kohya_text, merged_by_hand, random_weights, targets, written
from oracles import diffusers_name, sampled_latents
from safetensors.torch import load_file
from small_runs import motion

import train.motion
from lora import adapter_modules, adapter_names
from model import UserError
from sampling import derived_seed, encode, read_video
from sampling.generate import GenerateSettings, generate_files
from train.motion import train_motion
from weights import Embedding, learned_tokens, load_base, read_embedding, read_lora_header, save_embedding


@pytest.fixture(scope="module")
def base(files):
    """One for all runs, each of which leaves it as it was."""
    return small_base(files)


@torch.no_grad()
def expected_losses(unet, base, clips, texts, steps=2):
    """Plain noise MSE of a step on one of the clips under its text."""
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(derived_seed(STILL["seed"], "step", step))
        i = int(torch.randint(len(clips), (), generator=generator)) if len(clips) > 1 else 0
        latents = sampled_latents(base, clips[i], torch.randn(1, 4, 3, 4, 4, generator=generator))
        t, eps = torch.randint(1000, (1,), generator=generator), torch.randn(latents.shape, generator=generator)
        kept = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)[t]
        network = unet[i] if isinstance(unet, list) else unet
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * eps
        found.append((network(noisy, t, texts[i]) - eps).square().mean().item())
    return found


def merged(network, halves, strength=1.0):
    """A copy of a network with W + strength * B A, by hand; A and B by the layer."""
    other = copy.deepcopy(network)
    for name, (a, b) in halves.items():
        other.get_submodule(name).weight.data += strength * b @ a
    return other


def halves_in(file, unet):
    """A and B of a LoRA file of ours by our layers' names."""
    tensors = load_file(file)
    stems = {diffusers_name(name): name for name in targets(unet, SPATIAL + ".*")}
    keys = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")}
    return {
        stems[key.partition(".")[2]]: (tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]) for key in keys
    }


def texts_with(base, prompt, *embeddings):
    with ExitStack() as stack:
        stack.enter_context(learned_tokens(base, embeddings))
        return encode(base, [prompt])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_run_of_ours_is_on_while_the_motion_trains(base, material, tmp_path, looks, strength):
    unet = merged(base.unet, halves_in(looks / "0" / "lora.safetensors", base.unet), strength)
    text = texts_with(base, PROMPT, read_embedding(looks / "0" / "embedding.safetensors"))
    expected = expected_losses(unet, base, [clip(material)], [text])
    name = str(looks / "0") + (":0.5" if strength == 0.5 else "")
    assert run(base, material, tmp_path / "with", [name]) == pytest.approx(expected, rel=1e-4)
    without = run(base, material, tmp_path / "without", [])
    assert without != pytest.approx(expected, rel=1e-4)


def test_what_is_written_is_the_motion_alone_and_the_base_is_as_it_was(base, material, tmp_path, looks):
    networks = (base.unet, base.text)
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    lora = train_motion(motion(material, tmp_path, prompt=PROMPT, absorbers=[str(looks / "0")]), base)
    header = read_lora_header(lora)
    assert header.adapters.keys() == {"motion"}
    assert header.adapters["motion"].prompt == "a dog runs"
    tensors = load_file(lora)
    assert all(key.startswith("motion.") and ".motion_modules." in key for key in tensors)
    assert all(value.any() for value in tensors.values())
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "inputs.json",
        "log.csv",
        "lora.safetensors",
        "settings.json",
    ]
    for network, state in zip(networks, before, strict=True):
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert adapter_names(base.unet) == adapter_names(base.text.clip) == []
    assert base.learned == {}


def test_absorbers_are_frozen(base, material, tmp_path, monkeypatch, looks):
    pairs = {"unet": random_weights(base.unet, SPATIAL + ".*"), "text": random_weights(base.text.clip, CLIP)}
    both = written(tmp_path, {**kohya(pairs["unet"]), **kohya_text(pairs["text"])})
    inner, kept = train.motion.train_adapter, {}

    def watched(base, *arguments):
        def parameters():
            found = {}
            for network in (base.unet, base.text.clip):
                for name in set(adapter_names(network)) - {"motion"}:
                    found |= {(name, path): m for path, m in adapter_modules(network, name).items()}
            return {(*key, part): getattr(m, part) for key, m in found.items() for part in "AB"}

        before = {key: p.detach().clone() for key, p in parameters().items()}
        result = inner(base, *arguments)
        kept.update({key: torch.equal(p, before[key]) and p.grad is None for key, p in parameters().items()})
        assert not any(p.requires_grad for p in parameters().values())
        return result

    monkeypatch.setattr("train.motion.train_adapter", watched)
    run(base, material, tmp_path / "run", [looks / "0", f"{both}:0.3"], learning_rate=1e-2)
    assert {name for name, _, _ in kept} == {"absorber", "lora_theirs"}
    assert all(kept.values())
    assert len(kept) == 2 * (160 + len(pairs["unet"]) + len(pairs["text"]))


def test_previews_are_without_absorbers(base, files, material, tmp_path, looks):
    other = bases.write_base(tmp_path / "dream", "ldm", seed=1)
    changes = {"learning_rate": 1e-2, "preview_every": 2, "absorbers": [str(looks / "0"), str(other)]}
    train_motion(motion(material, tmp_path / "run", prompt=PROMPT, steps=2, seed=5, **changes), base)
    clips = [tmp_path / "run" / "previews" / "step-00002.mp4", tmp_path / "clip.mp4"]
    lora = [str(tmp_path / "run")]
    generate_files(GenerateSettings(prompt=["a dog runs"], out=str(clips[1]), lora=lora, seed=[5]), base)
    assert torch.equal(*(read_video(file, 3, 32, 32) for file in clips))


def test_each_of_several_videos_has_its_own_absorber_on_alone(base, material, tmp_path, looks):
    """Both tokens are called the same, and stand for their own video's looks."""
    unets = [merged(base.unet, halves_in(looks / str(i) / "lora.safetensors", base.unet)) for i in (0, 1)]
    words = [PROMPT, "a <look> bear runs"]
    texts = [texts_with(base, words[i], read_embedding(looks / str(i) / "embedding.safetensors")) for i in (0, 1)]
    clips = [clip(material), clip(material).flip(0)]
    changes = {"steps": 4, "more_videos": [str(reversed_clip(tmp_path, clips[1]))], "more_prompts": words[1:]}
    with pytest.warns(UserWarning, match="1 was trained on another clip"):
        found = run(base, material, tmp_path / "run", [looks / "0", looks / "1"], **changes)
    assert found == pytest.approx(expected_losses(unets, base, clips, texts, 4), rel=1e-4)
    for wrong in (unets[::-1], unets[0]):
        assert found != pytest.approx(expected_losses(wrong, base, clips, texts, 4), rel=1e-4)


def lora_kohya(base, folder):
    weights, text = random_weights(base.unet, SPATIAL + ".*"), random_weights(base.text.clip, CLIP)
    path = written(folder, {**kohya(weights), **kohya_text(text)})
    return f"{path}:0.7", weights, text, 0.7


def lora_diffusers(base, folder):
    weights = random_weights(base.unet, SPATIAL + r"transformer_blocks\.0\.attn.*")
    (folder / "pipe").mkdir()
    written(folder / "pipe", dotted(weights, "unet."), "pytorch_lora_weights.safetensors")
    return str(folder / "pipe"), weights, {}, 1.0


def lora_of_text(base, folder):
    text = random_weights(base.text.clip, CLIP)
    return str(written(folder, kohya_text(text))), {}, text, 1.0


@pytest.mark.parametrize("made", [lora_kohya, lora_diffusers, lora_of_text])
def test_loras_of_other_tools_absorb(base, material, tmp_path, made):
    argument, weights, text, strength = made(base, tmp_path)
    other = copy.copy(base)
    other.unet, other.text = copy.deepcopy(base.unet), copy.deepcopy(base.text)
    for network, part in ((other.unet, weights), (other.text.clip, text)):
        for name, value in merged_by_hand(network, part, strength).items():
            network.get_submodule(name).weight.data = value
    expected = expected_losses(other.unet, base, [clip(material)], [encode(other, ["a dog runs"])])
    found = run(base, material, tmp_path / "run", [argument], prompt="a dog runs")
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["a1111.pt", "learned_embeds.bin", "own.safetensors", "bare.pt:<look>"])
def test_tokens_of_other_tools_absorb(base, material, tmp_path, form):
    vectors, (name, _, _) = torch.randn(2, 128), form.partition(":")
    path = tmp_path / name
    if name == "own.safetensors":
        save_embedding(path, Embedding("<look>", vectors))
    else:
        a1111 = {"string_to_param": {"*": vectors}, "name": "<look>"}
        torch.save({"a1111.pt": a1111, "learned_embeds.bin": {"<look>": vectors}, "bare.pt": vectors}[name], path)
    expected = expected_losses(
        base.unet, base, [clip(material)], [texts_with(base, PROMPT, Embedding("<look>", vectors))]
    )
    assert run(base, material, tmp_path / "run", [tmp_path / form]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", ["ldm", "diffusers", "unet file"])
def test_the_unet_of_a_dreambooth_checkpoint_absorbs_and_goes(base, files, material, tmp_path, looks, layout):
    dream = bases.write_base(tmp_path / "dream", "ldm" if layout == "ldm" else "diffusers", seed=1)
    expected = merged(
        load_base(bases.write_base(tmp_path / "whole", seed=1), files.adapter, device="cpu").unet,
        halves_in(looks / "0" / "lora.safetensors", base.unet),
    )
    text = texts_with(base, PROMPT, read_embedding(looks / "0" / "embedding.safetensors"))
    before = {name: (value, value.clone()) for name, value in base.unet.state_dict(keep_vars=True).items()}
    source = {"unet file": dream / "unet" / "diffusion_pytorch_model.safetensors"}
    found = run(base, material, tmp_path / "run", [looks / "0", source.get(layout, dream)])
    assert found == pytest.approx(expected_losses(expected, base, [clip(material)], [text]), rel=1e-4)
    after = base.unet.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, copied) for name, (value, copied) in before.items())


def test_after_an_error_the_base_is_as_it_was_at_once(base, material, tmp_path, monkeypatch, looks):
    """Also while the error is still looked at, which keeps the step's frame alive."""
    dream = bases.write_base(tmp_path / "dream", "ldm", seed=1)
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    monkeypatch.setattr(train.motion, "motion_loss", lambda prediction, *rest: prediction.mean() * float("nan"))
    with pytest.raises(UserError, match="the loss is nan") as caught:
        run(base, material, tmp_path / "run", [looks / "0", dream])
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert base.unet.state_dict().keys() == before.keys()
    assert base.learned == {}
    del caught


def test_another_absorber_is_another_run(base, material, tmp_path, looks):
    dream = bases.write_base(tmp_path / "dream", seed=1)
    settings = {"prompt": PROMPT, "steps": 1}
    done = motion(material, tmp_path / "run", absorbers=[str(looks / "0"), str(dream)], **settings)
    lora = train_motion(done, base)
    time = lora.stat().st_mtime_ns
    assert train_motion(done, base) == lora
    assert lora.stat().st_mtime_ns == time
    with pytest.raises(UserError, match="holds a run with other settings: absorbers"):
        train_motion(motion(material, tmp_path / "run", absorbers=[str(looks / "0")], **settings), base)
    (dream / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert train_motion(done, base)  # of a checkpoint the UNet counts
    weights = dream / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"the contents of absorber 2: diffusion_pytorch_model\.safetensors"):
        train_motion(done, base)


def test_where_loras_sit_on_the_same_layers_it_says_so(base, material, tmp_path, looks, capsys):
    few = random_weights(base.unet, r"layers\.2\.spatial\.\d\.transformer_blocks\.0\.attn1\.to_[qk]")
    path = written(tmp_path, kohya(few))
    run(base, material, tmp_path / "run", [looks / "0", path], steps=1)
    assert f"{looks / '0'} and {path} sit on {len(few)} of the same layers: they add\n" in capsys.readouterr().out
    run(base, material, tmp_path / "alone", [looks / "0"], steps=1)
    assert "same layers" not in capsys.readouterr().out
