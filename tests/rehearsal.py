"""Everything to try the program on without any checkpoint: a narrow random base, pictures, a clip, and a run file.

    python tests/rehearsal.py rehearsal
    customttt run --config rehearsal/run.yaml

A random network paints noise: what this shows is the commands and their files, not their results.
"""

import sys
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # in this order: tests/sampling must not stand in for sampling/

from bases import write_base, write_motion_module, write_tokenizer  # noqa: E402

from sampling import write_media  # noqa: E402

SIZE = 64


def disc(x: float, y: float) -> torch.Tensor:
    """A picture (3, 64, 64) in [-1, 1] of an orange disc at (x, y) on a blue ground."""
    grid = torch.linspace(0, 1, SIZE)
    inside = ((grid[None] - x) ** 2 + (grid[:, None] - y) ** 2 < 0.04)[None]
    orange, blue = (torch.tensor(c)[:, None, None] for c in ((0.9, 0.2, -0.8), (-0.7, -0.4, 0.6)))
    return torch.where(inside, orange, blue)


def main(folder: Path) -> None:
    """Write all of it into `folder`."""
    for i, place in enumerate([(0.3, 0.4), (0.5, 0.5), (0.7, 0.6)]):
        write_media(folder / "photos" / f"{i}.png", disc(*place)[None])
    write_media(folder / "clip.mp4", torch.stack([disc(0.2 + 0.08 * i, 0.5) for i in range(8)]), fps=8)
    table = {
        "base": str(write_base(folder, "ldm")),
        "motion_module": str(write_motion_module(folder / "v3_sd15_mm.ckpt")),
        "tokenizer": str(write_tokenizer(folder / "tokenizer", vocab_size=1024)),
        "out": str(folder / "run"),
        "height": SIZE,
        "width": SIZE,
        "num_frames": 8,
        "appearance": {"images": str(folder / "photos"), "prompt": "a red ball", "steps": 20},
        "motion": {"video": str(folder / "clip.mp4"), "prompt": "a circle is moving right", "steps": 20},
        "ttt": {"prompt": "a red ball is moving right", "steps": 5},
        "generate": {"seed": [1, 2]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    print(f"now: customttt run --config {folder / 'run.yaml'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "rehearsal"))
