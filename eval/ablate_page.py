"""What a grid of ablations found: tables, plots, contact sheets, and a report with all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval.grid import GridSettings
from eval.measures import crossed_interval
from eval.plots import bars
from eval.report import Heading, Part, Picture, Table, markdown_table, text_table, write_page
from weights import atomic_write, write_json

if TYPE_CHECKING:
    from eval.ablate import Result

# Columns of the tables, where there are such scores; results.json has all of them.
COLUMNS = (
    *("clip_t", "clip_i", "temporal_consistency", "motion_fidelity", "chance"),
    *("identity", "path_error", "leak", "frame_distance", "diversity"),
)
PLOTTED = ("clip_t", "clip_i", "temporal_consistency", "motion_fidelity", "identity", "path_error")


def write_results(
    settings: GridSettings, results: Sequence["Result"], titles: Mapping[str, str], sheets: Sequence[Picture]
) -> Path:
    """Write `results.json`, `tables.md`, a plot and `report.html`, and print the tables.

    Args:
        settings: of the grid.
        results: of all its cells.
        titles: what each score is, model and protocol included.
        sheets: frames of the groups.

    Returns:
        The report.
    """
    folder = Path(settings.out)
    cells = [
        {**where(its), "scores": its.scores, "seconds": its.seconds, "parameters": its.parameters, "moved": its.moved}
        for its in results
    ]
    write_json(folder / "results.json", {"settings": asdict(settings), "titles": dict(titles), "cells": cells})
    arms, compared, moved = arms_table(settings, results), compared_table(settings, results), moved_table(results)
    leak = "leak: share of the attributes that could leak from the reference clip and did"
    legend = [f"{name}: {titles[name]}" if name in titles else leak for name in score_names(results)]
    tables = [arms, *([compared] if compared.rows else []), *([moved] if moved.rows else [])]
    for table in tables:
        print(f"\n{text_table(table)}")
    with atomic_write(folder / "tables.md") as temporary:
        text = "\n\n".join([*map(markdown_table, tables), "\n".join(f"* {line}" for line in legend)])
        temporary.write_text(text + "\n", encoding="utf-8")

    plot = folder / "arms.png"
    scores = [name for name in PLOTTED if name in score_names(results)]
    heights = {
        name: [(its_mean(picked), *(interval(picked) or (None, None))) for picked in by_arm(settings, results, name)]
        for name in scores
    }
    bars(plot, "means of the arms; lines are 95 % intervals over groups", heights, list(settings.arms))
    groups, seeds = len(settings.groups), len(settings.seeds)
    moves: list[Part] = [Heading("How far test-time training went"), moved] if moved.rows else []
    parts: list[Part] = [
        f"{groups} groups, {len(settings.prompts)} prompts each, {seeds} seeds, {settings.clips} clips a cell. Means "
        "over all; ± is the standard deviation of the seeds' means.",
        arms,
        *legend,
        Heading("Paired differences"),
        "Of cells with the same group, prompt and seed; in brackets 95 % intervals by a bootstrap over groups, which "
        f"are rough where groups are few ({groups} here).",
        compared,
        *moves,
        Picture(plot, "Means of the arms"),
        *sheets,
        "Settings: " + ", ".join(f"{name} {value}" for name, value in asdict(settings).items()),
    ]
    write_page(folder / "report.html", "Ablations", parts)
    return folder / "report.html"


def where(its: "Result") -> dict[str, Any]:
    """What tells a cell from the others."""
    return {"arm": its.cell.arm, "group": its.cell.group, "prompt": its.cell.prompt, "seed": its.cell.seed}


def score_names(results: Sequence["Result"]) -> list[str]:
    """The columns that at least one cell has a score for."""
    return [name for name in COLUMNS if any(name in its.scores for its in results)]


def by_arm(settings: GridSettings, results: Sequence["Result"], score: str) -> list[dict[tuple[str, int, int], float]]:
    """For each arm the score by group, prompt and seed, where it has one."""
    return [
        {
            (its.cell.group, its.cell.prompt, its.cell.seed): its.scores[score]
            for its in results
            if its.cell.arm == arm and score in its.scores
        }
        for arm in settings.arms
    ]


def its_mean(values: Mapping[tuple[str, int, int], float]) -> float:
    """Over all cells; NaN where there are none."""
    return torch.tensor(list(values.values()), dtype=torch.float64).mean().item()


def spread_over_seeds(values: Mapping[tuple[str, int, int], float]) -> float | None:
    """Standard deviation of the seeds' means; None for one seed."""
    seeds = sorted({seed for _, _, seed in values})
    means = [its_mean({key: value for key, value in values.items() if key[2] == seed}) for seed in seeds]
    return torch.tensor(means).std().item() if len(means) > 1 else None


