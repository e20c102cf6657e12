"""What a demonstration shows: one HTML page, one picture of sample frames, one table for the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from sampling import contact_sheet

COLUMNS = 8  # frames of a clip in the contact sheet
VISIBLE = 128  # pixels: smaller frames are enlarged by a whole number up to this height


@dataclass(frozen=True)
class Score:
    """What a number says.

    Args:
        title: as a column's head.
        about: how to read it, as a sentence.
        still: what a subject scores that does not move; None where that says nothing.
    """

    title: str
    about: str
    still: float | None = None

    @property
    def explained(self) -> str:
        """Title and how to read it, in a line."""
        still = "" if self.still is None else f"; standing still scores {_number(self.still)}"
        return f"{self.title}: {self.about}{still}"


@dataclass(frozen=True)
class Clip:
    """A generated clip: its file, relative to the page, its seed, and its numbers by the name of their score."""

    file: str
    seed: int
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Clips of one kind."""

    title: str
    about: str
    clips: Sequence[Clip]

    def mean(self, score: str) -> float:
        """Of a score over the clips; NaN where none has it."""
        numbers = [clip.scores[score] for clip in self.clips if score in clip.scores]
        return sum(numbers) / len(numbers) if numbers else math.nan


@dataclass(frozen=True)
class Step:
    """A step of the run: its seconds and the settings that it was made with."""

    title: str
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """All that the page says; files are relative to it.

    Args:
        base: the base model's name.
        subject: prompt of the photos.
        motion: prompt of the reference clip.
        prompt: of what was generated.
        photos: picture files.
        reference: the reference clip's file.
        sheet: the contact sheet's file.
        rows: what was generated.
        steps: of the run, in order.
        legend: the scores that were taken, by name.
    """

    base: str
    subject: str
    motion: str
    prompt: str
    photos: Sequence[str]
    reference: str
    sheet: str
    rows: Sequence[Row]
    steps: Sequence[Step]
    legend: Mapping[str, Score] = field(default_factory=dict)


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
img, video { width: 160px; image-rendering: pixelated; display: block; border-radius: 4px; }
.line { display: flex; flex-wrap: wrap; gap: .75rem; }
figure { margin: 0; }
figcaption { font-size: .8rem; width: 160px; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884; }
q { font-style: italic; }
""".strip()


def demo_page(page: Page) -> str:
    """The page as HTML: style and text within it, pictures and clips beside it. Every text and file name is escaped."""
    inputs = [
        f"<h2>What went in</h2>\n<h3>Photos: <q>{escape(page.subject)}</q></h3>",
        _line(f'<img src="{_url(photo)}" alt="photo">' for photo in page.photos),
        f"<h3>Reference clip: <q>{escape(page.motion)}</q></h3>",
        _line([_video(page.reference)]),
    ]
    results = [f"<h2>What came out: <q>{escape(page.prompt)}</q></h2>"]
    for row in page.rows:
        results.append(f"<h3>{escape(row.title)}</h3>\n<p>{escape(row.about)}</p>")
        results.append(_line(_figure(clip, page.legend) for clip in row.clips))
    body = [
        "<h1>A subject from photos, a motion from a clip, both in one video</h1>",
        f"<p>Base model: {escape(page.base)}. All frames in one picture: "
        f'<a href="{_url(page.sheet)}">{escape(page.sheet)}</a>.</p>',
        *inputs,
        *results,
        *_scores(page),
        "<h2>How it was made</h2>",
        table(
            ("step", "seconds", "settings"), [(s.title, f"{s.seconds:.0f}", _listed(s.settings)) for s in page.steps]
        ),
    ]
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.prompt)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(body) + "\n</body>\n</html>\n"


def demo_sheet(photos: Sequence[Tensor], reference: Tensor, clips: Sequence[Tensor]) -> Tensor:
    """Photos in the first row, frames of the reference clip in the second, then a row for each generated clip.

    Args:
        photos: each (3, h, w) in [-1, 1]; the first 8 are shown.
        reference: (f, 3, h, w); 8 frames spread over it are shown, and of the clips likewise.
        clips: each (f, 3, h, w).

    Returns:
        (3, H, W) in [-1, 1]: rows of 8, white where there are fewer, small frames enlarged by whole pixels.
    """
    rows = []
    for frames in (torch.stack(list(photos)[:COLUMNS]), *(spread(clip) for clip in (reference, *clips))):
        blank = frames.new_ones(COLUMNS - len(frames), *frames.shape[1:])
        rows += [frames, blank]
    frames = torch.cat(rows)
    factor = max(1, VISIBLE // frames.shape[-2])
    return contact_sheet(frames.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1), columns=COLUMNS)


def spread(clip: Tensor, count: int = COLUMNS) -> Tensor:
    """At most `count` frames of a clip (f, ...), from its first to its last."""
    chosen = torch.linspace(0, len(clip) - 1, min(count, len(clip))).round().long()
    return clip[chosen]


def score_table(page: Page) -> str:
    """Each kind's mean scores in columns, and how to read them; empty where nothing was scored."""
    if not page.legend:
        return ""
    rows = [("", *(score.title for score in page.legend.values())), *_means(page)]
    wide = max(len(row[0]) for row in rows) + 2
    lines = [f"{row[0]:<{wide}}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows]
    return "\n".join([*lines, *(score.explained for score in page.legend.values())])


def _means(page: Page) -> list[tuple[str, ...]]:
    """Each kind's title and mean scores, then what standing still scores where that is known."""
    rows = [(row.title, *(_number(row.mean(name)) for name in page.legend)) for row in page.rows]
    if any(score.still is not None for score in page.legend.values()):
        still = (math.nan if score.still is None else score.still for score in page.legend.values())
        rows.append(("a subject that stands still", *map(_number, still)))
    return rows


def _scores(page: Page) -> list[str]:
    if not page.legend:
        return []
    about = [f"<li>{escape(score.explained)}</li>" for score in page.legend.values()]
    return [
        "<h2>Scores, the mean over clips</h2>",
        table(("", *(score.title for score in page.legend.values())), _means(page)),
        f"<ul>\n{chr(10).join(about)}\n</ul>",
    ]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in HTML; every cell is escaped."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _figure(clip: Clip, legend: Mapping[str, Score]) -> str:
    said = [f"seed {clip.seed}", *(f"{legend[name].title} {_number(value)}" for name, value in clip.scores.items())]
    return f"<figure>{_video(clip.file)}<figcaption>{escape(', '.join(said))}</figcaption></figure>"


def _video(file: str) -> str:
    return f'<video src="{_url(file)}" autoplay loop muted playsinline></video>'


def _line(parts: Iterable[str]) -> str:
    return '<div class="line">\n' + "\n".join(parts) + "\n</div>"


def _url(file: str) -> str:
    return escape(quote(file))


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in settings.items())


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
