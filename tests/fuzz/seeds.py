"""Sound files in the layouts that people have, a few kilobytes each: names are real, most layers are left out."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bases
import exports
import lora_files
import torch
import yaml
from base_tensors import tensors
from clips import greys, smooth, write_clip
from safetensors.torch import save
from torch import Tensor

from eval.demo_plan import DemoSettings
from eval.grid_settings import GridSettings
from eval.influence import InfluenceSettings
from eval.judge import JudgeSettings
from eval.reading import JUDGE
from eval.score import ScoreSettings
from eval.tiny import FiguresSettings
from model import Recipe, UNet3D
from sampling import write_media
from sampling.generate import GenerateSettings
from sampling.origins import PER_CLIP
from train.appearance import AppearanceSettings
from train.motion import MotionSettings
from train.run import RunSettings
from train.states import checksum
from train.tiny import TinySettings
from train.ttt import TTTSettings
from weights import record_file, save_settings, write_json
from weights.export import ExportSettings
from weights.recipe import write_recipe

SETTINGS = AppearanceSettings(images="photos", prompt="a ball", out="run")


class Seeds:
    """Files of weights.

    Args:
        folder: to write them in.
        unet: a small network that the LoRAs are for.
    """

    def __init__(self, folder: Path, unet: UNet3D) -> None:
        folder.mkdir(parents=True)
        self.folder, self.unet = folder, unet
        self.spatial = _few(lora_files.random_weights(unet, lora_files.SPATIAL + lora_files.BLOCK), 3)
        self.temporal = _few(lora_files.random_weights(unet, lora_files.TEMPORAL + lora_files.BLOCK), 3)
        layouts = ("sd15_ldm_single_file", "sd15_diffusers_unet", "sd15_diffusers_vae", "animatediff_v3_motion_module")
        self.layouts = {name: _thin(tensors(name)) for name in layouts}

    def safetensors(self) -> list[bytes]:
        """One-file base, parts of a diffusers folder, motion module, LoRAs, textual inversion."""
        embedding = save({"emb_params": torch.randn(2, 16)}, {"sd_checkpoint": "x"})
        return [*(save(its, {"format": "pt"}) for its in self.layouts.values()), *self.lora_safetensors(), embedding]

    def torch_zip(self) -> list[bytes]:
        """As torch writes since 1.6: with Lightning's callback, wrapped, an embedding, a LoRA."""
        ldm, _, vae, motion = self.layouts.values()
        ckpt = bases.write_ckpt(self.folder / "a.ckpt", ldm).read_bytes()
        module = {f"module.{name}": tensor for name, tensor in motion.items()}
        return [
            ckpt,
            *map(_saved, (motion, {"state_dict": module, "epoch": 1}, vae, EMBEDDING)),
            *self.lora_pickled()[:1],
        ]

    def torch_pickle(self) -> list[bytes]:
        """As torch wrote before."""
        return [_saved(its, zipped=False) for its in (*self.layouts.values(), EMBEDDING)]

    def lora_safetensors(self) -> list[bytes]:
        """Our own, kohya's, diffusers' old and new, PEFT's, AnimateDiff's, MotionDirector's."""
        path = self.folder / "own.safetensors"
        exports.written(self.unet, path, appearance={**exports.SPECS["appearance"], "layers": (2,), "rank": 1})
        both = self.spatial | self.temporal
        forms: list[Mapping[str, Tensor]] = [
            *(lora_files.kohya(self.spatial), lora_files.dotted(both, "unet."), lora_files.motion_lora(self.temporal)),
            *(lora_files.attention_processors(_attention(self.spatial)), lora_files.dotted(both, "base_model.model.")),
            lora_files.motion_director_temporal(self.temporal),
        ]
        config = {
            "lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"a": 2}})
        }
        its = [save(_contiguous(form)) for form in forms]
        return [path.read_bytes(), *its, save(_contiguous(forms[1]), config)]

    def lora_pickled(self) -> list[bytes]:
        """Motion LoRAs and kohya's as .ckpt and .pt."""
        motion = {"state_dict": lora_files.motion_lora(self.temporal), "global_step": 500}
        return [_saved(motion), _saved(lora_files.kohya(self.spatial)), _saved(motion, zipped=False)]

    def embedding_safetensors(self) -> list[bytes]:
        """diffusers' form, and kohya's."""
        vectors = torch.randn(2, 16)
        return [save({"<cat>": vectors}), save({"emb_params": vectors}, {"sd_checkpoint": "x"})]

    def embedding_pickled(self) -> list[bytes]:
        """A1111's form as torch writes it and as it did before, and diffusers'."""
        vectors = torch.randn(2, 16)
        return [*(_saved(its) for its in (EMBEDDING, {"<cat>": vectors})), _saved(EMBEDDING, zipped=False)]

    def peft_folder(self) -> Path:
        """adapter_model.safetensors and adapter_config.json."""
        folder = self.folder / "peft"
        folder.mkdir()
        found = lora_files.dotted(self.spatial, "base_model.model.")
        (folder / "adapter_model.safetensors").write_bytes(save(_contiguous(found)))
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "alpha_pattern": {"to_q": 2}}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        return folder


