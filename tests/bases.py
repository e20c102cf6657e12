"""Checkpoint files in the layouts that people really have, with random weights (see `base_tensors.py`).

    python tests/bases.py OUT --width full --layout ldm --motion v3

writes a random base, a motion module and a tokenizer to try the program on: sound files that paint noise.
"""

import argparse
import json
import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from base_tensors import (
    VOCAB_SIZES,
    Entry,
    entries,
    motion_config,
    tensors,
    text_config,
    unet_config,
    vae_config,
    value,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

MOTION_FILES = {"v1": "mm_sd_v15.ckpt", "v2": "mm_sd_v15_v2.ckpt", "v3": "v3_sd15_mm.ckpt"}
OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
WORDS = """
a an the of in on at with and is are plays playing lifting lifts running turning dancing riding drives driving walking
man woman person dog cat bear teddy warrior robot car road street snow beach forest mountain guitar weights bicycle
photo video red green blue yellow white black small large circle square triangle ball moving left right up down
"""


def write_base(
    folder: Path | str,
    layout: str = "diffusers",
    width: str = "narrow",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    sharded: bool = False,
    seed: int = 0,
    suffix: str = ".safetensors",
    short_text_keys: bool = False,
) -> Path:
    """A Stable Diffusion 1.5 base.

    Args:
        layout: "diffusers" (a folder with its tokenizer) or "ldm" (`base.safetensors` in `folder`).
        variant: "fp16" puts that into the file names of a diffusers folder.
        sharded: each network of a diffusers folder in two files and an index.
        suffix: ".safetensors", or ".bin" (diffusers), or ".ckpt" (LDM, with a Lightning callback inside).
        short_text_keys: the text encoder's keys as transformers 5.6 and later write them, without `text_model.`.

    Returns:
        What to give to `load_base`: the folder, or the one file.
    """
    folder = Path(folder)
    if layout == "ldm":
        path = folder / f"base{suffix}"
        if suffix == ".ckpt":
            return write_ckpt(path, tensors("sd15_ldm_single_file", width, dtype, seed))
        return _write(path, entries("sd15_ldm_single_file", width), dtype, seed)

    text = entries("sd15_diffusers_text", width)
    if short_text_keys:
        text = [e._replace(key=e.key.removeprefix("text_model.")) for e in text if not e.key.endswith("position_ids")]
    stem = "pytorch_model" if suffix == ".bin" else "model"
    for part, name, listed, config in (
        ("unet", "diffusion_pytorch_model", entries("sd15_diffusers_unet", width), unet_config(width)),
        ("vae", "diffusion_pytorch_model", entries("sd15_diffusers_vae", width), vae_config(width)),
        ("text_encoder", stem, text, text_config(width)),
    ):
        _write_json(folder / part / "config.json", config)
        _write_parts(folder / part / f"{name}{suffix}", listed, dtype, seed, variant, 2 if sharded else 1)
    write_tokenizer(folder / "tokenizer", VOCAB_SIZES[width])
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", MODEL_INDEX)
    return folder


def write_motion_module(
    path: Path | str,
    version: str = "v3",
    width: str = "narrow",
    wrap: str | None = None,
    stray_unet_keys: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pe: bool = True,
) -> Path:
    """An AnimateDiff motion module, .safetensors or pickled by the suffix of `path`.

    Args:
        version: "v1", "v2" or "v3".
        wrap: None (flat), "state_dict", or "module" (as AnimateDiff's training saves: that, and `module.` before keys).
        stray_unet_keys: the image network's weights beside it, as in a training snapshot.
        pe: with the positional encodings.
    """
    path = Path(path)
    listed = [e for e in entries(f"animatediff_{version}_motion_module", width) if pe or not e.key.endswith(".pe")]
    if stray_unet_keys:
        listed = [*entries("sd15_diffusers_unet", width), *listed]
    if wrap == "module":
        listed = [e._replace(key=f"module.{e.key}") for e in listed]
    if wrap is None:
        return _write(path, listed, dtype, seed)
    return write_ckpt(path, {e.key: value(e, dtype, seed) for e in listed}, lightning=False)


def write_motion_adapter(
    folder: Path | str, version: str = "v3", width: str = "narrow", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """The same motion modules as a diffusers MotionAdapter folder."""
    folder = Path(folder)
    named = {e.name: e for e in entries(f"animatediff_{version}_motion_module", width)}  # two encodings share a name
    listed = [e._replace(key=name.removeprefix("motion.")) for name, e in named.items()]
    _write_json(folder / "config.json", motion_config(version, width))
    _write(folder / "diffusion_pytorch_model.safetensors", listed, dtype, seed)
    return folder


def write_vae(
    path: Path | str,
    layout: str = "diffusers",
    width: str = "narrow",
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """An autoencoder alone, "diffusers", "old" (diffusers before 2023) or "ldm"; a folder if `path` has no suffix."""
    path = Path(path)
    if layout == "ldm":
        listed = [e for e in entries("sd15_ldm_single_file", width) if e.key.startswith("first_stage_model.")]
        listed = [e._replace(key=e.key.removeprefix("first_stage_model.")) for e in listed]
    else:
        listed = list(entries("sd15_diffusers_vae", width))
    if layout == "old":
        for new, old in OLD_VAE_NAMES.items():
            listed = [e._replace(key=e.key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")) for e in listed]
    listed = [e._replace(key=prefix + e.key) for e in listed]
    if path.suffix:
        return _write(path, listed, dtype, seed)
    _write_json(path / "config.json", vae_config(width))
    _write(path / "diffusion_pytorch_model.safetensors", listed, dtype, seed)
    return path


def write_ckpt(path: Path | str, found: dict[str, Tensor], lightning: bool = True) -> Path:
    """`found` as a training checkpoint; `lightning` drags an object along whose class is not installed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    wrapped: dict[str, Any] = {"epoch": 6, "global_step": 470000, "state_dict": found}
    if not lightning:
        torch.save(wrapped, path)
        return path
    name = "pytorch_lightning.callbacks.model_checkpoint"
    modules = {part: types.ModuleType(part) for part in (name.split(".")[0], name.rpartition(".")[0], name)}
    callback = type("ModelCheckpoint", (), {"__module__": name, "__init__": lambda self: None})
    modules[name].ModelCheckpoint = callback  # type: ignore[attr-defined]
    kept = callback()
    kept.best_model_path = "last.ckpt"
    sys.modules.update(modules)
    try:
        torch.save(wrapped | {"pytorch-lightning_version": "1.4.2", "callbacks": {callback: {"state": kept}}}, path)
    finally:
        for part in modules:
            del sys.modules[part]
    return path


def write_tokenizer(folder: Path | str, vocab_size: int = 49408) -> Path:
    """A CLIP tokenizer that knows every byte and the words of `WORDS`; its last two tokens start and end a prompt."""
    folder = Path(folder)
    symbols = sorted(ByteLevel.alphabet())
    merges = list(dict.fromkeys(pair for word in WORDS.split() for pair in _merges(word)))
    known = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(known))}
    assert len(vocab) <= vocab_size - 2, f"{len(vocab)} tokens are too many for a vocabulary of {vocab_size}"
    _write_json(folder / "vocab.json", vocab | {"<|startoftext|>": vocab_size - 2, "<|endoftext|>": vocab_size - 1})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", SPECIAL_TOKENS | config)
    return folder


def _merges(word: str) -> list[tuple[str, str]]:
    """Joins the letters of a word from the left, the last of them marked as its end."""
    letters = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(letters[:n]), letters[n]) for n in range(1, len(letters))]


def _write_parts(
    path: Path, listed: Sequence[Entry], dtype: torch.dtype, seed: int, variant: str | None, shards: int
) -> None:
    """One file, or several and their index; the variant stands before the shard's number and behind `index`."""
    stem, suffix, tag = path.stem, path.suffix, f".{variant}" if variant else ""
    if shards == 1:
        _write(path.with_name(f"{stem}{tag}{suffix}"), listed, dtype, seed)
        return
    where = {}
    for n in range(shards):
        part = listed[n * len(listed) // shards : (n + 1) * len(listed) // shards]
        name = f"{stem}{tag}-{n + 1:05}-of-{shards:05}{suffix}"
        _write(path.with_name(name), part, dtype, seed)
        where |= {e.key: name for e in part}
    total = sum(math.prod(e.shape) for e in listed) * dtype.itemsize
    _write_json(
        path.with_name(f"{stem}{suffix}.index{tag}.json"), {"metadata": {"total_size": total}, "weight_map": where}
    )


def _write(path: Path, listed: Sequence[Entry], dtype: torch.dtype, seed: int) -> Path:
    """Random tensors to a file; a .safetensors file tensor by tensor, so that a full base never lies in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        torch.save({e.key: value(e, dtype, seed) for e in listed}, path)
        return path
    listed = sorted(listed, key=lambda e: not e.key.endswith("position_ids"))  # 8-byte numbers first: aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for e in listed:
        kept = torch.int64 if e.key.endswith("position_ids") else dtype
        start, end = end, end + math.prod(e.shape) * kept.itemsize
        header[e.key] = {"dtype": DTYPES[kept], "shape": e.shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for e in listed:
            file.write(value(e, dtype, seed).view(torch.uint8).numpy().tobytes())
    return path


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def main() -> None:
    """Write a random base, a motion module and a tokenizer into a folder, and say where."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--width", choices=VOCAB_SIZES, default="narrow", help="full: Stable Diffusion's own, gigabytes"
    )
    parser.add_argument("--layout", choices=("diffusers", "ldm"), default="ldm")
    parser.add_argument("--motion", choices=MOTION_FILES, default="v3", help="version of the motion module")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    folder = args.out / "base" if args.layout == "diffusers" else args.out
    motion = args.out / MOTION_FILES[args.motion]
    print("base:", write_base(folder, args.layout, args.width, dtype, seed=args.seed))
    print("motion module:", write_motion_module(motion, args.motion, args.width, dtype=dtype, seed=args.seed))
    print("tokenizer:", write_tokenizer(args.out / "tokenizer", VOCAB_SIZES[args.width]))


if __name__ == "__main__":
    main()
