"""How well DDIM inversion and sampling give a clip back, without guidance: PSNR against the clip through the VAE alone.

    python benchmarks/inversion.py                     # 12 clips of the rendered world, the tiny base, 50 steps
    python benchmarks/inversion.py --steps 25 50 100

Every second clip shows a held-out motion; where there is no word for it, the prompt names the rest. Beside the PSNR
stands the standard deviation of the inverted latents, which would be 1 for noise.
"""

import argparse

import torch
from torch import Tensor

from sampling import ddim_sample, decode, encode, encode_videos, evaluating, guided
from sampling.edit import invert_latents
from train.world import HELD_OUT_MOTIONS, MOTIONS, WORLD_MOTIONS, Scenes, caption, make_scenes, random_scenes, render
from weights import load_base


def scenes_of_both_kinds(count: int) -> tuple[Scenes, list[str]]:
    """Scenes of seen looks, by turns in seen and in held-out motions, and their prompts."""
    generator = torch.Generator().manual_seed(0)
    looks = random_scenes(count, generator)
    held_out = torch.tensor([list(MOTIONS).index(HELD_OUT_MOTIONS[i // 2 % 5]) for i in range(count)])
    motion = torch.where(torch.arange(count) % 2 == 1, held_out, looks.motion)
    scenes = make_scenes(looks.shape, looks.texture, looks.colour, None, looks.background, motion, generator)
    return scenes, [caption(scenes, i, motion=int(motion[i]) < len(WORLD_MOTIONS)) for i in range(count)]


def psnr(frames: Tensor, reference: Tensor) -> Tensor:
    """Of clips (b, ...) in [-1, 1], in dB, (b,)."""
    return -10 * torch.log10(((frames - reference) / 2).square().flatten(1).mean(dim=1))


def main() -> None:
    """Invert, sample, and print the figures."""
    parser = argparse.ArgumentParser(description="PSNR of inversion and sampling against the VAE's reconstruction.")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--spacing", default="leading", choices=["leading", "linspace", "trailing"])
    parser.add_argument("--refine", type=int, default=0, help="fixed-point iterations of each step of the inversion")
    parser.add_argument("--empty_prompt", action="store_true", help="both ways with the empty prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    base = load_base("tiny", device=args.device)
    scenes, prompts = scenes_of_both_kinds(args.clips)
    videos = render(scenes)[0]
    clean = encode_videos(base, videos).mean
    reference = decode(base, clean)
    text = encode(base, [""] * len(prompts) if args.empty_prompt else prompts)
    vae = psnr(reference, videos.transpose(1, 2))
    print(f"{args.clips} clips, {args.spacing} spacing; VAE against source: mean {vae.mean():.1f} dB")
    for steps in args.steps:
        inverted = invert_latents(base, clean, text, steps, spacing=args.spacing, refine=args.refine)
        with evaluating(base.unet):
            back = ddim_sample(guided(base.unet, text, None, 1.0), inverted, base.schedule, steps, spacing=args.spacing)
        found = psnr(decode(base, back), reference)
        kinds = f"seen motions {found[0::2].mean():.1f}, held-out {found[1::2].mean():.1f}"
        span = f"min {found.min():.1f}, max {found.max():.1f}"
        print(f"{steps:>4} steps: mean {found.mean():.1f} dB ({kinds}), {span}; noise std {inverted.std():.2f}")


if __name__ == "__main__":
    main()
