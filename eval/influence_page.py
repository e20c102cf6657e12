"""What prompt influence found, as tables, plots and a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.measures import crossed_interval, mean
from eval.plots import bars, strips
from eval.recommend import Recommendation
from eval.report import Heading, Part, Picture, Table, markdown_table, markdown_text, text_table, write_page
from weights import atomic_write

# Supplement, Table 2: CLIP-T over 100 pairs with p* in layer 0 to 8, on SD 1.5 with AnimateDiff.
PAPER = {
    "subject": (0.109, 0.109, 0.153, 0.109, 0.112, 0.109, 0.200, 0.108, 0.108),
    "motion": (0.232, 0.231, 0.239, 0.231, 0.237, 0.231, 0.234, 0.231, 0.232),
}
TRAINED = {"subject": "appearance", "motion": "motion"}  # the LoRA that the layers are for


@dataclass(frozen=True)
class Result:
    """What was found for one kind of pairs.

    Args:
        kind: subject or motion.
        record: what is in its file: settings, steps, scores.
        pairs: (p, p*).
        advice: which layers.
    """

    kind: str
    record: dict[str, Any]
    pairs: Sequence[tuple[str, str]]
    advice: Recommendation

    @property
    def titles(self) -> dict[str, str]:
        """What each score is, model and protocol included."""
        its = "paths, by the judge" if self.kind == "motion" else "shape, colour, texture, by the judge"
        said = {"clip_t": f"CLIP-T to p*, {self.record['clip']}", "judge": f"share of p* seen ({its})"}
        return {score: said[score] for score in self.record["scores"]["none"]}


def results_table(result: Result) -> Table:
    """A row for each choice of layers: mean scores with their 95 % intervals, and the paper's CLIP-T."""
    scores, rows = result.record["scores"], []
    for row, found in scores.items():
        paper = f"{PAPER[result.kind][int(row)]:.3f}" if row.isdigit() else "-"
        rows.append([f"p* in {row}", *(_with_interval(found[score]) for score in result.titles), paper])
    return Table([f"{result.kind}s", *result.titles.values(), "paper, CLIP-T"], rows)


def advice_line(result: Result) -> str:
    """The recommendation in a line: "appearance: --layers 2 6 (...)"."""
    its = result.advice
    how = "no interval: one pair" if its.interval is None else f"95 % [{its.interval[0]:+.3f}, {its.interval[1]:+.3f}]"
    moved = "" if set(its.row.split("+")) == set(map(str, its.layers)) else ", layer 4 having no motion module"
    return (
        f"{TRAINED[result.kind]}: --layers {' '.join(map(str, its.layers))}   (p* in {its.row} is best by "
        f"{result.titles[its.score]}{moved}; the next, {its.following}, is {its.margin:.3f} below, {how})"
    )


def influence_table(results: Sequence[Result]) -> str:
    """All of it for the terminal."""
    tables = "\n\n".join(text_table(results_table(result)) for result in results)
    return f"{tables}\n\n" + "\n".join(map(advice_line, results))


def write_report(folder: Path, results: Sequence[Result]) -> Path:
    """Write `tables.md`, the plots `<kind>s.png`, the figures `<kind>s-frames.png`, and `report.html` with all of it.

    Raises:
        UserError: matplotlib is not installed, or the system refuses.
    """
    with atomic_write(folder / "tables.md") as temporary:
        tables = [markdown_table(results_table(result)) for result in results]
        temporary.write_text(
            "\n\n".join([*tables, *(markdown_text(advice_line(result)) for result in results)]) + "\n", encoding="utf-8"
        )
    parts: list[Part] = []
    for result in results:
        scores, name = result.record["scores"], f"{result.kind}s"
        best = [result.advice.row, *result.advice.row.split("+")]
        heights = {
            title: [(mean(found[score]), *(_interval(found[score]) or (None, None))) for found in scores.values()]
            for score, title in result.titles.items()
        }
        count, steps, settings = len(result.pairs), result.record["steps"], result.record["settings"]
        title = f"{name}: {count} pairs, {steps} steps; the bars' lines are 95 % intervals"
        bars(folder / f"{name}.png", title, heights, list(scores), best)
        files = {row: folder / "frames" / f"{result.kind}-{row}.png" for row in scores}
        strips(folder / f"{name}-frames.png", f"{name}: p* in layer ...", files, best)
        prompts = [f"{number}. {prompt} -> {other}" for number, (prompt, other) in enumerate(result.pairs[:8], start=1)]
        frames = "8 pairs, a frame each" if result.kind == "subject" else "2 pairs, 4 frames each"
        parts += [
            Heading(f"{name}: {advice_line(result)}"),
            results_table(result),
            Picture(folder / f"{name}.png", title),
            Picture(folder / f"{name}-frames.png", f"The same noise in every row, from left to right {frames}."),
            "Pairs p -> p*: " + "; ".join(prompts),
            f"Settings: {', '.join(f'{key} {value}' for key, value in settings.items())}; steps {steps}.",
        ]
    write_page(folder / "report.html", "Prompt influence: which layers' text decides", parts)
    return folder / "report.html"


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    return crossed_interval(torch.tensor(values), range(len(values)), [0] * len(values))


def _with_interval(values: Sequence[float]) -> str:
    interval = _interval(values)
    return f"{mean(values):.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
