"""What the tests compare with: random weights, and the same network in diffusers."""

import re
from dataclasses import replace

import torch
from diffusers import DDIMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import Tensor, nn

from model import NoiseSchedule, UNet3D, UNetConfig

ANIMATEDIFF = NoiseSchedule("linear", prediction="epsilon", final_alpha_one=True)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of a sane scale: fan-in for matrices, about 1 for norms, small biases; nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module


def error(ours: Tensor, reference: Tensor) -> float:
    """Largest absolute difference, in standard deviations of the reference."""
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.std()).item()


def sampled_latents(base, images, noise):
    """images (f, 3, h, w) -> latents (1, 4, f, h / 8, w / 8) for the given noise."""
    mean, log_variance = base.vae.encode(images).chunk(2, dim=1)
    mean, std = (x.transpose(0, 1)[None] for x in (mean, (log_variance / 2).exp()))
    return 0.18215 * (mean + std * noise)


def diffusers_name(name: str) -> str:
    """Our parameter name -> diffusers'."""
    name = re.sub(r"^layers\.([0-3])\.", r"down_blocks.\1.", name)
    name = re.sub(r"^layers\.4\.", "mid_block.", name)
    name = re.sub(r"^layers\.([5-8])\.", lambda m: f"up_blocks.{int(m[1]) - 5}.", name)
    name = name.replace(".spatial.", ".attentions.").replace(".temporal.", ".motion_modules.")
    return name.replace(".downsampler.", ".downsamplers.0.").replace(".upsampler.", ".upsamplers.0.")


def like_diffusers(config: UNetConfig) -> UNetConfig:
    """The config with the one norm that diffusers pools pooled, and those it never pools not."""
    if config.motion is None:
        return config
    return replace(config, motion=replace(config.motion, pool_norms=False, pool_module_norm=True))


def diffusers_unet(unet: UNet3D) -> nn.Module:
    """diffusers' network of the same shape with the same weights: UNetMotionModel, or UNet2DConditionModel."""
    config = unet.config
    common = {
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "cross_attention_dim": config.cross_attention_dim,
        "attention_head_dim": config.num_attention_heads,
        "norm_num_groups": config.norm_num_groups,
    }
    spatial = UNet2DConditionModel(**common)
    if config.motion is None:
        return _fill(spatial, unet)
    adapter = MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_norm_num_groups=config.motion.norm_num_groups,
        motion_num_attention_heads=config.motion.num_attention_heads,
        motion_max_seq_length=config.motion.max_frames,
        use_motion_mid_block=config.motion.mid_block,
    )
    return _fill(UNetMotionModel.from_unet2d(spatial, adapter), unet)


def _fill(reference: nn.Module, unet: UNet3D) -> nn.Module:
    state = reference.state_dict()
    filled = {diffusers_name(name): value for name, value in unet.state_dict().items()}
    filled = {name: value.reshape(state[name].shape) for name, value in filled.items()}
    missing, unexpected = reference.load_state_dict(filled, strict=False)
    assert not unexpected
    assert all(name.endswith("pos_embed.pe") for name in missing)
    return reference.eval()


def reference_scheduler(spacing, schedule=ANIMATEDIFF, cls=DDIMScheduler):
    """diffusers' DDIM scheduler, or its inverse, of our noise schedule."""
    return cls(
        beta_schedule=schedule.beta_schedule,
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        timestep_spacing=spacing,
        prediction_type=schedule.prediction,
        set_alpha_to_one=schedule.final_alpha_one,
    )
