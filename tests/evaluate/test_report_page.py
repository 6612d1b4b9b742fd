"""The report page: one file that a browser can read, with everything inside it."""

import base64
import re
from html.parser import HTMLParser

import pytest

from utils.errors import UserError
from utils.evaluate import plots, report_page

ALONE = {"meta", "img"}  # elements without an end tag
STAGES = {
    "pretrain RNA": {"command": "python pretrain_rna.py --data_path 'a & b.h5mu'", "seconds": 61.4},
    "label <the> donor": {"command": "python predict_cell_type.py --model_path runs", "seconds": 5.0},
}
ROWS = {
    "scMomer": {"accuracy": 0.8126, "cells": 391, "interval": "0.77–0.85"},
    "k < 5 & more": {"accuracy": float("nan"), "cells": None},
}


class Page(HTMLParser):
    """What a browser would see: the text of each element, images, and whether every element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.links, self.cells, self.shown = [], [], [], [[]], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data
        if self.open:
            self.shown.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def drawn(tmp_path):
    return plots.bars({"scMomer": {"accuracy": 0.8}}, tmp_path / "bars.png", "title")


@pytest.fixture
def written(tmp_path, drawn):
    sections = {
        "Scores & more": [
            report_page.table(ROWS, "method", marked=("scMomer",)),
            report_page.figure(drawn, 'a "b" <c>'),
        ],
        "Commands": [report_page.grid([report_page.paragraph("1 < 2")]), report_page.commands(STAGES)],
    }
    return report_page.write_report(tmp_path / "new" / "report.html", "A <demo>", "What it shows.", sections)


def test_the_page_is_well_formed_and_needs_no_other_file(written, drawn):
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert page.shown["h1"] == page.shown["title"] == ["A <demo>"]
    assert page.shown["h2"] == ["Scores & more", "Commands"]
    assert "What it shows." in page.shown["p"] and "1 < 2" in page.shown["p"]
    assert "<script" not in text and "url(" not in text and "@import" not in text
    (image,) = page.images
    assert page.links == [image["src"]] and image["alt"] == 'a "b" <c>'
    kind, _, content = image["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(content) == drawn.read_bytes()


def test_tables_show_every_value_and_leave_missing_ones_empty(written):
    _, head, *rows = Page(written.read_text(encoding="utf-8")).cells
    assert head == ["method", "accuracy", "cells", "interval"]
    assert rows == [["scMomer", "0.813", "391", "0.77–0.85"], ["k < 5 & more", "", "", ""]]
    assert len(re.findall('<tr class="marked"><td>scMomer', written.read_text(encoding="utf-8"))) == 1


def test_commands_stand_as_they_ran_in_their_order(written):
    shown = Page(written.read_text(encoding="utf-8")).shown
    assert shown["pre"] == [stage["command"] for stage in STAGES.values()]
    assert [name for name in shown["p"] if name[0].isdigit() and "." in name] == [
        "1. pretrain RNA ",
        "2. label <the> donor ",
    ]
    assert shown["span"] == ["61 s", "5 s"]


@pytest.mark.parametrize("content", [None, b"", b"GIF89a"])
def test_a_figure_that_is_no_png_is_refused(tmp_path, content):
    path = tmp_path / "figure.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        report_page.figure(path, "caption")
