"""What the demonstration shows: its page, its picture of sample frames, its table."""

from dataclasses import replace
from html.parser import HTMLParser

import torch

from eval.page import Clip, Page, Row, Score, Step, demo_page, demo_sheet, score_table, spread


def test_the_sheet_has_five_rows_of_eight_and_enlarges_by_whole_pixels():
    pictures = [torch.full((3, 64, 64), -0.5), torch.full((3, 64, 64), 0.5)]
    clip = torch.linspace(-1, 1, 16).view(16, 1, 1, 1).expand(16, 3, 64, 64)
    sheet = demo_sheet(pictures, clip, [clip, -clip, clip[:4]])
    assert sheet.shape == (3, 5 * 130 + 2, 8 * 130 + 2)

    def cell(row, column):
        top, left = 2 + 130 * row, 2 + 130 * column
        return sheet[:, top : top + 128, left : left + 128]

    assert (cell(0, 1) == 0.5).all()
    assert (cell(0, 2) == 1).all()
    for row, expected in ((1, clip), (2, clip), (3, -clip)):
        assert torch.equal(torch.stack([cell(row, i)[0, 0, 0] for i in range(8)]), spread(expected)[:, 0, 0, 0])
    assert (cell(1, 0) == -1).all()
    assert (cell(1, 7) == 1).all()
    assert (cell(4, 4) == 1).all()
    assert demo_sheet(pictures, clip, [clip] * 3).shape == sheet.shape
    # pictures too large to need it stay as they are
    assert demo_sheet([torch.zeros(3, 256, 256)], torch.zeros(2, 3, 256, 256), []).shape == (3, 518, 2066)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def page(evil):
    rows = [
        Row("base", "alone", [Clip(f"{evil}.mp4", 0, {"path": 0.5}), Clip("b.mp4", 1, {"path": 0.7})]),
        Row(evil, evil, [Clip("c.mp4", 0)]),
    ]
    steps = [Step(evil, 12.3, {evil: [evil]})]
    return Page(evil, evil, evil, evil, [f"{evil}.png"], f"{evil}.mp4", evil, rows, steps, {"path": Score(evil, evil)})


def test_nothing_that_is_shown_becomes_html():
    evil = "\"'><script>alert(1)</script>&amp;"
    tags, plain = Tags(), Tags()
    tags.feed(demo_page(page(evil)))
    plain.feed(demo_page(page("word")))
    assert [name for name, _ in tags.seen] == [name for name, _ in plain.seen]
    assert [attributes.keys() for _, attributes in tags.seen] == [attributes.keys() for _, attributes in plain.seen]
    assert tags.text == plain.text.replace("word", evil)
    sources = [attributes["src"] for name, attributes in tags.seen if name == "video"]
    assert sources[0] == "%22%27%3E%3Cscript%3Ealert%281%29%3C/script%3E%26amp%3B.mp4"


def test_the_table_holds_means_and_says_how_to_read_them():
    lines = score_table(page("thing")).splitlines()
    assert lines[1].split() == ["base", "0.600"]
    assert lines[2].split() == ["thing", "-"]
    assert lines[-1] == "thing: thing"
    assert score_table(replace(page("thing"), legend={})) == ""


def test_what_standing_still_scores_is_told_beside_the_means():
    known = replace(page("thing"), legend={"path": Score("path", "how far", still=0.432), "other": Score("other", "x")})
    lines = score_table(known).splitlines()
    assert lines[3].split() == ["a", "subject", "that", "stands", "still", "0.432", "-"]
    assert lines[4:] == ["path: how far; standing still scores 0.432", "other: x"]
    html = demo_page(known)
    assert "<td>a subject that stands still</td><td>0.432</td><td>-</td>" in html
    assert "<li>path: how far; standing still scores 0.432</li>" in html
    assert "still" not in demo_page(page("thing")) + score_table(page("thing"))