def interval(values: Mapping[tuple[str, int, int], float]) -> tuple[float, float] | None:
    """95 % by a bootstrap over groups, whose cells stay together; over cells where there is but one group."""
    clusters = [group for group, _, _ in values]
    if len(set(clusters)) == 1:
        clusters = [str(key) for key in values]
    if len(set(clusters)) < 2:
        return None
    numbers = [sorted(set(clusters)).index(cluster) for cluster in clusters]
    return crossed_interval(torch.tensor(list(values.values())), numbers, [0] * len(numbers))


def arms_table(settings: GridSettings, results: Sequence["Result"]) -> Table:
    """A row for each arm, and below it what the paper prints for it."""
    scores = score_names(results)
    columns = [by_arm(settings, results, score) for score in scores]
    rows = []
    for number, arm in enumerate(settings.arms):
        its = [result for result in results if result.cell.arm == arm]
        cells = [with_spread(column[number]) for column in columns]
        took = sum(result.seconds for result in its) / len(its)
        rows.append([arm, *cells, f"{took:.0f}", f"{its[0].parameters:,}"])
        if arm in settings.paper:
            printed = settings.paper[arm]
            rows.append(["  the paper's", *(str(printed.get(score, "-")) for score in scores), "-", "-"])
    return Table(["arm", *scores, "seconds", "parameters"], rows)


def with_spread(values: Mapping[tuple[str, int, int], float]) -> str:
    """ "0.512 ± 0.010", or less of it."""
    if not values:
        return "-"
    spread_ = spread_over_seeds(values)
    return f"{its_mean(values):.3f}" + ("" if spread_ is None else f" ± {spread_:.3f}")


def compared_table(settings: GridSettings, results: Sequence["Result"]) -> Table:
    """A row for each difference that was asked for, over the cells that both arms have."""
    scores = score_names(results)
    rows = []
    for line in settings.compare:
        after, before = (list(settings.arms).index(arm) for arm in line.split(" - "))
        cells = []
        for score in scores:
            values = by_arm(settings, results, score)
            shared = values[after].keys() & values[before].keys()
            pairs = {key: values[after][key] - values[before][key] for key in values[after] if key in shared}
            ends = interval(pairs) if pairs else None
            bracket = "" if ends is None else " [{:+.3f}, {:+.3f}]".format(*ends)
            cells.append(f"{its_mean(pairs):+.3f}{bracket}" if pairs else "-")
        rows.append([line, *cells])
    return Table(["difference", *scores], rows)


def moved_table(results: Sequence["Result"]) -> Table:
    """Means over the cells of each arm with test-time training, of what its reports say."""
    arms: dict[str, list[dict[str, float]]] = {}
    for its in results:
        if its.moved:
            flat = {f"{part}: {name}": value for part, said in its.moved.items() for name, value in said.items()}
            arms.setdefault(its.cell.arm, []).append(flat)
    if not arms:
        return Table([], [])
    names = list(next(iter(arms.values()))[0])
    rows = [
        [arm, *(f"{sum(report[name] for report in reports) / len(reports):.2g}" for name in names)]
        for arm, reports in arms.items()
    ]
    return Table(["arm", *names], rows)
