"""Reports and plots: all in one file, every text escaped, pictures that can be read."""

import base64
import re
import sys
from html.parser import HTMLParser

import pytest
import torch

from eval.plots import bars, strips
from eval.report import Heading, Picture, Table, markdown_table, text_table, write_page
from model import UserError
from sampling import read_image, write_media

HOSTILE = '<script>alert("1")</script> & "quotes"'


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_a_report_holds_everything_and_escapes_it(tmp_path):
    picture = tmp_path / "a.png"
    write_media(picture, torch.zeros(1, 3, 8, 8))
    parts = [HOSTILE, Heading(HOSTILE), Table([HOSTILE, "b"], [["1", HOSTILE]]), Picture(picture, HOSTILE)]
    write_page(tmp_path / "report.html", HOSTILE, parts)
    seen = Seen()
    seen.feed((tmp_path / "report.html").read_text())
    assert "script" not in seen.tags
    assert "".join(seen.text).count(HOSTILE) == 7  # title, h1, p, h2, two cells, the picture's text
    [source] = seen.sources
    kind, _, content = source.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content) == picture.read_bytes()


def test_tables_for_the_terminal_and_in_markdown():
    its = Table(["arm", "score"], [["a|b", "1.5"], ["longer", "22.25"]])
    assert text_table(its).splitlines() == ["arm     score", "a|b       1.5", "longer  22.25"]
    assert markdown_table(its).splitlines() == [
        "| arm | score |",
        "| --- | --- |",
        r"| a\|b | 1.5 |",
        "| longer | 22.25 |",
    ]


def test_a_marked_bar_has_another_colour_and_every_panel_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    heights = {"up": [(1.0, None, None), (2.0, 1.5, 2.5)], "down": [(2.0, None, None), (1.0, None, None)]}
    pictures = []
    for marked in ([], ["b"]):
        bars(tmp_path / "bars.png", "t", heights, ["a", "b"], marked)
        pictures.append(read_image(tmp_path / "bars.png", 480, 480))
    red = [((picture[0] > 0.3) & (picture[1] < 0) & (picture[2] < -0.5)).float() for picture in pictures]
    assert red[0].sum() == 0
    # "b" stands to the right, in both panels, and is the taller one in the upper
    assert red[1][:, :240].sum() == 0
    assert red[1][:240].sum() > red[1][240:].sum() > 0


def test_strips_stand_below_each_other_in_their_order(tmp_path):
    pytest.importorskip("matplotlib")
    colours = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0)}
    files = {}
    for name, colour in colours.items():
        files[name] = tmp_path / f"{name}.png"
        write_media(files[name], torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 16, 128))
    strips(tmp_path / "strips.png", "two", files, ["green"])
    picture = read_image(tmp_path / "strips.png", 400, 1600)
    rows = {
        name: ((picture - torch.tensor(colour).view(3, 1, 1)).abs().amax(0) < 0.1).float().sum(1)
        for name, colour in colours.items()
    }
    places = {name: (found > 500).nonzero().flatten() for name, found in rows.items()}
    assert all(len(place) > 50 for place in places.values())
    assert places["red"].max() < places["green"].min()


def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=re.escape('pip install -e ".[eval]"')):
        bars(tmp_path / "bars.png", "t", {"up": [(1.0, None, None)]}, ["a"])
    assert not (tmp_path / "bars.png").exists()


def test_no_text_ends_its_cell_its_line_or_moves_the_cursor():
    evil = "a|b\\|c\n| d <script>x</script> [l](javascript:1) `c` \x1b[2J\u202e\r&lt;"
    its = Table(["arm", evil], [[evil, "1"]])
    for text in (text_table(its), markdown_table(its)):
        assert not set(text) & {"\x1b", "\u202e", "\r"}
    assert len(text_table(its).splitlines()) == 2
    head, _, row = markdown_table(its).splitlines()
    for line in (head, row):
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3
        assert not re.search(r"(?<!\\)[<>\[\]`]|&lt;", line)
