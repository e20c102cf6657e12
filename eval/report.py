"""A report in one HTML file: text, tables and pictures, all within it."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from eval.page import STYLE, table
from weights import atomic_write, printable

WIDE = "img { width: auto; max-width: 100%; } table { margin: 1rem 0; } td, th { white-space: nowrap; }"


@dataclass(frozen=True)
class Heading:
    """The title of a part."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file, taken into the page, and what it shows."""

    file: Path
    about: str


Part = Heading | Table | Picture | str


def write_page(file: Path, title: str, parts: Iterable[Part]) -> None:
    """Write the report; a plain text is a paragraph. Every text is escaped: prompts and file names come from outside.

    Raises:
        UserError: the system refuses.
    """
    body = [f"<h1>{escape(title)}</h1>", *map(_html, parts)]
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n{WIDE}\n</style>\n</head>\n<body>\n"
    )
    with atomic_write(file) as temporary:
        temporary.write_text(head + "\n".join(body) + "\n</body>\n</html>\n", encoding="utf-8")


def text_table(its: Table) -> str:
    """The table for a terminal: columns as wide as their widest cell."""
    lines = [[printable(cell) for cell in line] for line in (its.head, *its.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(its.head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown_table(its: Table) -> str:
    """The table in Markdown."""
    lines = [its.head, ["---"] * len(its.head), *its.rows]
    return "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """A text that Markdown shows as it is, on one line: no tag, no link, no end of a table's cell."""
    return re.sub(r"([\\`\[\]|<>])", r"\\\1", printable(text).replace("&", "&amp;"))


def _html(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h2>{escape(part.text)}</h2>"
    if isinstance(part, Table):
        return table(part.head, part.rows)
    if isinstance(part, Picture):
        picture = base64.b64encode(part.file.read_bytes()).decode()
        about = escape(part.about)
        return f'<p>{about}</p>\n<img alt="{about}" src="data:image/png;base64,{picture}">'
    return f"<p>{escape(part)}</p>"