EMBEDDING = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.randn(2, 16)}, "name": "w", "step": 5}
RECIPE = json.dumps(asdict(Recipe())).encode()
DEMO = json.dumps(
    {
        "settings": {k: v for k, v in asdict(DemoSettings()).items() if k != "out"},
        "recipe": asdict(Recipe()),
        "seconds": {"inputs": 1.5},
    }
).encode()
RUN_YAML = b"""# a run
base: tiny
out: run
height: 64
num_frames: 8
gradient_checkpointing: true
appearance: {images: photos, prompt: a red ball, steps: 20, layers: [2, 6], learning_rate: 1e-5}
motion:
  video: clip.mp4
  prompt: "a circle is moving right"
  fps: null
ttt: {prompt: a red ball is moving right, steps: 5}
generate:
  seed: [1, 2]
"""


def settings() -> dict[type, list[bytes]]:
    """Of every command, as its run keeps them and as people write them."""
    table = {"images": "photos", "prompt": "a red ball", "steps": 20}
    grid = Path(__file__).parents[2] / "docs" / "results" / "tiny-grid.yaml"
    made: list[Any] = [
        AppearanceSettings(images="photos", prompt="a ball", out="run", layers=[2, 6], learning_rate=1e-5),
        MotionSettings(video="a.mp4", prompt="a ball", out="run", fps=8.0),
        TTTSettings(appearance="a", motion="b", prompt="a ball", out="run"),
        RunSettings(out="run", height=64, appearance=table, motion={"video": "v", "prompt": "p"}, ttt={"prompt": "p"}),
        GenerateSettings(prompt=["a"], out="a.mp4", lora=["run:0.8"], seed=[1, 2]),
        ExportSettings(run="run", format="kohya", out="a.safetensors"),
        DemoSettings(appearance={"steps": 5}),
        GridSettings(**yaml.safe_load(grid.read_text(encoding="utf-8"))),
        ScoreSettings(video=["a.mp4"]),
        InfluenceSettings(out="x"),
        JudgeSettings(out="x"),
        FiguresSettings(out="x"),
        TinySettings(out="x"),
    ]
    found = {type(its): [json.dumps(asdict(its)).encode(), yaml.safe_dump(asdict(its)).encode()] for its in made}
    found[RunSettings].append(RUN_YAML)
    found[GridSettings].append(grid.read_bytes())
    return found


def write_base(folder: Path) -> Path:
    """A narrow base with its motion modules and a recipe."""
    bases.write_base(folder)
    bases.write_motion_adapter(folder / "motion_adapter")
    write_recipe(folder, Recipe())
    return folder


def write_tokenizer(folder: Path) -> Path:
    """CLIP's kind of tokenizer."""
    return bases.write_tokenizer(folder, 1024)


