"""Two motions at once: how near sets of LoRAs come to the path of one clip and to the growth of another.

    python benchmarks/two_motions.py --path_video demo/reference.mp4 --size_video recipes/source.mp4
        --loras "" recipes/dax recipes/zoom "recipes/dax recipes/zoom:0.5"

Each --loras is one set, as `customttt generate --lora` takes it; "" is the base alone. The judge reads 8 clips of four
subjects for each. Path error: 0 is the first clip's path, standing still about 0.45. Growth: mean size in a clip's last
third over that in its first, the median of the clips, to be held against the second clip's own. As asked: the share of
shapes, colours and backgrounds that are as the prompts say.
"""

import argparse

import torch

from eval.measures import in_sight, path_error
from eval.reading import ClipReading, load_judge, read_clip
from sampling import read_video, sample_videos
from sampling.generate import loaded_loras
from train.world import BACKGROUNDS, COLOURS, SIZE, WORLD_SHAPES
from weights import load_base

SUBJECTS = ("a dotted red star", "a plain blue heart", "a ringed purple cross", "a striped white moon")
PLACES = ("over the snow", "over the night", "over the grass", "over the sea")
SEEDS = (0, 1)


def growth(its: ClipReading) -> torch.Tensor:
    """Mean size in a clip's last third over that in its first, (n,); frames without a subject count for nothing."""
    seen, third = in_sight(its.path), its.path.shape[1] // 3
    sizes = (its.path[..., 2] * seen, seen.float())
    first, last = ([x[:, part].sum(dim=1) for x in sizes] for part in (slice(third), slice(-third, None)))
    return (last[0] / last[1].clamp_min(1)) / (first[0] / first[1].clamp_min(1)).clamp_min(1e-6)


def as_asked(its: ClipReading, prompts: list[str]) -> float:
    """Share of shapes, colours and backgrounds that are those of the prompts."""
    right = []
    for name, words in (("shape", WORLD_SHAPES), ("colour", COLOURS), ("background", BACKGROUNDS)):
        for row, prompt in zip(getattr(its, name).argmax(dim=1).tolist(), prompts, strict=True):
            right.append(list(words)[row] in prompt.split())
    return sum(right) / len(right)


def main() -> None:
    """Generate, read, and print a row for each set."""
    parser = argparse.ArgumentParser(description="What sets of LoRAs make of one clip's path and another's growth.")
    parser.add_argument("--path_video", required=True)
    parser.add_argument("--size_video", required=True)
    parser.add_argument("--loras", nargs="+", required=True, help='sets, e.g. "runs/path runs/zoom:0.5"')
    parser.add_argument("--verb", default="is dax and wug", help="what the prompts say of the subject")
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    base, judge = load_base("tiny", device=args.device), load_judge()
    frames = base.recipe.num_frames
    path, size = (
        read_clip(judge, read_video(video, frames, SIZE, SIZE).transpose(0, 1)[None])
        for video in (args.path_video, args.size_video)
    )
    prompts = [f"{what} {args.verb} {where}" for what, where in zip(SUBJECTS, PLACES, strict=True)] * len(SEEDS)
    seeds = [seed for seed in SEEDS for _ in SUBJECTS]
    print(f"growth of {args.size_video}: {growth(size).item():.2f}, of {args.path_video}: {growth(path).item():.2f}")
    print("path error | growth | in sight | as asked | LoRAs")
    for chosen in args.loras:
        with loaded_loras(base, chosen.split()) as at_step:
            videos = sample_videos(base, prompts, seeds, at_step=at_step, guidance_scale=args.guidance_scale)
        its = read_clip(judge, videos.transpose(1, 2))
        errors = path_error(its.path, path.path.expand(len(videos), -1, -1))
        print(
            f"{errors.mean():10.2f} | {growth(its).median():6.2f} | {in_sight(its.path).float().mean():8.2f} | "
            f"{as_asked(its, prompts):8.2f} | {chosen or 'none'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
