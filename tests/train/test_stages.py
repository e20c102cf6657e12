"""Stages 1 and 2 on the narrow random base: what they train on, what they write, how they stop and go on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from clips import smooth
from PIL import Image
from safetensors.torch import load_file

from lora import adapter_names
from model import NoiseSchedule, UserError
from sampling import encode, read_video, sample_videos, write_media
from sampling.generate import GenerateSettings, generate_files
from train.appearance import AppearanceSettings, train_appearance
from train.motion import MotionSettings, train_motion
from train.stage import encode_videos, predict
from weights import load_base, read_lora_header


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder of three pictures, one with its own caption, and a clip of five frames."""
    root = tmp_path_factory.mktemp("material")
    (root / "photos").mkdir()
    for i, size in enumerate([(48, 80), (40, 40), (64, 48)]):
        smooth(*size).rotate(90 * i).save(root / "photos" / f"{i}.png")
    (root / "photos" / "1.txt").write_text("a red ball on the beach")
    frames = torch.stack([torch.roll(torch.rand(3, 32, 32), 3 * i, dims=-1) for i in range(5)]) * 2 - 1
    write_media(root / "clip.mp4", frames, fps=8)
    return root


def appearance(material, out, **changes):
    return AppearanceSettings(
        **{"images": str(material / "photos"), "prompt": "a teddy bear", "out": str(out), "steps": 3, **changes}
    )


def motion(material, out, **changes):
    return MotionSettings(
        **{"video": str(material / "clip.mp4"), "prompt": "a man runs", "out": str(out), "steps": 3, **changes}
    )


def test_the_papers_numbers_are_the_defaults(base, material, tmp_path):
    from model import Recipe
    from train.appearance import with_defaults as looks_defaults
    from train.motion import with_defaults as motion_defaults

    base.recipe = Recipe()
    looks = looks_defaults(AppearanceSettings(images="a", prompt="b", out="c"), base)
    moves = motion_defaults(MotionSettings(video="a", prompt="b", out="c"), base)
    common = {"rank": 32, "dropout": 0.1, "weight_decay": 0.1, "steps": 500, "height": 256, "num_frames": 16}
    assert {name: getattr(looks, name) for name in common} == common
    assert {name: getattr(moves, name) for name in common} == common
    assert (looks.layers, looks.learning_rate) == ([2, 6], 1e-5)
    assert (moves.layers, moves.learning_rate) == ([2, 5], 5e-5)


@pytest.mark.parametrize("stage", ["appearance", "motion"])
def test_a_run_folder_holds_settings_log_and_lora(base, material, tmp_path, stage):
    settings, train = {"appearance": (appearance, train_appearance), "motion": (motion, train_motion)}[stage]
    assert train(settings(material, tmp_path / "run"), base) == tmp_path / "run" / "lora.safetensors"
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "inputs.json",
        "log.csv",
        "lora.safetensors",
        "settings.json",
    ]
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert kept["rank"] == 4
    assert kept["steps"] == 3
    header = read_lora_header(tmp_path / "run")
    entry = header.adapters[stage]
    assert entry.spec.layers == {"appearance": (2, 6), "motion": (2, 5)}[stage]
    assert entry.spec.kind == {"appearance": "spatial", "motion": "temporal"}[stage]
    assert entry.prompt == {"appearance": "a teddy bear", "motion": "a man runs"}[stage]
    assert header.fingerprints == base.fingerprints
    assert all(value.any() for value in load_file(tmp_path / "run" / "lora.safetensors").values())
    assert adapter_names(base.unet) == []


def test_appearance_trains_without_a_motion_module_on_each_picture_with_its_caption(files, material, tmp_path):
    """An image-only base gives the LoRA that the base with motion modules gives: they are bypassed."""
    results = []
    for name, adapter in (("image", None), ("video", files.adapter)):
        base = load_base(files.folder, adapter, device="cpu")
        settings = appearance(material, tmp_path / name, rank=4, height=32, width=32)
        results.append(load_file(train_appearance(settings, base)))
    assert results[0].keys() == results[1].keys()
    assert all(torch.allclose(results[0][key], results[1][key], atol=1e-6) for key in results[0])


def test_a_pictures_own_caption_changes_what_is_learnt(base, material, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for i in range(3):
        Image.open(material / "photos" / f"{i}.png").save(plain / f"{i}.png")
    settings = appearance(material, tmp_path / "a", steps=6, seed=1)
    with_caption = load_file(train_appearance(settings, base))
    settings = appearance(material, tmp_path / "b", steps=6, seed=1, images=str(plain))
    without = load_file(train_appearance(settings, base))
    assert any(not torch.equal(with_caption[key], without[key]) for key in with_caption)


def test_a_step_noises_the_latents_and_asks_for_the_noise(base):
    """The student's input and target, rebuilt from the generator's draws."""
    latents, text = torch.randn(2, 4, 3, 4, 4), encode(base, ["a ball", "a dog"])
    prediction, target = predict(base.unet, base.schedule, latents, text, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    t = torch.randint(1000, (2,), generator=generator)
    noise = torch.randn(2, 4, 3, 4, 4, generator=generator)
    a = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), 0)[t].float()
    a = a[:, None, None, None, None]
    assert torch.equal(target, noise)
    with torch.no_grad():
        expected = base.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, t, text)
    assert torch.allclose(prediction, expected, atol=1e-4)


