"""Editing against diffusers' inversion and pipeline on the same files, and what a person relies on."""

from dataclasses import replace

import pytest
import torch
from conftest import pool_module_norms
from diffusers import AnimateDiffPipeline, DDIMInverseScheduler, DDIMScheduler, MotionAdapter
from safetensors.torch import save_file
from two_loras import write_loras

import sampling.edit
from lora import adapter_names, adapters
from model import UserError
from sampling import ddim_sample, decode, draw_noise, encode, encode_videos, evaluating, guided, read_video
from sampling.again import generate_again
from sampling.edit import EditSettings, edit_files, invert_latents, main
from weights import Embedding, find_record, learned_tokens, load_lora, save_embedding, sha256

SOURCE, PROMPT = "a man is playing guitar", "a teddy bear is playing guitar on the snow"
ROUNDING = 1.01 / 127.5  # of a frame's bytes


def settings(material, tmp_path, **changes):
    given = {"video": str(material / "clip.mp4"), "source_prompt": SOURCE, "prompt": [PROMPT], "steps": 4}
    return EditSettings(**{**given, "out": str(tmp_path / "clip"), "guidance_scale": 5.0, **changes})


def frames(path, count=3):
    return read_video(path, count, 32, 32)


def source_latents(base, material):
    return encode_videos(base, frames(material / "clip.mp4").transpose(0, 1)[None]).mean


def edited(base, inverted, steps=4, scale=5.0, **options):
    """The frames that latents of the source's level become, by the floor below."""
    with evaluating(base.unet):
        denoise = guided(base.unet, encode(base, [PROMPT]), encode(base, [""]), scale)
        return decode(base, ddim_sample(denoise, inverted, base.schedule, steps, **options))[0]


def test_an_edit_equals_diffusers_inversion_and_pipeline(files, base, material, tmp_path):
    pool_module_norms(base.unet)
    schedule = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    pipeline = AnimateDiffPipeline.from_pretrained(
        files.folder,
        motion_adapter=MotionAdapter.from_pretrained(files.adapter),
        scheduler=DDIMScheduler(**schedule, steps_offset=1),
    )
    pipeline.set_progress_bar_config(disable=True)
    inversion = DDIMInverseScheduler(**schedule, steps_offset=1)
    inversion.set_timesteps(4)
    with torch.no_grad():
        video = frames(material / "clip.mp4")
        latents = pipeline.vae.encode(video).latent_dist.mean.transpose(0, 1)[None] * 0.18215
        words = pipeline.encode_prompt(SOURCE, "cpu", 1, False)[0].repeat_interleave(3, dim=0)
        for timestep in inversion.timesteps:
            output = pipeline.unet(latents, timestep, encoder_hidden_states=words).sample
            latents = inversion.step(output, timestep, latents).prev_sample
    expected = pipeline(
        prompt=PROMPT,
        num_frames=3,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=latents,
        output_type="pt",
    ).frames[0]
    edit_files(settings(material, tmp_path), base)
    assert (frames(tmp_path / "clip") - (expected * 2 - 1)).abs().max() < ROUNDING


def test_at_strength_0_it_is_the_video_through_the_autoencoder(base, material, tmp_path):
    edit_files(settings(material, tmp_path, strength=0.0), base)
    expected = decode(base, source_latents(base, material))[0]
    assert (frames(tmp_path / "clip") - expected).abs().max() < ROUNDING


@pytest.mark.parametrize(("strength", "only_last", "refine"), [(0.25, 1, 0), (0.6, 2, 0), (0.6, 2, 2)])
def test_strength_is_the_share_of_the_steps_that_are_taken_back(base, material, tmp_path, strength, only_last, refine):
    edit_files(settings(material, tmp_path, strength=strength, spacing="trailing", refine=refine), base)
    options = {"spacing": "trailing", "only_last": only_last}
    text = encode(base, [SOURCE])
    inverted = invert_latents(base, source_latents(base, material), text, 4, refine=refine, **options)
    assert (frames(tmp_path / "clip") - edited(base, inverted, **options)).abs().max() < ROUNDING


