"""A base out into one-file checkpoints: Stable Diffusion's original layout, and AnimateDiff's for motion modules."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import AutoencoderKL, MotionConfig, TextEncoder, UNet3D, UserError
from model.motion import frame_encoding
from weights.configs import motion_config, text_config, unet_config, vae_config
from weights.files import atomic_write
from weights.keymaps import ANIMATEDIFF, TEXT, UNET_LDM, VAE_LDM
from weights.parts import Part
from weights.save import check_told

TEXT_LDM = replace(TEXT, prefix="cond_stage_model.transformer.text_model.")


def save_ldm(
    path: str | Path,
    motion_path: str | Path,
    unet: UNet3D,
    vae: AutoencoderKL,
    text: TextEncoder,
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write a base as Stable Diffusion's one file, and its motion modules, if it has any, as AnimateDiff's.

    The weights keep their dtype; the motion modules' positional encodings, by which readers tell AnimateDiff's
    versions, are float32. The noise schedule, which published files hold as well, is left to the readers.

    Args:
        path: of the checkpoint (.safetensors).
        motion_path: of the motion module (.safetensors).
        unet: with motion modules or without.
        vae: its autoencoder.
        text: its text encoder.
        metadata: for the headers of both.

    Returns:
        The files written.

    Raises:
        UserError: a network that this layout cannot describe, since it has no place for heads, groups and scaling
            factors; nothing is written then. Or a system that refuses.
    """
    path, tensors, modules = Path(path), unet.state_dict(), unet.config.motion
    motion = {name: tensors.pop(name) for name in list(tensors) if ".temporal." in name}
    parts = (
        Part(path, UNET_LDM, tensors),
        Part(path, VAE_LDM, vae.state_dict()),
        Part(path, TEXT_LDM, text.clip.state_dict()),
    )
    encodings = {} if modules is None else _encodings(motion, modules)
    try:
        check_told("UNet", unet_config(parts[0], modules), unet.config)
        check_told("VAE", vae_config(parts[1]), vae.config)
        check_told("text encoder", text_config(parts[2]), text.config)
        if modules is not None:
            told = motion_config(Part(Path(motion_path), ANIMATEDIFF, motion, unused=encodings))
            check_told("motion module", told, modules)
    except UserError as error:
        raise UserError(
            "a one-file checkpoint has no place for numbers of heads and groups or a scaling factor, and every reader "
            f"takes Stable Diffusion 1.5's; this base has others, so that only diffusers' layout can hold it ({error})"
        ) from error
    contents = {path: {key: t for part in parts for key, t in part.layout.write(part.tensors).items()}}
    # a constant, as integers whatever the dtype: readers with an older transformers do not do without
    contents[path][f"{TEXT_LDM.prefix}embeddings.position_ids"] = torch.arange(text.config.max_position_embeddings)[
        None
    ]
    if motion:
        contents[Path(motion_path)] = ANIMATEDIFF.write(motion) | encodings
    for file, theirs in contents.items():
        with atomic_write(file) as temporary:
            whole = {key: tensor.detach().cpu().contiguous() for key, tensor in theirs.items()}
            save_file(whole, temporary, metadata={"format": "pt", **metadata})
    return list(contents)


def _encodings(motion: Mapping[str, Tensor], config: MotionConfig) -> dict[str, Tensor]:
    """The sinusoids, one for each attention (1, frames, channels), float32: in half precision they would be off."""
    found = {}
    for name, weight in motion.items():
        key = ANIMATEDIFF.from_ours(name)
        if key is not None and key.endswith(".to_q.weight"):
            encoding = frame_encoding(config.max_frames, torch.zeros(weight.shape[1]))[None]
            found[key.replace("to_q.weight", "pos_encoder.pe")] = encoding
    return found
