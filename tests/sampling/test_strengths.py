"""LoRAs whose strength changes by layer and in the course of denoising, against loops that switch them by hand."""

import warnings

import pytest
import torch
from exports import written
from lora_files import CLIP, SPATIAL, kohya, kohya_text, random_weights
from lora_files import written as write_file
from merges import SPECS, merged
from two_loras import write_loras

from lora import adapter_modules, adapter_names, adapters, merge_adapters
from model import UserError
from sampling import ddim_step, decode, draw_noise, encode, encode_videos, guided, read_video, sample_latents
from sampling.again import generate_again
from sampling.edit import EditSettings, edit_files, invert_latents
from sampling.generate import GenerateSettings, generate_files, loaded_loras, main
from weights import find_record, load_base, load_lora, read_json

PROMPT = "a teddy bear is playing guitar on the snow"
ROUNDING = 1.01 / 127.5  # of a frame's bytes
SIZES = {"num_frames": 2, "height": 32, "width": 32, "guidance_scale": 3.0}


@pytest.fixture
def loras(base, tmp_path):
    """A file with an appearance and one with a motion."""
    return write_loras(base, tmp_path, 0.3)


@pytest.fixture
def both(base, tmp_path):
    """A file with an appearance in layers 2 and 6, and a motion in layers 2 and 5."""
    written(base.unet, tmp_path / "both.safetensors", **SPECS)
    return str(tmp_path / "both.safetensors")


def sampled(base, arguments, steps=5, **options):
    with loaded_loras(base, arguments) as at_step:
        text = encode(base, [PROMPT]), encode(base, [""])
        return sample_latents(base, *text, [1], steps=steps, at_step=at_step, **SIZES, **options)


