"""How long the parts of the method take, as ratios to one forward pass in the same run (random weights).

    python benchmarks/steps.py --preset SD15_V3 --frames 16 --size 256

On CUDA it also says the peak memory of each part. The forward pass of diffusers' UNetMotionModel stands beside ours
where diffusers is installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import model
from lora import adapters, add_adapter
from model import NoiseSchedule, UNet3D, UNetConfig
from train.losses import motion_loss, noise_loss
from train.stage import predict


def seconds(work: Callable[[], object], runs: int, device: torch.device) -> tuple[float, float]:
    """Median wall time of `work` in seconds, and its peak CUDA memory in GiB (0 elsewhere); one run uncounted."""
    times = []
    for run in range(runs + 1):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if run:
            times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return statistics.median(times), peak


def diffusers_forward(config: UNetConfig, latents: Tensor, text: Tensor) -> Callable[[], object] | None:
    """The same network in diffusers, if it is installed."""
    try:
        from diffusers import UNetMotionModel
    except ImportError:
        return None
    assert config.motion is not None
    reference = UNetMotionModel(
        block_out_channels=config.block_out_channels,
        cross_attention_dim=config.cross_attention_dim,
        num_attention_heads=config.num_attention_heads,
        norm_num_groups=config.norm_num_groups,
        motion_max_seq_length=config.motion.max_frames,
        motion_num_attention_heads=config.motion.num_attention_heads,
        use_motion_mid_block=config.motion.mid_block,
    ).to(latents.device, latents.dtype)
    words = text.repeat_interleave(latents.shape[2], dim=0)
    return lambda: reference(latents, 500, encoder_hidden_states=words)


def main() -> None:
    """Time each part and print a table."""
    parser = argparse.ArgumentParser(description="Ratios of the method's parts to one forward pass.")
    parser.add_argument("--preset", default="SD15_V3", choices=["SD15_V1", "SD15_V2", "SD15_V3", "TINY"])
    parser.add_argument("--widths", type=int, nargs=4, help="other widths than the preset's")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config: UNetConfig = getattr(model, args.preset)
    if args.widths:
        config = replace(config, block_out_channels=tuple(args.widths))
    unet = UNet3D(config).to(device, dtype).requires_grad_(False)
    add_adapter(unet, "appearance", "spatial", (2, 6), dropout=0.1)
    add_adapter(unet, "motion", "temporal", (2, 5), dropout=0.1)
    latents = torch.randn(1, 4, args.frames, args.size // 8, args.size // 8, device=device)
    text = torch.randn(1, 77, config.cross_attention_dim, device=device, dtype=dtype)
    schedule, generator, noisy = NoiseSchedule(), torch.Generator(), latents.to(dtype)

    def forward(**options: bool) -> None:
        with torch.no_grad():
            unet(noisy, 500, text, **options)

    def training(names: tuple[str, ...], clip: Tensor, motion: bool = True) -> None:
        with adapters(unet, dict.fromkeys(names, 1.0)):
            pair = predict(unet, schedule, clip, text, generator, motion=motion)
            (motion_loss(*pair, generator) if names == ("motion",) else noise_loss(*pair)).backward()

    def guided(name: str, motion: bool) -> None:
        with torch.no_grad(), adapters(unet, {name: 1.0}):
            unet(torch.cat([noisy, noisy]), 500, torch.cat([text, text]), motion=motion)

    def ttt() -> None:
        for _ in range(5):
            guided("appearance", motion=False)
            guided("motion", motion=True)
        for _ in range(2):
            training(("appearance", "motion"), latents)

    parts = {
        "forward": forward,
        "forward, motion modules bypassed": lambda: forward(motion=False),
        "appearance step (one frame)": lambda: training(("appearance",), latents[:, :, :1], motion=False),
        "motion step": lambda: training(("motion",), latents),
        "test-time training step": ttt,
    }
    reference = diffusers_forward(config, noisy, text)
    if reference is not None:
        parts["forward of diffusers"] = lambda: torch.no_grad()(reference)()
    unet.train()
    measured = {name: seconds(work, args.runs, device) for name, work in parts.items()}
    base = measured["forward"][0]
    clip = f"{args.frames} frames of {args.size}x{args.size}"
    print(f"{args.preset} {config.block_out_channels}, {clip}, {dtype}, {device}")
    for name, (taken, peak) in measured.items():
        memory = f"  peak {peak:6.2f} GiB" if device.type == "cuda" else ""
        print(f"  {name:<34}{taken:9.3f} s {taken / base:7.2f} x{memory}")


if __name__ == "__main__":
    main()
