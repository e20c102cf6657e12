"""Pairs of prompts for prompt influence, from tables that anyone can edit."""

import csv
from pathlib import Path

from model import UserError

FOLDER = Path(__file__).with_name("pairs")
COLUMNS = ["prompt", "other"]


def shipped_pairs(kind: str, rendered: bool) -> Path:
    """The list of 100 pairs that comes along: `kind` is subject or motion, `rendered` the tiny base's world."""
    return FOLDER / f"{'tiny' if rendered else 'real'}-{kind}s.csv"


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """The pairs (p, p*) of a CSV file with the columns `prompt` and `other`.

    Raises:
        UserError: a file that cannot be read, has other columns, or a line with an empty prompt or twice the same.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table of prompts: {error}") from error
    if not lines or lines[0] != COLUMNS:
        raise UserError(f"{path}: the first line must be {','.join(COLUMNS)}")
    pairs = []
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        words = [prompt.strip() for prompt in line]
        if len(words) != 2 or not all(words) or words[0] == words[1]:
            raise UserError(f"{path}, line {number}: two different prompts were expected, not {','.join(line)!r}")
        pairs.append((words[0], words[1]))
    if not pairs:
        raise UserError(f"{path} holds no pairs")
    return pairs
