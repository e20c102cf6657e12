"""What a grid of ablations found: tables, plots, contact sheets, and a report with all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval.grid_settings import GridSettings, parts_of
from eval.measures import crossed_interval
from eval.plots import bars
from eval.report import Heading, Part, Picture, Table, markdown_table, markdown_text, text_table, write_page
from eval.scorers import TITLES
from weights import atomic_write, write_json

if TYPE_CHECKING:
    from eval.ablate import Result

# Columns of the tables, where there are such scores; results.json has all of them.
COLUMNS = (
    *("clip_t", "clip_i", "temporal_consistency", "motion_fidelity", "chance"),
    *("identity", "path_error", "leak", "frame_distance", "diversity"),
)
PLOTTED = ("clip_t", "clip_i", "temporal_consistency", "motion_fidelity", "identity", "path_error")


def all_tables(settings: GridSettings, results: Sequence["Result"]) -> dict[str, Table]:
    """The tables that have rows: of the arms, their differences, what leaked, and how far test-time training went."""
    tables = {"arms": arms_table(settings, results), "compared": compared_table(settings, results)}
    tables |= {"leaks": leaks_table(settings, results), "moved": moved_table(results)}
    return {name: table for name, table in tables.items() if table.rows}


def legend(results: Sequence["Result"], titles: Mapping[str, str]) -> list[str]:
    """How each column was taken, in a line."""
    leak = "leak: share of the attributes that could leak from the reference clip and did"
    return [f"{name}: {titles[name]}" if name in titles else leak for name in score_names(results)]


def write_tables(settings: GridSettings, results: Sequence["Result"], titles: Mapping[str, str]) -> None:
    """Write `results.json` and `tables.md`, and print the tables.

    Args:
        settings: of the grid.
        results: of all its cells.
        titles: what each score is, model and protocol included.
    """
    folder = Path(settings.out)
    cells = [
        {**where(its), "scores": its.scores, "seconds": its.seconds, "parameters": its.parameters, "moved": its.moved}
        for its in results
    ]
    write_json(folder / "results.json", {"settings": asdict(settings), "titles": dict(titles), "cells": cells})
    tables = all_tables(settings, results).values()
    for table in tables:
        print(f"\n{text_table(table)}")
    notes = "\n".join(f"* {markdown_text(line)}" for line in [*legend(results, titles), how(settings)])
    with atomic_write(folder / "tables.md") as temporary:
        temporary.write_text("\n\n".join([*map(markdown_table, tables), notes]) + "\n", encoding="utf-8")


def how(settings: GridSettings) -> str:
    """How means, spread and intervals were taken."""
    groups, prompts, seeds = len(settings.groups), len(settings.prompts), len(settings.seeds)
    drawn = "subjects and motions" if any("+" in group for group in settings.groups) else "motions"
    drawn = drawn if groups > 1 else "cells, there being one group"
    return (
        f"{groups} groups, {prompts} prompts each, {seeds} seeds, {settings.clips} clips a cell. Means over all cells "
        "that have a score (n where not all do); ± is the standard deviation of the seeds' means. Differences are of "
        "cells with the same group, prompt and seed; in brackets 95 % intervals by a bootstrap that draws "
        f"{drawn}, rough where these are few."
    )


def write_report(
    settings: GridSettings, results: Sequence["Result"], titles: Mapping[str, str], sheets: Sequence[Picture]
) -> Path:
    """Write a plot of the arms and `report.html`, with all tables, the contact sheets and the settings in it.

    Args:
        settings: of the grid.
        results: of all its cells.
        titles: as for `write_tables`.
        sheets: frames of the groups.

    Returns:
        The report.
    """
    folder, tables = Path(settings.out), all_tables(settings, results)
    scores = [name for name in PLOTTED if name in score_names(results)]
    heights = {
        name: [(its_mean(picked), *(interval(picked) or (None, None))) for picked in by_arm(settings, results, name)]
        for name in scores
    }
    bars(folder / "arms.png", "means of the arms, with 95 % intervals", heights, list(settings.arms))
    heads = {
        "compared": "Paired differences",
        "leaks": "What leaked from the reference clip",
        "moved": "How far test-time training went",
    }
    parts: list[Part] = [how(settings)]
    for name, table in tables.items():
        parts += [Heading(heads[name]), table] if name in heads else [table, *legend(results, titles)]
    parts += [Picture(folder / "arms.png", "Means of the arms"), *sheets]
    parts.append("Settings: " + ", ".join(f"{name} {value}" for name, value in asdict(settings).items()))
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
    """95 % by a bootstrap that draws subjects and motions, in which groups may share them; a group's cells stay
    together. Over cells where there is but one group; None for one cell.
    """
    if len(values) < 2:
        return None
    keys = list(values)
    parts = [parts_of(group) for group, _, _ in keys]
    who, what = [part[0] or part[1] for part in parts], [part[1] for part in parts]
    if len({*zip(who, what, strict=True)}) == 1:
        who, what = [str(key) for key in keys], [""] * len(keys)
    numbers = [[sorted(set(names)).index(name) for name in names] for names in (who, what)]
    if tied(numbers[0], numbers[1]):
        numbers[1] = [0] * len(keys)
    return crossed_interval(torch.tensor(list(values.values())), numbers[0], numbers[1])


def tied(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether each subject goes with one motion and each motion with one subject: then a group is one draw, not two."""
    pairs = set(zip(first, second, strict=True))
    return len(pairs) == len(set(first)) == len(set(second))


