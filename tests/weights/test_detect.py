"""Files and folders are called by their names, whatever the file system calls them; wrong ones are sent on."""

import json

import av
import diffusers
import numpy as np
import pytest
import torch
from base_tensors import manifest
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file

from model.errors import UserError
from weights.detect import detect, detect_tensors, refuse


def words(found):
    return ", ".join(filter(None, (found.kind, found.version, found.family)))


def test_a_file_in_the_wrong_place_is_told_where_it_belongs():
    found = detect_tensors(manifest("animatediff_v2_motion_lora"))
    with pytest.raises(UserError) as caught:
        refuse("v2_lora_ZoomIn.ckpt", found, "the motion module")
    text = str(caught.value)
    assert text.startswith("v2_lora_ZoomIn.ckpt was given as the motion module. This is a motion LoRA")
    assert "belongs in --lora" in text
    assert "v3_sd15_mm.ckpt" in text
    assert "\n" not in text


def test_a_checkpoint_is_read_through_its_wrappers(tmp_path):
    small = {f"module.{name}": torch.zeros(1) for name in manifest("animatediff_v2_motion_lora")}
    torch.save({"state_dict": small, "epoch": 3}, tmp_path / "x.safetensors")
    assert words(detect(tmp_path / "x.safetensors")) == "motion LoRA, v2, sd15"


def test_a_lora_of_our_own_is_known_by_its_header(tmp_path):
    save_file({"a.down_blocks.0.x.lora_A.weight": torch.zeros(1)}, tmp_path / "l.safetensors", {"customttt": "{}"})
    assert detect(tmp_path / "l.safetensors").kind == "customttt LoRA"


@pytest.mark.parametrize(
    ("suffix", "version"),
    [("JPEG", "JPEG"), ("PNG", "PNG"), ("GIF", "GIF"), ("WEBP", "WebP"), ("BMP", "BMP"), ("TIFF", "TIFF"),
     ("AVIF", "AVIF or HEIC")],
)  # fmt: skip
def test_an_image_is_known_by_its_bytes(tmp_path, suffix, version):
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "model.ckpt", format=suffix)
    assert words(detect(tmp_path / "model.ckpt")) == f"image, {version}"


@pytest.mark.parametrize(
    ("container", "codec", "version"),
    [("mp4", "mpeg4", "MP4 or MOV"), ("mov", "mpeg4", "MP4 or MOV"), ("matroska", "mpeg4", "Matroska or WebM"),
     ("avi", "mpeg4", "AVI"), ("mpegts", "mpeg2video", "MPEG"), ("flv", "flv", "FLV")],
)  # fmt: skip
def test_a_video_is_known_by_its_bytes(tmp_path, container, codec, version):
    with av.open(str(tmp_path / "clip"), "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        file.mux(stream.encode())
    assert words(detect(tmp_path / "clip")) == f"video, {version}"


def test_a_safetensors_file_is_not_taken_for_an_image(tmp_path):
    """Its first bytes are the header's length, and may spell anything: here "II*", as TIFF begins."""
    text = json.dumps({"<toy>": {"dtype": "F16", "shape": [768], "data_offsets": [0, 1536]}})
    length = int.from_bytes(b"II*", "little")
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + text.encode().ljust(length) + bytes(1536))
    assert words(detect(tmp_path / "x")) == "textual inversion, sd15"


def folder(path, **files):
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_json", ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content) if isinstance(content, dict | list) else content)
    return path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"model_index_json": {}, "unet__config_json": {"cross_attention_dim": 768}}, "diffusers folder, sd15"),
        ({"unet__config_json": {"cross_attention_dim": 1024}}, "diffusers folder, sd2"),
        ({"unet__config_json": {"cross_attention_dim": 2048}}, "diffusers folder, sdxl"),
        ({"unet__config_json": {"cross_attention_dim": 768, "in_channels": 9}}, "diffusers folder, inpainting, sd15"),
        ({"unet__config_json": {"_class_name": "UNet3DConditionModel"}}, "diffusers folder, modelscope"),
        ({"unet__config_json": {"cross_attention_dim": [64]}}, "diffusers folder"),
        ({"model_index_json": {"transformer": []}}, "diffusers folder"),
        ({"config_json": {"architectures": ["CLIPTextModel"], "hidden_size": 768}}, "text encoder, sd15"),
        ({"config_json": {"_class_name": "AutoencoderKL"}}, "VAE"),
        ({"config_json": ["a list"]}, "folder"),
        ({"vocab_json": {}, "merges.txt": ""}, "tokenizer"),
        ({"settings_json": {}}, "run folder, sd15"),
        ({"readme.txt": "x"}, "folder"),
    ],
)
def test_a_folder_is_called_by_its_name(tmp_path, files, expected):
    assert words(detect(folder(tmp_path, **files))) == expected


def test_a_folder_of_photos_is_counted(tmp_path):
    for name in ("a.jpg", "b.txt.png", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    (tmp_path / "a.txt").write_text("a teddy bear")
    found = detect(tmp_path)
    assert found.kind == "image folder"
    assert "(3)" in found.note


@pytest.mark.parametrize(("mid", "length", "version"), [(True, 32, "v2"), (False, 32, "v3"), (False, 24, "v1")])
def test_a_motion_adapter_folder_says_its_version(tmp_path, mid, length, version):
    diffusers.MotionAdapter(
        block_out_channels=(8,), motion_layers_per_block=1, motion_num_attention_heads=1, motion_norm_num_groups=2,
        use_motion_mid_block=mid, motion_max_seq_length=length,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert words(detect(tmp_path)) == f"motion adapter, {version}, sd15"


def test_a_peft_folder_is_called_by_what_is_in_it(tmp_path):
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=2, attention_head_dim=2, cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    get_peft_model(unet, LoraConfig(r=4, target_modules=["to_q", "to_k"])).save_pretrained(tmp_path)
    assert words(detect(tmp_path)) == "spatial LoRA, sd15"


def test_what_is_no_file_of_any_use_is_an_error(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    (tmp_path / "y.json").write_text("{}")
    for name, message in (("x.ckpt", "git lfs pull"), ("y.json", "not a model file"), ("z.ckpt", "does not exist")):
        with pytest.raises(UserError, match=message):
            detect(tmp_path / name)