def test_every_diffusion_step_can_be_drawn(base):
    drawn = []

    class Recorder(NoiseSchedule):
        def add_noise(self, latents, noise, timesteps):
            drawn.extend(timesteps.tolist())
            return super().add_noise(latents, noise, timesteps)

    class Network:
        dtype, device = torch.float32, torch.device("cpu")

        def __call__(self, noisy, timesteps, text, motion):
            return noisy

    generator = torch.Generator().manual_seed(0)
    predict(Network(), Recorder(), torch.zeros(20_000, 1, 1, 1, 1), None, generator)
    assert min(drawn) == 0
    assert max(drawn) == 999
    assert sum(drawn) / len(drawn) == pytest.approx(499.5, abs=8)


def test_motion_learns_with_the_debiased_loss_unless_told_otherwise(base, material, tmp_path):
    losses = []
    for name, debiased in (("with", True), ("without", False)):
        train_motion(motion(material, tmp_path / name, steps=1, debiased=debiased), base)
        losses.append(float((tmp_path / name / "log.csv").read_text().splitlines()[1].split(",")[1]))
    assert losses[0] > 2 * losses[1]


def test_latents_are_drawn_from_the_encoders_distribution(base):
    videos = torch.rand(1, 3, 2, 32, 32) * 2 - 1
    latents = encode_videos(base, videos)
    moments = base.vae.encode(videos[:, :, 1])
    mean, log_variance = moments.chunk(2, dim=1)
    assert torch.allclose(latents.mean[:, :, 1], mean * 0.18215, atol=1e-5)
    assert torch.allclose(latents.std[:, :, 1], (log_variance / 2).exp() * 0.18215, atol=1e-5)


def test_previews_equal_what_generate_gives_with_the_same_seed(base, material, tmp_path):
    settings = motion(material, tmp_path / "run", steps=2, preview_every=2, seed=5, learning_rate=1e-2)
    train_motion(settings, base)
    preview = read_video(tmp_path / "run" / "previews" / "step-00002.mp4", 3, 32, 32)
    generated = tmp_path / "clip.mp4"
    generate_files(
        GenerateSettings(prompt=["a man runs"], out=str(generated), lora=[str(tmp_path / "run")], seed=[5]), base
    )
    assert torch.equal(read_video(generated, 3, 32, 32), preview)
    untrained = sample_videos(base, ["a man runs"], [5])[0]
    assert (untrained - preview).abs().max() > 0.1


def test_the_same_command_on_a_finished_run_changes_nothing(base, files, material, tmp_path):
    lora = train_motion(motion(material, tmp_path / "run"), base)
    before = lora.stat().st_mtime_ns
    (tmp_path / "run" / "state.pt").write_bytes(b"left by a kill between the last two writes")
    assert train_motion(motion(material, tmp_path / "run", **files.flags()), base=None) == lora
    assert lora.stat().st_mtime_ns == before
    assert not (tmp_path / "run" / "state.pt").exists()


def test_leaving_a_setting_to_the_base_is_not_what_was_asked_for_before(base, material, tmp_path):
    train_motion(motion(material, tmp_path / "run"), base)
    with pytest.raises(UserError, match=r"steps \(3 there, none given now\)"):
        train_motion(motion(material, tmp_path / "run", steps=None), base)
    assert train_motion(motion(material, tmp_path / "run", rank=4), base)  # the base's own number, said aloud


