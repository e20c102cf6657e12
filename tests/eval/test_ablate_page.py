"""How arms are compared: means, spread and intervals against loops and another bootstrap."""

from pathlib import Path

import numpy as np
from grids import settings_for

from eval.ablate import Result
from eval.ablate_page import arms_table, compared_table, interval, write_report, write_tables
from eval.grid import Cell


def result(arm, group, seed, **scores):
    cell = Cell(arm, group, 0, seed, {}, None, Path("."), Path("."), {})  # type: ignore[arg-type]
    return Result(cell, scores, 10.0, 1000, {})


def test_means_spread_and_differences_are_those_of_a_loop(tmp_path, material):
    rng = np.random.default_rng(0)
    groups, seeds = ["toy+roll", "toy+jump", "cup+roll"], [0, 1, 2]
    table = {(arm, g, s): rng.normal() for arm in ("both", "base") for g in groups for s in seeds}
    results = [result(arm, group, seed, clip_t=value) for (arm, group, seed), value in table.items()]
    settings = settings_for(
        tmp_path,
        material,
        groups=groups,
        seeds=seeds,
        arms={"both": {}, "base": {}},
        compare=["both - base"],
        paper={"both": {"clip_t": "0.295"}},
    )
    rows = arms_table(settings, results).rows
    for row, arm in ((rows[0], "both"), (rows[2], "base")):
        means = [np.mean([table[arm, group, seed] for group in groups]) for seed in seeds]
        assert row == [arm, f"{np.mean(means):.3f} ± {np.std(means, ddof=1):.3f}", "10", "1,000"]
    assert rows[1] == ["  the paper's", "0.295", "-", "-"]
    differences = {(g, s): table["both", g, s] - table["base", g, s] for g in groups for s in seeds}
    [[line, cell]] = compared_table(settings, results).rows
    assert line == "both - base"
    assert cell.startswith(f"{np.mean(list(differences.values())):+.3f} [")
    # the interval by another bootstrap over whole groups
    by_group = np.array([[differences[g, s] for s in seeds] for g in groups])
    drawn = [by_group[rng.integers(3, size=3)].mean() for _ in range(20000)]
    low, high = (float(end) for end in cell.partition(" ")[2].strip("[]").split(", "))
    np.testing.assert_allclose([low, high], np.quantile(drawn, [0.025, 0.975]), atol=0.05)


def test_a_single_group_has_an_interval_over_its_cells_and_a_single_cell_none():
    assert interval({("a+b", 0, 0): 1.0}) is None
    assert interval({("a+b", 0, 0): 1.0, ("a+b", 0, 1): 3.0}) == (1.0, 3.0)


def test_groups_that_share_subjects_are_not_counted_as_independent():
    rng = np.random.default_rng(0)
    subjects, motions = rng.normal(size=5), rng.normal(size=5)
    crossed = {(f"s{i}+m{j}", 0, 0): subjects[i] + motions[j] for i in range(5) for j in range(5)}
    apart = {(f"s{i}{j}+m{i}{j}", 0, 0): subjects[i] + motions[j] for i in range(5) for j in range(5)}
    wide, narrow = ((lambda ends: ends[1] - ends[0])(interval(values)) for values in (crossed, apart))
    # 25 independent groups have a standard error a good two times smaller than 5 subjects and 5 motions
    assert wide > 1.6 * narrow


def test_a_cell_without_a_score_is_counted_out_in_the_open(tmp_path, material):
    results = [result("a", "toy+roll", 0, clip_t=1.0, motion_fidelity=0.5), result("a", "toy+roll", 1, clip_t=2.0)]
    results += [result("b", "toy+roll", seed, clip_t=0.0) for seed in (0, 1)]
    settings = settings_for(tmp_path, material, arms={"a": {}, "b": {}}, compare=["a - b"])
    rows = arms_table(settings, results).rows
    assert rows[0][:3] == ["a", "1.500 ± 0.707", "0.500 (n = 1)"]
    assert rows[1][2] == "-"
    assert compared_table(settings, results).rows[0][1:] == ["+1.500 [+1.000, +2.000]", "-"]
    write_tables(settings, results, {})
    report = write_report(settings, results, {}, [])
    assert "(n = 1)" in report.read_text()
