"""From scores of prompt influence to the layers that are worth training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eval.measures import crossed_interval, mean
from model import UNet3D

Scores = dict[str, dict[str, list[float]]]  # by row ("none", "6", "6+2", "all") and score, a number for each pair


def ranked_by(kind: str, scores: Scores) -> str:
    """The score that decides: CLIP-T as in the paper; for motions of the rendered world the judge's reading of paths.

    A CLIP sees single frames, and so no motion.
    """
    return "judge" if kind == "motion" and "judge" in scores["none"] else "clip_t"


def best_row(scores: Scores, rows: Sequence[str], score: str) -> list[str]:
    """The rows from the best to the worst; the earlier of two equal ones first."""
    return sorted(rows, key=lambda row: -mean(scores[row][score]))


@dataclass(frozen=True)
class Recommendation:
    """Layers to train, and how sure that is.

    Args:
        layers: as `--layers` takes them.
        row: whose score is the best, such as "6+2".
        following: the row behind it.
        score: by which.
        margin: mean over the pairs of prompts of the best minus the following.
        interval: of the margin, 95 %, by bootstrap over the pairs; None for a single pair.
    """

    layers: list[int]
    row: str
    following: str
    score: str
    margin: float
    interval: tuple[float, float] | None


def recommend(kind: str, scores: Scores, unet: UNet3D) -> Recommendation:
    """The two layers whose text tells the most, of the pairs of layers that were measured.

    For motions, a layer without motion modules hands over to the one behind it: the paper's best two are 2 and 4, and
    since 4 has none, its motion LoRAs sit on 2 and 5.
    """
    score = ranked_by(kind, scores)
    best, following, *_ = best_row(scores, [row for row in scores if "+" in row], score)
    layers = {int(layer) for layer in best.split("+")}
    if kind == "motion":
        layers = {layer if len(unet.layers[layer].temporal) else layer + 1 for layer in layers}
    values = torch.tensor([scores[best][score], scores[following][score]], dtype=torch.float64)
    margins = values[0] - values[1]
    interval = crossed_interval(margins, range(len(margins)), [0] * len(margins))
    return Recommendation(sorted(layers), best, following, score, margins.mean().item(), interval)
