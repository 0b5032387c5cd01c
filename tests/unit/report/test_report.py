"""The page stands alone, shows everything, and carries the very numbers of the JSON."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backpass.report.claims import judge
from backpass.report.page import page, write_report
from backpass.report.pictures import Gallery, Picture, amplified, png_uri
from backpass.report.plots import inline_svg, picture
from backpass.report.result import Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import Interval, mean_interval
from backpass.report.wording import interval_text, number
from backpass.wording import listing

VOID = {"meta", "link", "br", "img", "hr", "input"}


def _series(id_="loss", **options):
    curves = [
        Curve(label="BP", x=[0, 1, 2], runs=[[3.0, 2.0, 1.0], [3.5, 2.25, 1.125]]),
        Curve(label="<LinBP>", x=[0, 1, 2], runs=[[3.0, 1.5, math.nan], [3.5, 1.75, 0.5]]),
    ]
    return Series(
        id=id_, title="Loss & more", description="Falls.", x_label="epoch", y_label="loss", curves=curves, **options
    )


@pytest.fixture
def result():
    claims = [
        judge(f"claim-{i}", s, ours=o, theirs=[0.0] * 3, direction="higher", quantity="points", reference=r)
        for i, (s, o, r) in enumerate(
            [
                ("a is > b", [1.25, 2.0, 1.75], "Somebody, Table 1"),
                ("c", [-5.0, -5.5, -5.25], None),
                ("d", [0.0, 1.0, math.nan], None),
            ]
        )
    ]
    return Result(
        experiment="trial",
        title="A trial <of> the report",
        question="Does it work?",
        scale="tiny",
        findings=[Finding("In short", "1 < 2 & so on.")],
        environment=environment(device="cpu", threads=1, data="none", seeds=range(3)),
        settings={"rate": 0.1, "rules": ("bp", "linbp")},
        series=[_series(), _series("loss-2", log_y=True)],
        tables=[Table(id="t", title="Numbers", columns=["what", "how much"], rows=[["x", mean_interval([1.5, 2.5])]])],
        claims=claims,
    )


class Page(HTMLParser):
    """Elements, ids, references and text of a page; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.data, self.text = [], [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "action", "srcset"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
            if key in ("aria-labelledby", "aria-describedby"):
                self.references += [f"#{name}" for name in value.split()]
        if tag == "data":
            self.data.append(float(attributes["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def test_the_page_is_well_formed_and_loads_nothing_from_outside(result):
    html = page(result)
    parsed = Page(html)
    assert "http" not in html
    assert "@import" not in html
    assert "script" not in parsed.tags
    assert all(reference.startswith(("#", "data:")) for reference in parsed.references)


def test_ids_are_unique_and_every_reference_has_its_target(result):
    parsed = Page(page(result))
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {r[1:] for r in parsed.references if r.startswith("#")} <= set(parsed.ids)


def test_every_series_is_plotted_with_every_curve(result):
    parsed = Page(page(result))
    assert parsed.tags.count("svg") == parsed.tags.count("figure") == len(result.series)
    for series in result.series:
        for index, _ in enumerate(series.curves, start=1):
            assert f"plot-{series.id}-curve-{index}" in parsed.ids
        assert f"plot-{series.id}-diverged-2" in parsed.ids
        assert f"plot-{series.id}-diverged-1" not in parsed.ids


def test_plots_have_names_for_those_who_cannot_see_them(result):
    html = page(result)
    assert html.count('role="img"') == len(result.series)
    assert '<title id="plot-loss-title">Loss &amp; more</title><desc id="plot-loss-desc">Falls.</desc>' in html


def test_images_stand_in_the_page_and_their_captions_in_the_json(result):
    torch.manual_seed(0)
    image = torch.rand(3, 4, 5)
    gallery = Gallery(
        id="g", title="Images", columns=["Before"], rows=[[Picture(uri=png_uri(image), caption="a <cat>")]], note="Two."
    )
    shown = replace(result, galleries=[gallery], series=[], claims=[])
    html = page(shown)
    source = re.search(r'<img src="data:image/png;base64,([^"]+)" alt="a &lt;cat&gt;">', html)
    with Image.open(io.BytesIO(base64.b64decode(source[1]))) as opened:
        pixels = torch.from_numpy(np.array(opened)).permute(2, 0, 1) / 255
    assert (pixels - image).abs().max() <= 0.5 / 255 + 1e-6
    assert json.loads(shown.as_json())["galleries"][0]["rows"] == [[{"caption": "a <cat>"}]]
    # A page without plots and claims has no empty sections.
    assert "Claims and verdicts" not in html
    assert "Plots" not in html
    Page(html)


def test_a_difference_is_shown_around_grey_and_a_grey_image_stays_grey():
    difference = torch.tensor([[[-0.1, 0.0, 0.1]]])
    assert amplified(difference, 5.0).flatten().tolist() == pytest.approx([0.0, 0.5, 1.0])
    with Image.open(io.BytesIO(base64.b64decode(png_uri(amplified(difference, 5.0)).partition(",")[2]))) as opened:
        assert opened.mode == "L"
        assert np.array(opened).tolist() == [[0, 128, 255]]


def test_a_curve_of_given_intervals_shows_them(result):
    given = [Interval(40.0, 30.0, 52.0, 9), Interval(math.nan, math.nan, math.nan, 0)]
    curve = Curve(label="BP", x=[1.0, 2.0], given=given)
    series = Series(id="s", title="t", description="d", x_label="x", y_label="y", curves=[curve])
    shown = replace(result, series=[series], plots_note="Bands are Wilson's.", claims_note="Pairs are images.")
    content = json.loads(shown.as_json())["series"][0]["curves"][0]
    assert content["mean"] == [40.0, None]
    assert content["interval"] == [[30.0, 52.0], [None, None]]
    html = page(shown)
    assert "Bands are Wilson" in html
    assert "Pairs are images." in html
    assert "over the seeds" not in html


def test_words_are_shown_and_never_become_markup(result):
    html = page(result)
    text = " ".join(Page(html).text)
    for words in ("A trial <of> the report", "1 < 2 & so on.", "a is > b", "<LinBP>", "Somebody, Table 1"):
        assert words in text
    assert "<of>" not in html
    assert "<LinBP>" not in html


def test_the_json_and_the_page_hold_the_same_numbers(result):
    content = json.loads(result.as_json())
    shown = {value for value in Page(page(result)).data if math.isfinite(value)}
    expected = set()
    for claim in content["claims"]:
        expected |= {claim["estimate"], *claim["interval"], claim["n"]}
    for series in content["series"]:
        for curve in series["curves"]:
            expected |= {*curve["x"], *curve["mean"], *(end for ends in curve["interval"] for end in ends)}
    expected |= {content["tables"][0]["rows"][0][1][key] for key in ("mean", "low", "high")}
    assert shown == expected - {None}


def test_the_json_has_the_promised_keys_and_null_where_a_run_diverged(result):
    content = json.loads(result.as_json())
    assert content.keys() >= {"experiment", "scale", "environment", "settings", "series", "claims"}
    assert [claim["verdict"] for claim in content["claims"]] == ["same direction", "opposite direction", "undecided"]
    assert content["claims"][0].keys() >= {"id", "statement", "verdict", "estimate", "interval", "n", "reference"}
    assert content["claims"][2]["estimate"] is None
    assert content["series"][0]["curves"][1]["runs"][0] == [3.0, 1.5, None]
    assert content["environment"]["seeds"] == [0, 1, 2]
    assert content["environment"]["versions"].keys() >= {"backpass", "torch", "python"}


def test_the_report_is_written_as_a_page_and_its_numbers(result, tmp_path):
    html, numbers = write_report(result, tmp_path / "deep" / "folder")
    assert (html.name, numbers.name) == ("report.html", "result.json")
    assert html.read_text(encoding="utf-8") == page(result)
    assert numbers.read_text(encoding="utf-8") == result.as_json()
    assert sorted(p.name for p in html.parent.iterdir()) == ["report.html", "result.json"]


def test_a_plot_takes_the_pages_colours_and_is_the_same_every_time():
    svg = inline_svg(_series())
    assert {"currentColor", "var(--grid)", "var(--curve-1)", "var(--curve-2)"} <= set(
        re.findall(r"currentColor|var\(--[\w-]+\)", svg)
    )
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
    assert svg == inline_svg(_series())


def test_a_picture_is_one_small_svg_that_stands_alone():
    svg = picture([_series(), _series("other")], title="Loss & more")
    assert svg.startswith("<svg")
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    assert "<title>Loss &amp; more</title>" in svg
    assert len(svg) < 200_000
    assert "a run diverged" in svg
    assert "var(--" not in svg


def test_a_logarithmic_curve_has_geometric_means():
    curve = Curve(label="a", x=[1.0], runs=[[0.1], [10.0]], geometric=True)
    assert curve.intervals[0].mean == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (1.2345, "1.23"),
        (-0.012345, "\N{MINUS SIGN}0.0123"),
        (97.25, "97.2"),
        (12345.6, "12,346"),
        (3e-7, "3.00e-07"),
    ],
)
def test_numbers_have_three_digits_and_a_true_minus(value, words):
    assert number(value) == words


def test_intervals_and_lists_in_words():
    assert interval_text(Interval(1.5, -1.0, 4.0, 3), signed=True) == "+1.50 [\N{MINUS SIGN}1.00, +4.00]"
    assert interval_text(Interval(math.nan, math.nan, math.nan, 3)) == "diverged"
    assert [listing(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


def test_the_template_is_part_of_the_package():
    import backpass.report

    assert (Path(backpass.report.__file__).parent / "templates" / "report.html").is_file()
