"""The overview: a row for every claim, that its filters find and that leads to its experiment."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from backpass.report.claims import Claim
from backpass.report.overview import overview, paper_of
from backpass.report.plots import interval_svg
from backpass.report.result import Result
from backpass.report.statistics import Interval

BASE = Result(
    experiment="one", title="Does it?", question="q", scale="small", findings=(), settings={}, series=(), claims=(),
    environment={"versions": {}}, source="A and B, arXiv 2112.11018, Figure 1",
)  # fmt: skip


def claim(name, verdict, setting):
    return Claim(id=name, statement=f"{name} is so", quantity="points", verdict=verdict, estimate=1.0,
                 interval=(0.5, 1.5), n=7, setting=setting, published="there 2 %", reference="there")  # fmt: skip


RESULTS = [  # two of one experiment, as two attacks in one folder
    replace(BASE, source=""),
    replace(BASE, claims=[claim("a", "replicated", "the claim's"), claim("b", "undecided", "elsewhere")]),
    replace(BASE, experiment="two", source="C, ICLR 2018", claims=[claim("c", "undecided", "elsewhere")]),
]


class Rows(HTMLParser):
    """Classes and text of the rows of the claims, ids and links of the page."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.ids, self.links, self.tags = [], [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"][1:]] if given.get("href", "").startswith("#") else []
        if tag == "tr" and "class" in given:
            self.rows.append((set(given["class"].split()), []))

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][1].append(data)


def test_the_filters_show_exactly_the_rows_of_their_value():
    html = overview(RESULTS)
    rows = Rows(html).rows
    hidden = dict(re.findall(r"has\(#([\w-]+):checked\) tbody tr:not\(\.([\w-]+)\) \{ display: none", html))
    labels = dict(re.findall(r'id="(show-[\w-]+)"> (.*?) <span', html))
    assert set(hidden) == set(labels) == set(re.findall(r'id="(show-[\w-]+)"', html))
    shown = {
        labels[button].replace("&#39;", "'"): [place for place, (classes, _) in enumerate(rows) if kept in classes]
        for button, kept in hidden.items()
    }
    assert shown == {
        "A and B, arXiv 2112.11018": [0, 1], "C, ICLR 2018": [2], "replicated": [0], "undecided": [1, 2],
        "the claim's": [0], "elsewhere": [1, 2],
    }  # fmt: skip


def test_a_row_has_paper_claim_published_value_measurement_setting_and_verdict():
    words = " ".join("".join(Rows(overview(RESULTS)).rows[0][1]).split())
    for word in ("A and B, arXiv 2112.11018", "a is so", "there 2 %", "+1.00 [+0.500, +1.50]", "n = 7", "the claim's",
                 "small", "replicated"):  # fmt: skip
        assert word in words


def test_every_link_has_its_target_and_the_page_runs_no_script():
    page = Rows(overview(RESULTS))
    assert len(page.ids) == len(set(page.ids))
    assert set(page.links) <= set(page.ids)
    assert {"1-one-small-top", "2-one-small-top", "2-one-small-a", "3-two-small-top", "3-two-small-c"} <= set(
        page.links
    )
    assert "script" not in page.tags


@pytest.mark.parametrize(
    ("source", "paper"),
    [
        ("Li et al., arXiv 2112.11018, Table I", "Li et al., arXiv 2112.11018"),
        ("Guo, Li, Chen, NeurIPS 2020", "Guo, Li, Chen, NeurIPS 2020"),
        ("Wu et al., ICLR 2020, Table 2", "Wu et al., ICLR 2020"),
        ("my notes", "my notes"),
        ("", "asked here"),
    ],
)
def test_the_paper_is_the_source_without_the_place_in_it(source, paper):
    assert paper_of(replace(BASE, source=source)) == paper


@pytest.mark.parametrize(
    ("interval", "places"),
    [
        (Interval(1.0, 0.0, 2.0, 5), ("60.0", "115.0", "87.5")),
        (Interval(-4.0, -8.0, 0.0, 5), ("5.0", "60.0", "32.5")),
        (Interval(0.0, 0.0, 0.0, 5), ("60.0", "60.0", "60.0")),
        (Interval(3.0, math.nan, math.nan, 1), ("115.0",)),
        (Interval(math.nan, math.nan, math.nan, 5), ()),
    ],
)
def test_a_small_plot_has_0_in_the_middle_and_the_farthest_end_at_its_edge(interval, places):
    svg = interval_svg(interval)
    found = re.search(r'class="bar" x1="(.*?)" x2="(.*?)"', svg), re.search(r'circle cx="(.*?)"', svg)
    assert tuple(place for one in found if one for place in one.groups()) == places