def test_the_same_edit_gives_the_same_bytes(base, material, tmp_path):
    first, second = (settings(material, tmp_path, out=str(tmp_path / name), steps=1) for name in ("a.mp4", "b.mp4"))
    edit_files(first, base)
    edit_files(second, base)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_the_noise_prior_mixes_the_seeds_noise_in(base, material, tmp_path):
    chosen = settings(material, tmp_path, noise_prior=0.3, seed=[1, 2], batch_size=2, steps=2)
    written = edit_files(chosen, base)
    assert [file.name for file in written] == ["clip-1-seed1", "clip-1-seed2"]
    inverted = invert_latents(base, source_latents(base, material), encode(base, [SOURCE]), 2)
    for seed, file in zip([1, 2], written, strict=True):
        start = 0.3**0.5 * inverted + 0.7**0.5 * draw_noise(seed, inverted.shape[1:])
        assert (frames(file) - edited(base, start, 2)).abs().max() < ROUNDING


@pytest.mark.parametrize("invert_with_lora", [False, True])
def test_loras_are_on_while_sampling_and_when_asked_while_inverting(base, material, tmp_path, invert_with_lora):
    lora = write_loras(base, tmp_path, 0.3)["motion"]
    options = {"lora": [f"{lora}:0.7"], "invert_with_lora": invert_with_lora, "steps": 2}
    edit_files(settings(material, tmp_path, **options), base)
    assert adapter_names(base.unet) == []
    [name] = load_lora(base.unet, lora, fingerprints=base.fingerprints)
    found = {}
    for on in (False, True):
        with adapters(base.unet, {name: 0.7} if on else {}):
            inverted = invert_latents(base, source_latents(base, material), encode(base, [SOURCE]), 2)
        with adapters(base.unet, {name: 0.7}):
            found[on] = (frames(tmp_path / "clip") - edited(base, inverted, 2)).abs().max()
    assert found[invert_with_lora] < ROUNDING
    assert found[not invert_with_lora] > 3 * ROUNDING


def test_a_learned_word_may_stand_in_the_source_prompt(base, material, tmp_path):
    word = Embedding("<look>", torch.randn(2, base.text.config.hidden_size))
    save_embedding(tmp_path / "look.safetensors", word)
    options = {"embedding": [str(tmp_path / "look.safetensors")], "source_prompt": "a <look> man", "steps": 2}
    edit_files(settings(material, tmp_path, **options), base)
    with learned_tokens(base, [word]):
        inverted = invert_latents(base, source_latents(base, material), encode(base, ["a <look> man"]), 2)
    assert (frames(tmp_path / "clip") - edited(base, inverted, 2)).abs().max() < ROUNDING


def test_frames_are_taken_from_the_video_as_asked(base, material, tmp_path):
    edit_files(settings(material, tmp_path, strength=0.0, frame_step=2), base)
    video = read_video(material / "clip.mp4", 5, 32, 32)[::2]
    expected = decode(base, encode_videos(base, video.transpose(0, 1)[None]).mean)[0]
    assert (frames(tmp_path / "clip") - expected).abs().max() < ROUNDING
    changes = {"strength": 0.0, "fps": 8.0, "start": 0.25, "num_frames": 2}
    edit_files(settings(material, tmp_path, out=str(tmp_path / "late"), **changes), base)
    video = read_video(material / "clip.mp4", 5, 32, 32)[2:4]
    expected = decode(base, encode_videos(base, video.transpose(0, 1)[None]).mean)[0]
    assert (frames(tmp_path / "late", 2) - expected).abs().max() < ROUNDING


