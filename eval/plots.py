"""Pictures with axes and labels, by matplotlib (`pip install -e ".[eval]"`)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model import UserError
from weights import atomic_write


def bars(
    file: Path,
    title: str,
    groups: Mapping[str, Sequence[tuple[float, float | None, float | None]]],
    labels: Sequence[str],
    marked: Sequence[str] = (),
) -> None:
    """Bars side by side with their intervals.

    Args:
        file: a .png.
        title: above it.
        groups: a panel each, one below the other: for each label the mean and the ends of its interval, or None.
        labels: below the bars.
        marked: labels whose bars have another colour.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure, panels = _pyplot().subplots(
        len(groups),
        1,
        figsize=(max(6, 0.62 * len(labels) + 1), 2.2 * len(groups) + 0.6),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=11)
    short = max(map(len, labels)) < 8
    for panel, (name, heights) in zip(panels[:, 0], groups.items(), strict=True):
        colours = ["#c2410c" if label in marked else "#64748b" for label in labels]
        panel.bar(range(len(labels)), [mean for mean, _, _ in heights], color=colours)
        for i, (_, low, high) in enumerate(heights):
            if low is not None and high is not None:
                panel.plot([i, i], [low, high], color="black", linewidth=1.2)
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_xticks(
            range(len(labels)),
            labels,
            fontsize=8,
            rotation=0 if short else 60,
            ha="center" if short else "right",
            rotation_mode="anchor",
        )
        panel.spines[["top", "right"]].set_visible(False)
        seen = [value for triple in heights for value in triple if value is not None and math.isfinite(value)] or [0.0]
        room = 0.15 * (max(seen) - min(seen)) or 0.1
        # CLIP's scores lie close together, far from 0: the axis shows where they differ
        panel.set_ylim(min(seen) - room, max(seen) + room)
    _save(figure, file)


def strips(file: Path, title: str, rows: Mapping[str, Path], marked: Sequence[str] = ()) -> None:
    """Strips of frames, one below the other, each with its label on the left.

    Args:
        file: a .png.
        title: above it.
        rows: by label the picture of a strip; all of one size.
        marked: labels that are set in bold.

    Raises:
        UserError: matplotlib is not installed.
    """
    plot = _pyplot()
    pictures = {label: plot.imread(path) for label, path in rows.items()}
    height, width = next(iter(pictures.values())).shape[:2]
    tall = 1.04 * 8 * height / width * len(rows)
    figure, panels = plot.subplots(len(rows), 1, figsize=(8, tall), squeeze=False)
    for panel, (label, picture) in zip(panels[:, 0], pictures.items(), strict=True):
        panel.imshow(picture, interpolation="nearest")
        panel.set_xticks([])
        panel.set_yticks([])
        bold = "bold" if label in marked else "normal"
        panel.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, fontweight=bold)
    panels[0, 0].set_title(title, fontsize=11)
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0, hspace=0.04)
    _save(figure, file)


def check_plots() -> None:
    """Raises UserError where matplotlib is not installed."""
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError('plots need matplotlib: pip install -e ".[eval]"') from error
    matplotlib.use("agg")
    matplotlib.rcParams["text.parse_math"] = False  # a prompt may hold a $
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, file: Path) -> None:
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    _pyplot().close(figure)