def by_hand(base, latents, steps, scales, first=0):
    """The steps of DDIM from `first` on, each with the adapters that `scales` gives for it."""
    base.unet.eval()
    denoise = guided(base.unet, encode(base, [PROMPT]), encode(base, [""]), SIZES["guidance_scale"])
    timesteps = base.schedule.timesteps(steps)
    for step in range(first, steps):
        with torch.no_grad(), adapters(base.unet, scales(step)):
            prediction = denoise(latents, timesteps[step])
        latents = ddim_step(base.schedule, prediction, latents, timesteps[step], timesteps[step] - 1000 // steps)
    return latents


def loaded(base, *paths):
    return [name for path in paths for name in load_lora(base.unet, path, fingerprints=base.fingerprints)]


def noise(base):
    return draw_noise(1, (4, 2, 32 // base.vae.config.factor, 32 // base.vae.config.factor))


@pytest.mark.parametrize("span", [(0, 3), (1, 4), (2, 5)])
def test_a_range_equals_switching_by_hand(base, loras, span):
    motion, looks = loras["motion"], loras["appearance"]
    found = sampled(base, [f"{motion}:0.8@{span[0] / 5}-{span[1] / 5}", f"{looks}:0.5"])
    assert adapter_names(base.unet) == []
    moves, look = loaded(base, motion, looks)
    expected = by_hand(
        base, noise(base), 5, lambda step: {look: 0.5} | ({moves: 0.8} if span[0] <= step < span[1] else {})
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, by_hand(base, noise(base), 5, lambda _: {moves: 0.8, look: 0.5}))


def test_two_motions_take_turns_and_one_motion_takes_two_strengths(base, loras, both):
    turns = sampled(base, [f"{loras['motion']}:0.8@0-0.4", f"{both}#motion:1@0.4-1"])
    strengths = sampled(base, [f"{loras['motion']}:1@0-0.4", f"{loras['motion']}:0.4@0.4-1"])
    first, second = loaded(base, loras["motion"]) + list(load_lora(base.unet, both, {"motion": "other"}))
    assert torch.equal(turns, by_hand(base, noise(base), 5, lambda step: {first: 0.8} if step < 2 else {second: 1.0}))
    assert torch.equal(strengths, by_hand(base, noise(base), 5, lambda step: {first: 1.0 if step < 2 else 0.4}))


def test_the_same_twice_is_refused_and_leaves_nothing(base, loras):
    twice = [loras["motion"]] * 2
    with pytest.raises(UserError, match="is given twice: for more of it, raise"), loaded_loras(base, twice):
        pass
    assert adapter_names(base.unet) == []


def test_strengths_by_layer_equal_adapters_that_are_zero_elsewhere(base, both):
    found = sampled(base, [f"{both}#appearance:2=0.5,6=-1", f"{both}#motion:5=0.7"])
    timed = sampled(base, [f"{both}#motion:5=0.7@0.4-1"])
    looks, moves = (next(iter(load_lora(base.unet, both, {name: name}))) for name in SPECS)
    whole = by_hand(base, noise(base), 5, lambda _: {looks: 1.0, moves: 0.7})
    factors = {looks: {2: 0.5, 6: -1.0}, moves: {5: 1.0}}
    for name, layers in factors.items():
        for path, module in adapter_modules(base.unet, name).items():
            module.B.data *= layers.get(int(path.split(".")[1]), 0.0)
    expected = by_hand(base, noise(base), 5, lambda _: {looks: 1.0, moves: 0.7})
    assert torch.equal(found, expected)
    assert (found - whole).abs().max() > 1e-3 * whole.abs().max()
    assert torch.equal(timed, by_hand(base, noise(base), 5, lambda step: {moves: 0.7} if step >= 2 else {}))


def test_one_adapter_of_a_file_is_the_only_one_loaded(base, both):
    with loaded_loras(base, [f"{both}#motion:0.5"]) as at_step:
        assert at_step is None  # nothing is switched where nothing changes
        assert adapter_names(base.unet) == ["motion"]
    found = sampled(base, [f"{both}#motion:0.5"])
    (moves,) = load_lora(base.unet, both, {"motion": "alone"})
    assert torch.equal(found, by_hand(base, noise(base), 5, lambda _: {moves: 0.5}))


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        ("#moves", "no adapter 'moves': it has appearance, motion"),
        (":2=1,4=1", "nothing in layer 4: it has layers 2, 5, 6"),
        ("#motion:6=1", "nothing in layer 6: it has layers 2, 5"),
    ],
)
def test_what_a_file_does_not_have_is_named_with_what_it_has(base, both, tmp_path, behind, said):
    settings = GenerateSettings(prompt=[PROMPT], out=str(tmp_path / "out" / "c.mp4"), lora=[both, both + behind])
    with pytest.raises(UserError, match=said):
        generate_files(settings, base)
    assert adapter_names(base.unet) == []
    assert not (tmp_path / "out").exists()


def test_other_tools_files_have_layers_and_no_adapters_names(base, tmp_path):
    theirs = write_file(tmp_path, kohya(random_weights(base.unet, SPATIAL + ".*to_q")))
    with (
        pytest.raises(UserError, match=r"no adapters with names .*: leave #motion away"),
        loaded_loras(base, [f"{theirs}#motion"]),
    ):
        pass
    found = sampled(base, [f"{theirs}:1=0.5,7=1@0-0.4"])
    (name,) = load_lora(base.unet, theirs)
    for path, module in adapter_modules(base.unet, name).items():
        module.B.data *= {"1": 0.5, "7": 1.0}.get(path.split(".")[1], 0.0)
    expected = by_hand(base, noise(base), 5, lambda step: {name: 1.0} if step < 2 else {})
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("behind", "strength"), [(":0.6@0-0.5", 0.6), (":1=0.2,7=-0.6", -0.6)])
def test_a_part_for_the_text_encoder_keeps_one_strength_and_that_is_said(base, tmp_path, behind, strength):
    tensors = kohya(random_weights(base.unet, SPATIAL + ".*to_q"))
    theirs = write_file(tmp_path, tensors | kohya_text(random_weights(base.text.clip, CLIP, seed=1)))
    with (
        pytest.warns(UserWarning, match=f"text encoder.* on all the way at strength {strength}"),
        loaded_loras(base, [f"{theirs}{behind}"]),
    ):
        found = encode(base, [PROMPT])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with loaded_loras(base, [f"{theirs}:{strength}"]):
            assert torch.equal(found, encode(base, [PROMPT]))
    assert not torch.equal(found, encode(base, [PROMPT]))


def test_the_command_takes_schedules_and_says_how(files, base, loras, tmp_path, capsys):
    flags = [word for name, value in files.flags().items() for word in (f"--{name}", value)]
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    lora = [f"{loras['motion']}:2=0.5,5=1@0-0.5", f"{loras['motion']}#motion:0.8@0.5-1"]
    out = tmp_path / "clip"
    main([*flags, *sizes, "--steps", "4", "--seed", "1", "--prompt", PROMPT, "--out", str(out), "--lora", *lora])
    (moves,) = loaded(base, loras["motion"])
    expected = by_hand(base, noise(base), 4, lambda step: {moves: {2: 0.5, 5: 1.0} if step < 2 else 0.8})
    assert (read_video(out, 2, 32, 32) - decode(base, expected)[0]).abs().max() < ROUNDING
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "jog:0.8@0-0.6, on from 0 (pure noise) inclusive to 0.6 exclusive" in said