def test_the_settings_are_kept_and_serve_again(base, material, tmp_path):
    chosen = settings(material, tmp_path, prompt=[PROMPT, "a ball"], strength=0.5, steps=2)
    assert [file.name for file in edit_files(chosen, base)] == ["clip-1-seed0", "clip-2-seed0"]
    record = find_record(tmp_path / "clip-2-seed0")
    assert (record.prompt, record.seed) == ("a ball", 0)
    assert record.files["video"] == {chosen.video: sha256(chosen.video)}
    kept = EditSettings(**record.settings, prompt=chosen.prompt, out=chosen.out)
    assert kept == replace(chosen, **base.source)
    with pytest.raises(UserError, match="made by `customttt edit`"):
        generate_again(tmp_path / "clip-2-seed0", base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": "nowhere.mp4"}, r"nowhere\.mp4 does not exist"),
        ({"strength": 1.5}, "from 0 .* to 1, and is 1.5"),
        ({"refine": -1}, "negative"),
        ({"noise_prior": 0.0}, "customttt generate"),
        ({"noise_prior": 0.5, "strength": 0.5}, "one of the two"),
        ({"seed": [1, 2]}, "several seeds give the same clip"),
        ({"seed": [1, 2], "strength": 0.0, "eta": 0.5}, "several seeds give the same clip"),
        ({"invert_with_lora": True}, "and there is none: give --lora too"),
        ({"prompt": []}, "at least one prompt"),
        ({"lora": ["nowhere"]}, "nowhere"),
    ],
)
def test_bad_settings_are_explained_before_the_base_is_loaded(material, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        edit_files(settings(material, tmp_path, base="no base", **changes))
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_the_video_or_the_base_is_explained_and_nothing_is_written(base, material, tmp_path):
    wrong = [
        ({"num_frames": 9}, "too short: it has 5 frames"),
        ({"height": 100}, "104"),
        ({"steps": 0}, "1 to 1000"),
        ({"steps": 4, "strength": 0.1}, "strength 0.1 of 4 steps is not one step.* give 0.25 or more, or 0"),
        ({"fps": 8.0, "frame_step": 2}, "contradict"),
    ]
    for changes, message in wrong:
        with pytest.raises(UserError, match=message):
            edit_files(settings(material, tmp_path, **changes), base)
    assert list(tmp_path.iterdir()) == []


def test_the_video_itself_is_not_overwritten(material, tmp_path):
    video = tmp_path / "clip.mp4"
    video.write_bytes((material / "clip.mp4").read_bytes())
    with pytest.raises(UserError, match="overwrite"):
        edit_files(settings(material, tmp_path, video=str(video), out=f"{tmp_path}/./clip.mp4"))


def test_the_command_writes_a_clip(files, material, tmp_path, capsys):
    out = tmp_path / "edit.mp4"
    flags = [word for name, value in files.flags().items() for word in (f"--{name}", value)]
    sizes = ["--num_frames", "2", "--height", "32", "--width", "32", "--steps", "2", "--guidance_scale", "1"]
    main([*flags, *sizes, "--video", str(material / "clip.mp4"), "--prompt", PROMPT, "--out", str(out)])
    assert frames(out, 2).shape == (2, 3, 32, 32)
    assert str(out) in capsys.readouterr().out


def test_a_lora_that_does_not_load_is_told_before_the_inversion(base, material, tmp_path, monkeypatch):
    wrong = tmp_path / "wrong.safetensors"
    save_file({"lora_unet_mid.lora_down.weight": torch.ones(1, 4)}, wrong)
    monkeypatch.setattr(sampling.edit, "ddim_invert", lambda *arguments, **options: 1 / 0)
    with pytest.raises(UserError, match=r"wrong\.safetensors"):
        edit_files(settings(material, tmp_path, lora=[str(wrong)]), base)


def test_what_has_no_effect_is_said(base, material, tmp_path):
    with pytest.warns(UserWarning, match="seed 7 has no effect: nothing is random here"):
        edit_files(settings(material, tmp_path, seed=[7]), base)
    lora = write_loras(base, tmp_path, 0.3)["motion"]
    with pytest.warns(UserWarning, match="has no effect: none of the 0 steps begins in its range"):
        edit_files(settings(material, tmp_path, strength=0.0, lora=[lora]), base)