@pytest.mark.parametrize("other", ["base", "motion_module", "dtype"])
def test_a_run_does_not_go_on_with_another_network(base, material, tmp_path, other):
    def stopping(done):
        raise KeyboardInterrupt

    settings = motion(material, tmp_path / "run", preview_every=1, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.stage.previewer", lambda *_: stopping)
        with pytest.raises(KeyboardInterrupt):
            train_motion(settings, base)
    part = {"base": "unet", "motion_module": "motion_module", "dtype": None}[other]
    if part:
        base.fingerprints = {**base.fingerprints, part: "another"}
    else:
        base.unet.to(torch.bfloat16)
    with pytest.raises(UserError, match=part or "dtype .float32 there, bfloat16 now"):
        train_motion(settings, base)


def test_the_base_is_recorded_though_it_was_loaded_before(base, files, material, tmp_path):
    train_motion(motion(material, tmp_path / "run"), base)
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (kept["base"], kept["motion_module"], kept["dtype"]) == (str(files.folder), str(files.adapter), "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"steps": 4}, "steps"), ({"seed": 1}, "seed"), ({"rank": 8}, "rank"), ({"prompt": "x"}, "prompt")],
)
def test_a_folder_of_a_different_run_is_refused(base, material, tmp_path, changes, message):
    train_motion(motion(material, tmp_path / "run"), base)
    with pytest.raises(UserError, match=f"other settings: {message}"):
        train_motion(motion(material, tmp_path / "run", **changes), base)


def test_other_contents_under_the_same_names_are_noticed(base, material, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    smooth().save(photos / "a.png")
    train_appearance(appearance(material, tmp_path / "run", images=str(photos)), base)
    smooth().rotate(180).save(photos / "a.png")
    with pytest.raises(UserError, match=r"contents of a\.png"):
        train_appearance(appearance(material, tmp_path / "run", images=str(photos)), base)
    smooth().save(photos / "a.png")
    smooth().save(photos / "b.png")
    with pytest.raises(UserError, match=r"contents of b\.png"):
        train_appearance(appearance(material, tmp_path / "run", images=str(photos)), base)


def test_a_folder_of_something_else_is_left_alone(base, material, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        train_motion(motion(material, tmp_path), base)
    with pytest.raises(UserError, match="is a file"):
        train_motion(motion(material, tmp_path / "thesis.txt"), base)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [4]}, "layer 4 has no motion module"),
        ({"num_frames": 6}, "5"),
        ({"height": 36}, "divisible by 8"),
        ({"video": "nowhere.mp4"}, "nowhere"),
        ({"steps": 0}, "at least 1"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"rank": 0}, "rank"),
    ],
)
def test_bad_settings_leave_no_folder_and_a_clean_network(base, material, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_motion(motion(material, tmp_path / "run", **changes), base)
    assert not (tmp_path / "run").exists()
    assert adapter_names(base.unet) == []


def test_the_trigger_must_be_in_the_prompt(base, material, tmp_path):
    with pytest.raises(UserError, match="sks"):
        train_appearance(appearance(material, tmp_path / "run", trigger="sks"), base)
    lora = train_appearance(appearance(material, tmp_path / "run", trigger="teddy bear"), base)
    assert read_lora_header(lora).adapters["appearance"].trigger == "teddy bear"


def test_motion_without_a_motion_module_says_what_to_give(files, material, tmp_path):
    base = load_base(files.folder, device="cpu")
    with pytest.raises(UserError, match="--motion_module"):
        train_motion(motion(material, tmp_path / "run", num_frames=3, height=32, width=32), base)


def test_gradient_checkpointing_trains_the_same_lora(base, material, tmp_path):
    plain = load_file(train_motion(motion(material, tmp_path / "a", steps=2), base))
    less = load_file(train_motion(motion(material, tmp_path / "b", steps=2, gradient_checkpointing=True), base))
    assert all(torch.allclose(plain[key], less[key], atol=1e-6) for key in plain)


def test_a_long_prompt_is_warned_about_with_what_was_cut(base, material, tmp_path):
    with pytest.warns(UserWarning, match="the very last words"):
        train_motion(motion(material, tmp_path / "run", prompt="a man " * 80 + "the very last words"), base)


def test_a_run_killed_at_a_random_step_ends_with_the_same_lora(base, files, material, tmp_path):
    """SIGKILL in the middle of a real process; the very same command again."""
    steps = 12
    flags = {
        **files.flags(),
        "video": str(material / "clip.mp4"),
        "prompt": "a man runs",
        "num_frames": 3,
        "height": 32,
        "width": 32,
        "rank": 4,
        "steps": steps,
        "save_every": 2,
        "learning_rate": 1e-3,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train_motion(MotionSettings(**{**flags, "out": str(tmp_path / "whole")}), base)
    finally:
        torch.set_num_threads(threads)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "train.motion", *words, "--out", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    last = random.Random(os.urandom(4)).randrange(3, steps - 3)
    log = tmp_path / "killed" / "log.csv"
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) <= last):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "lora.safetensors").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    expected, resumed = load_file(whole), load_file(tmp_path / "killed" / "lora.safetensors")
    assert all(torch.equal(expected[key], resumed[key]) for key in expected), f"killed after step {last}"
    assert not list((tmp_path / "killed").glob(".writing-*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_train_float32_loras_to_about_the_same_loss(base, files, material, tmp_path, dtype):
    half = load_base(files.folder, files.adapter, device="cpu", dtype=dtype)
    half.recipe = base.recipe
    for stage, train in ((appearance, train_appearance), (motion, train_motion)):
        losses = []
        for its, loaded in (("exact", base), ("half", half)):
            out = tmp_path / f"{stage.__name__}-{its}"
            tensors = load_file(train(stage(material, out, steps=12, learning_rate=1e-5), loaded))
            assert all(value.dtype == torch.float32 and value.any() for value in tensors.values())
            rows = (out / "log.csv").read_text().splitlines()[1:]
            losses.append([float(row.split(",")[1]) for row in rows])
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        assert losses[1] != losses[0]