def test_a_clip_of_a_schedule_is_made_again_from_its_record(base, loras, both, tmp_path):
    lora = [f"{loras['motion']}:1@0-0.5", f"{both}#appearance:2=0.5@0.5-1"]
    given = {"prompt": [PROMPT], "steps": 2, "seed": [1], **SIZES}
    (clip,) = generate_files(GenerateSettings(**given, lora=lora, out=str(tmp_path / "c.mp4")), base)
    record = find_record(clip)
    assert record.settings["lora"] == lora
    assert list(record.files["lora"]) == [loras["motion"], both]
    (again,) = generate_again(clip)
    assert again.read_bytes() == clip.read_bytes()
    (other,) = generate_again(clip, lora=[loras["motion"], both], out=str(tmp_path / "other.mp4"))
    assert other.read_bytes() != clip.read_bytes()


@pytest.mark.parametrize(("strength", "first"), [(1.0, 0), (0.5, 2)])
def test_an_edits_steps_are_counted_over_the_whole_schedule(base, material, loras, tmp_path, strength, first):
    settings = EditSettings(
        **{**SIZES, "video": str(material / "clip.mp4"), "prompt": [PROMPT], "out": str(tmp_path / "clip")},
        lora=[f"{loras['motion']}:0.8@0.5-0.75"],
        steps=4,
        strength=strength,
        invert_with_lora=True,
    )
    edit_files(settings, base)
    (moves,) = loaded(base, loras["motion"])

    def on(step):
        return {moves: 0.8} if step == 2 else {}

    source = encode_videos(base, read_video(material / "clip.mp4", 2, 32, 32).transpose(0, 1)[None]).mean
    latents, timesteps = source, base.schedule.timesteps(4)
    for step in reversed(range(first, 4)):
        with torch.no_grad(), adapters(base.unet, on(step)):
            prediction = base.unet(latents, timesteps[step], encode(base, [""]))
        latents = ddim_step(base.schedule, prediction, latents, timesteps[step] - 250, timesteps[step])
    with adapters(base.unet, {moves: 0.8}):
        always = invert_latents(base, source, encode(base, [""]), 4, only_last=4 - first)
    assert not torch.equal(latents, always)
    expected = decode(base, by_hand(base, latents, 4, on, first))[0]
    assert (read_video(tmp_path / "clip", 2, 32, 32) - expected).abs().max() < ROUNDING


def test_a_lora_that_no_step_has_on_is_warned_about(base, material, loras, tmp_path):
    given = {**SIZES, "prompt": [PROMPT], "steps": 4, "out": str(tmp_path / "c")}
    with pytest.warns(UserWarning, match=r"0\.3-0\.4 has no effect: none of the 4 steps, the first at 0 of"):
        generate_files(GenerateSettings(**given, lora=[f"{loras['motion']}:1@0.3-0.4"]), base)
    video = {"video": str(material / "clip.mp4"), "strength": 0.5}
    with pytest.warns(UserWarning, match=r"0-0\.5 has no effect: none of the 2 steps, the first at 0\.5 of"):
        edit_files(EditSettings(**given, **video, lora=[f"{loras['motion']}:1@0-0.5"]), base)


@pytest.mark.filterwarnings("ignore:.*not of Stable Diffusion 1.5's size")
def test_a_merge_takes_one_adapter_and_one_strength(files, base, both, tmp_path):
    where = {"base": str(files.folder), "motion_module": str(files.adapter)}
    for behind, said in ((":1@0-0.6", r"range of denoising \(@0-0\.6\)"), (":2=1", "by layer")):
        with pytest.raises(UserError, match=said):
            merged(tmp_path / "out", [both + behind], **where)
    assert not (tmp_path / "out").exists()
    out = merged(tmp_path / "out", [f"{both}#motion:0.5"], **where)
    (moves,) = load_lora(base.unet, both, {"motion": "alone"})
    merge_adapters(base.unet, {moves: 0.5})
    expected = {name: p for name, p in base.unet.named_parameters() if ".adapters." not in name}
    back = dict(load_base(out, device="cpu").unet.named_parameters())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], parameter) for name, parameter in expected.items())
    (record,) = read_json(out / "customttt.json")["loras"]
    assert (record["name"], record["adapter"], record["strength"]) == ("both.safetensors", "motion", 0.5)
