"""How long `customttt score` takes beside CLIP's bare forward pass on the same frames, as ratios in the same run.

    python benchmarks/score.py --clips 50              # clips of the rendered world, the tiny CLIP
    python benchmarks/score.py --clips 50 --vit        # 256x256 clips, a CLIP of ViT-B/32's size with random weights

Clips are files, and decoding counts. The forward pass is that of CLIP's image tower on prepared pixels, in batches
of the same size.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from eval.clip import CLIPScorer
from eval.clip_images import ImageNumbers, preprocess
from eval.scoring import Scorers, ScorerSettings, open_scorers, score_clips
from sampling import write_media
from sampling.whole import read_whole
from train.world import SIZE, caption, random_scenes, render


def seconds(work: Callable[[], object], runs: int) -> float:
    """Median wall time of `work`; one run uncounted."""
    times = []
    for run in range(runs + 1):
        start = time.perf_counter()
        work()
        if run:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def write_clips(folder: Path, count: int, size: int) -> tuple[list[Path], list[str]]:
    """Rendered clips of 16 frames, as files, and their captions."""
    scenes = random_scenes(count, torch.Generator().manual_seed(0))
    files = [folder / f"{i}.mp4" for i in range(count)]
    for i, file in enumerate(files):
        write_media(file, render(scenes[i : i + 1], size)[0][0].transpose(0, 1))
    return files, [caption(scenes, i) for i in range(count)]


def vit(tiny: CLIPScorer) -> CLIPScorer:
    """A CLIP of ViT-B/32's size, random; it reads the tiny base's tokens."""
    config = CLIPConfig(
        text_config={"vocab_size": 49408, "max_position_embeddings": 77}, vision_config={"patch_size": 32}
    )
    return CLIPScorer(CLIPModel(config).eval().requires_grad_(False), tiny.tokenizer, ImageNumbers(), "random ViT-B/32")


def main() -> None:
    """Time each part and print a table."""
    parser = argparse.ArgumentParser(description="Ratios of scoring to CLIP's forward pass.")
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--vit", action="store_true", help="ViT-B/32's size and 256x256 clips")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()

    size = 256 if args.vit else SIZE
    scorers = open_scorers(
        ScorerSettings(device="cpu", world=None if not args.vit else False, batch_size=args.batch_size)
    )
    if args.vit:
        scorers = replace(scorers, clip=vit(scorers.clip))
    plain = replace(scorers, judge=None)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a clip without moving points says so
        files, prompts = write_clips(Path(folder), args.clips, size)
        videos = [read_whole(file)[0] for file in files]
        pixels = preprocess(torch.cat(videos), scorers.clip.numbers)
        reference, photos = videos[0], videos[0][:4]

        @torch.no_grad()
        def forward() -> list[Tensor]:
            model = scorers.clip.model
            parts = pixels.split(args.batch_size)
            return [
                F.normalize(model.visual_projection(model.vision_model(part).pooler_output), dim=-1) for part in parts
            ]

        def scored(with_: Scorers, *more: Tensor) -> list[dict[str, float]]:
            return score_clips(with_, [read_whole(file)[0] for file in files], prompts, *more)

        parts: dict[str, Callable[[], object]] = {
            "CLIP's forward pass": forward,
            "reading the files": lambda: [read_whole(file) for file in files],
            "CLIP's images": lambda: preprocess(torch.cat(videos), scorers.clip.numbers),
            "CLIP scores, from files": lambda: scored(plain, photos),
            "... and motion fidelity": lambda: scored(plain, photos, reference),
            "... and the rendered world's": lambda: scored(scorers, photos, reference),
        }
        if scorers.judge is None:
            del parts["... and the rendered world's"]
        measured = {name: seconds(work, args.runs) for name, work in parts.items()}
    print(
        f"{args.clips} clips of 16 frames of {size}x{size}, {scorers.clip.name}, CPU, {torch.get_num_threads()} threads"
    )
    for name, taken in measured.items():
        print(f"  {name:<34}{taken:9.3f} s {taken / measured[next(iter(parts))]:7.2f} x")


if __name__ == "__main__":
    main()
