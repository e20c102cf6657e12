"""A base out into files: diffusers' layout with a MotionAdapter beside it, for `load_base` and for diffusers."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel

from model import AutoencoderKL, NoiseSchedule, Recipe, TextEncoder, UNet3D, UserError
from model.motion import frame_encoding
from weights.configs import (
    MOTION_FIXED,
    TEXT_FIXED,
    UNET_FIXED,
    VAE_FIXED,
    motion_config,
    text_config,
    unet_config,
    vae_config,
)
from weights.files import atomic_write, write_json
from weights.folders import replacing
from weights.keymaps import MOTION_ADAPTER, TEXT, UNET_DIFFUSERS, VAE_DIFFUSERS
from weights.load import MOTION
from weights.parts import Part
from weights.recipe import RECIPE, check_recipe, write_recipe
from weights.tokenizer import FILES, VOCABULARY

CLIP_TEXT = replace(TEXT, prefix="text_model.")  # how all published text encoders are named
SD15_PIXELS = 512  # side of the pictures that Stable Diffusion 1.5's folder asks for


def save_base(
    folder: str | Path,
    unet: UNet3D,
    vae: AutoencoderKL,
    text: TextEncoder,
    tokenizer_folder: str | Path,
    recipe: Recipe | None,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = 14_000_000,
    clip: CLIPModel | None = None,
) -> None:
    """Write a whole base, motion modules included, and the recipe it is customised with.

    All is checked before anything is written. A folder in it (of a network, of the tokenizer) is written beside its
    former one and takes its place whole, one right after the other: a run that is killed leaves each of them as it was
    or new, never a mix of both. What else lies in `folder` stays.

    Args:
        folder: made if missing.
        unet: with its motion modules.
        vae: its autoencoder.
        text: its text encoder.
        tokenizer_folder: with CLIP's vocabulary (vocab.json, merges.txt); its files are copied, and what else lies
            there is not.
        recipe: for `recipe.json`; None: there is none, as in Stable Diffusion's own folders.
        dtype: of the weights in the files.
        shard_bytes: a network that takes more goes into several files of at most that, with an index.
        clip: the whole CLIP that `text` is a part of, for a folder `clip/` that `load_base` leaves alone: it tells
            how well a frame fits a caption.

    Raises:
        UserError: no motion modules, weights too large for the dtype or not finite, a config that this layout cannot
            say, no tokenizer, a recipe out of range, or a system that refuses.
    """
    folder, tokenizer_folder, modules = Path(folder), Path(tokenizer_folder), unet.config.motion
    if modules is None:
        raise UserError("a base is saved with its motion modules, and this one has none")
    if not tokenizer_folder.is_dir():
        raise UserError(f"{tokenizer_folder} is no folder: a tokenizer was to be copied from there")
    missing = [name for name in VOCABULARY if not (tokenizer_folder / name).is_file()]
    if missing:
        raise UserError(f"{tokenizer_folder} holds no tokenizer: {' and '.join(missing)} should be in it")
    if recipe is not None:
        check_recipe(recipe, folder / RECIPE)
    pixels = SD15_PIXELS if recipe is None else max(recipe.height, recipe.width)
    tensors = unet.state_dict()
    image = {name: tensor for name, tensor in tensors.items() if ".temporal." not in name}
    motion = {name: tensor for name, tensor in tensors.items() if ".temporal." in name}
    parts = {
        "unet": Part(folder / "unet", UNET_DIFFUSERS, image, config=_unet_json(unet, pixels // vae.config.factor)),
        "vae": Part(folder / "vae", VAE_DIFFUSERS, vae.state_dict(), config=_vae_json(vae, pixels)),
        "text_encoder": Part(folder / "text_encoder", CLIP_TEXT, text.clip.state_dict(), config=_text_json(text)),
        MOTION: Part(folder / MOTION, MOTION_ADAPTER, motion, config=_motion_json(unet)),
    }
    check_told("unet", unet_config(parts["unet"], modules), unet.config)
    check_told("vae", vae_config(parts["vae"]), vae.config)
    check_told("text_encoder", text_config(parts["text_encoder"]), text.config)
    check_told(MOTION, motion_config(parts[MOTION]), modules)

    networks: dict[str, tuple[Mapping[str, Any], dict[str, Tensor]]] = {}
    for name, part in parts.items():
        networks[name] = part.config, _cast(part.source, part.layout.write(part.tensors), dtype)
    networks[MOTION][1].update(_encodings(parts[MOTION], modules.max_frames))
    if clip is not None:
        config = json.loads(clip.config.to_json_string()) | {"architectures": ["CLIPModel"]}
        networks["clip"] = config, _cast(folder / "clip", clip.state_dict(), dtype)

    with replacing([folder / name for name in (*networks, "tokenizer")]) as fresh:
        for name, (config, theirs) in networks.items():
            _write_network(fresh[folder / name], config, theirs, shard_bytes)
        for file in (tokenizer_folder / name for name in FILES):
            if file.is_file():
                with atomic_write(fresh[folder / "tokenizer"] / file.name) as temporary:
                    shutil.copyfile(file, temporary)
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_json(NoiseSchedule()))
    write_json(folder / "model_index.json", MODEL_INDEX)
    if recipe is None:
        (folder / RECIPE).unlink(missing_ok=True)  # of the base that was here before
    else:
        write_recipe(folder, recipe)


MODEL_INDEX: dict[str, Any] = {
    "_class_name": "AnimateDiffPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    MOTION: ["diffusers", "MotionAdapter"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def _unet_json(unet: UNet3D, sample_size: int) -> dict[str, Any]:
    config = unet.config
    return UNET_FIXED | {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.cross_attention_dim,
        "attention_head_dim": config.num_attention_heads,  # diffusers' old mistake: see configs.unet_config
        "norm_num_groups": config.norm_num_groups,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    }


def _vae_json(vae: AutoencoderKL, sample_size: int) -> dict[str, Any]:
    config = vae.config
    return VAE_FIXED | {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "down_block_types": ["DownEncoderBlock2D"] * len(config.block_out_channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.block_out_channels),
    }


def _text_json(text: TextEncoder) -> dict[str, Any]:
    config, clip = text.config, text.clip.config
    return TEXT_FIXED | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "bos_token_id": clip.bos_token_id,
        "eos_token_id": clip.eos_token_id,
        "pad_token_id": clip.eos_token_id,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "projection_dim": config.hidden_size,
    }


def _motion_json(unet: UNet3D) -> dict[str, Any]:
    config = unet.config.motion
    assert config is not None
    return MOTION_FIXED | {
        "_class_name": "MotionAdapter",
        "block_out_channels": unet.config.block_out_channels,
        "motion_max_seq_length": config.max_frames,
        "motion_norm_num_groups": config.norm_num_groups,
        "motion_num_attention_heads": config.num_attention_heads,
        "use_motion_mid_block": config.mid_block,
    }


def _scheduler_json(schedule: NoiseSchedule) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "steps_offset": schedule.steps_offset,
        "set_alpha_to_one": schedule.final_alpha_one,
        "prediction_type": schedule.prediction,
        "timestep_spacing": "leading",
        "clip_sample": False,
    }


def check_told(network: str, told: object, config: object) -> None:
    """What will be read from the files must be what is there: not all of a config has a field in this layout."""
    other = [
        f"{name} = {value} would be read as {getattr(told, name)}"
        for name, value in vars(config).items()
        if value != getattr(told, name)
    ]
    if other:
        raise UserError(f"the {network} cannot be kept in this layout: {', '.join(other)}")


def _encodings(part: Part, frames: int) -> dict[str, Tensor]:
    """The sinusoids of each motion module, for diffusers, which reads them; rounded, they would show."""
    norms = {name: t for name, t in part.tensors.items() if name.endswith("transformer_blocks.0.norm1.weight")}
    found = {part.layout.from_ours(name): frame_encoding(frames, t.float())[None] for name, t in norms.items()}
    return {key.replace("norm1.weight", "pos_embed.pe"): pe for key, pe in found.items() if key is not None}


def _cast(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    bad = next((key for key, tensor in cast.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{folder} is not written: {bad} has numbers that are not finite, or too large for {dtype}")
    return cast


def _write_network(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """The config, then one file, or several and their index, into a fresh folder."""
    write_json(folder / "config.json", config)
    stem = "diffusion_pytorch_model" if "_class_name" in config else "model"  # diffusers' name, and transformers'
    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=shard_bytes)
    for name, keys in split.filename_to_tensors.items():
        with atomic_write(folder / name) as temporary:
            save_file({key: tensors[key] for key in keys}, temporary, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)