def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """As of a run."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def write_run(folder: Path) -> Path:
    """A run that was stopped, and a clip with its settings."""
    folder.mkdir()
    save_settings(folder / "settings.json", SETTINGS)
    content = {"left to the base": [key for key, value in asdict(SETTINGS).items() if value is None], "contents": {}}
    (folder / "inputs.json").write_text(json.dumps(content))
    (folder / "log.csv").write_text("step,loss,seconds\n0,0.5,0.1\n1,0.4,0.1\n")
    parameters = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))]
    its = optimizer(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    its.step()
    state = {"done": 2, "parameters": [p.detach() for p in parameters], "optimizer": its.state_dict(), "scaler": {}}
    torch.save(state | {"checksum": checksum(state)}, folder / "state.pt")
    write_media(folder / "video.gif", torch.zeros(2, 3, 16, 16), fps=8)
    write_json(record_file(folder / "video.gif"), clip_record())
    return folder


def clip_settings(run: Path) -> GenerateSettings:
    """Of the clip in the run's folder."""
    return GenerateSettings(prompt=["a ball"], out=str(run / "video.gif"))


def clip_record() -> dict[str, Any]:
    """Of that clip."""
    settings = {key: value for key, value in asdict(clip_settings(Path())).items() if key not in PER_CLIP}
    tables: dict[str, Any] = {"settings": settings, "filled": {"steps": 25}, "files": {"lora": {"a": "0"}}}
    of_base = {"base": "tiny", "fingerprints": {"unet": "0"}, "versions": {"torch": "2"}, "threads": 1}
    return {"customttt": "0", "prompt": "a ball", "seed": 0, "prompts": ["a ball"], "seeds": [0], **tables, **of_base}


def judge() -> bytes:
    """The judge's file."""
    return JUDGE.read_bytes()


def subject(folder: Path) -> Path:
    """A folder with a picture."""
    if not (folder / "a.png").exists():
        folder.mkdir(exist_ok=True)
        smooth(16, 16).save(folder / "a.png")
    return folder


def pictures() -> list[bytes]:
    """PNG of several modes, JPEG of both kinds, GIF, WebP of both kinds, BMP, TIFF, EXIF in some of them."""
    forms: list[tuple[str, str, dict[str, Any]]] = [
        *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16")),
        *(("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {})),
        *(("GIF", "P", {}), ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGB", {}), ("BMP", "RGB", {})),
        *(("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"})),
    ]
    found = []
    for kind, mode, options in forms:
        stream = io.BytesIO()
        picture = smooth().convert("L").convert("I;16") if mode == "I;16" else smooth().convert(mode)
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(stream, kind, **options, **({"exif": exif} if kind in ("JPEG", "WEBP", "PNG") else {}))
        found.append(stream.getvalue())
    stream = io.BytesIO()
    smooth().save(stream, "GIF", save_all=True, append_images=[smooth().rotate(90)], duration=100)
    return [*found, stream.getvalue()]


def videos(folder: Path) -> list[bytes]:
    """mp4, with moov before and behind, gif, webm, avi, mpeg, mkv."""
    folder.mkdir()
    frames = greys(10)
    torch_frames = torch.rand(6, 3, 32, 32) * 2 - 1
    write_media(folder / "a.mp4", torch_frames, fps=8, metadata=clip_record())
    write_media(folder / "a.gif", torch_frames, fps=8)
    made = [folder / "a.mp4", folder / "a.gif"]
    for name, codec in (
        ("b.mp4", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.avi", "mpeg4"),
        ("a.mkv", "ffv1"),
        ("a.mov", "png"),
    ):
        made.append(write_clip(folder / name, frames, codec=codec))
    return [path.read_bytes() for path in made]


def _thin(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor in 40, the small ones."""
    small = {name: tensor for name, tensor in found.items() if tensor.numel() <= 2000}
    telling = {name: tensor for name, tensor in found.items() if "attn2.to_k" in name or "conv_in" in name}
    return dict([*list(small.items())[::40], *list(telling.items())[:1]])


def _few(found: Mapping[str, Any], count: int) -> dict[str, Any]:
    return dict(list(found.items())[:count])


def _attention(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: low for name, low in found.items() if "attn" in name}


def _contiguous(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _saved(content: Any, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()