def arms_table(settings: GridSettings, results: Sequence["Result"]) -> Table:
    """A row for each arm, and below it what the paper prints for it."""
    scores = score_names(results)
    columns = [by_arm(settings, results, score) for score in scores]
    rows = []
    for number, arm in enumerate(settings.arms):
        its = [result for result in results if result.cell.arm == arm]
        cells = [with_spread(column[number], len(its)) for column in columns]
        took = sum(result.seconds for result in its) / len(its)
        rows.append([arm, *cells, f"{took:.0f}", f"{its[0].parameters:,}"])
        if arm in settings.paper:
            printed = settings.paper[arm]
            rows.append(["  the paper's", *(str(printed.get(score, "-")) for score in scores), "-", "-"])
    return Table(["arm", *scores, "seconds", "parameters"], rows)


def with_spread(values: Mapping[tuple[str, int, int], float], cells: int) -> str:
    """ "0.512 ± 0.010", or less of it; with the number of cells that have the score where that is not all of them."""
    if not values:
        return "-"
    spread = spread_over_seeds(values)
    return f"{its_mean(values):.3f}" + ("" if spread is None else f" ± {spread:.3f}") + fewer(values, cells)


def fewer(values: Mapping[tuple[str, int, int], float], cells: int) -> str:
    """ " (n = 3)" where not all cells have a value."""
    return f" (n = {len(values)})" if len(values) < cells else ""


def compared_table(settings: GridSettings, results: Sequence["Result"]) -> Table:
    """A row for each difference that was asked for, over the cells that both arms have."""
    scores = [name for name in score_names(results) if name != "chance"]
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
            count = sum(its.cell.arm == list(settings.arms)[after] for its in results)
            cells.append(f"{its_mean(pairs):+.3f}{bracket}{fewer(pairs, count)}" if pairs else "-")
        rows.append([line, *cells])
    return Table(["difference", *scores], rows)


def leaks_table(settings: GridSettings, results: Sequence["Result"]) -> Table:
    """A row for each arm: how often each attribute of the reference clip showed where the prompt asks for another."""
    names = [name for name in TITLES if name.startswith("leak_") and any(name in its.scores for its in results)]
    if not names:
        return Table([], [])
    columns = [by_arm(settings, results, name) for name in names]
    counts = [sum(its.cell.arm == arm for its in results) for arm in settings.arms]
    rows = [[arm, *(with_spread(column[i], counts[i]) for column in columns)] for i, arm in enumerate(settings.arms)]
    return Table(["arm", *names], rows)


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
