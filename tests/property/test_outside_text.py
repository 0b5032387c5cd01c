"""Text from files is shown as that text in every output: never a tag, a formula, markup or a control sequence."""

import contextlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backpass.cli.printing import print_claims, print_findings, print_overview, print_table, say
from backpass.report.claims import judge
from backpass.report.markdown import verdicts
from backpass.report.overview import overview, read_results
from backpass.report.page import estimate, page
from backpass.report.pictures import Gallery, Picture
from backpass.report.plots import picture
from backpass.report.result import Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import Interval
from backpass.report.wording import interval_text
from backpass.wording import visible
from support.command_line import run
from support.hostile import PAYLOADS

VERDICTS = ("same direction", "opposite direction", "undecided")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202e]")
TEXTS = st.sampled_from(PAYLOADS) | st.lists(st.sampled_from(PAYLOADS), max_size=4).map(" ".join) | st.text()


def harmless():
    """A result with every part that a page has."""
    curve = Curve(label="label", x=[1.0, 2.0], runs=[[1.0, 2.0], [1.5, float("nan")]])
    return Result(
        experiment="name", title="title", question="question", scale="scale", source="source",
        findings=[Finding("topic", "text")],
        environment=environment(device="cpu", threads=1, data="data", seeds=[0]), settings={"setting": "value"},
        series=[Series(id="id", title="t", description="d", x_label="x", y_label="y", curves=[curve], log_x=True)],
        claims=[judge("id", "statement", ours=[2.0, 2.1, 2.2], theirs=[1.0, 1.1, 1.0], direction="higher",
                      quantity="points", reference="there", published="1 %")],
        tables=[Table(id="id", title="t", columns=["a", "b"], rows=[["word", Interval(1.0, 0.5, 1.5, 3)]], note="n")],
    )  # fmt: skip


def poisoned(value, text):
    """The same JSON with the text in every place that is read as text, also as the name of a setting."""
    if isinstance(value, dict):
        named = {text if name == "setting" else name: poisoned(part, text) for name, part in value.items()}
        return {**named, "verdict": value["verdict"]} if "verdict" in value else named
    if isinstance(value, list):
        return [poisoned(part, text) for part in value]
    return text if isinstance(value, str) else value


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Reads a result whose every text is the given one."""
    folder = tmp_path_factory.mktemp("hostile")

    def make(text):
        (folder / "result.json").write_text(json.dumps(poisoned(json.loads(harmless().as_json()), text)))
        (result,) = read_results(folder)
        return result

    return make


class Structure(HTMLParser):
    """Tags and attribute names outside of plots, tags inside, and all text."""

    def __init__(self, html):
        super().__init__()
        self.outside, self.inside, self.text, self.drawn, self.links, self.open = [], set(), [], [], [], 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open += tag == "svg"
        shape = (tag, tuple(name for name, _ in attrs))
        if self.open:
            self.inside.add(tag)
        else:
            self.outside.append(shape)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.text += [value for _, value in attrs if value]

    def handle_endtag(self, tag):
        self.open -= tag == "svg"

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data):
        self.text.append(data)
        self.drawn.append(data)


@pytest.mark.parametrize("make", [page, lambda result: overview([result, result])], ids=["page", "overview"])
@settings(deadline=None, max_examples=8)
@given(text=TEXTS)
@example(" ".join(PAYLOADS[:-1]))
@example("\x1b[31m<b>")
def test_the_structure_of_a_page_does_not_depend_on_its_texts(hostile, make, text):
    plain, found = Structure(make(hostile("word"))), Structure(make(hostile(text)))
    if text:  # an empty note or source leaves its line out
        assert found.outside == plain.outside
    assert found.inside <= plain.inside | {"tspan"}
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert any(visible(text) in shown for shown in found.text)
    assert not CONTROL.search("".join(found.text))


@settings(deadline=None, max_examples=8)
@given(text=TEXTS)
@example(" ".join(PAYLOADS[:-1]))
def test_a_picture_shows_its_labels_as_they_are(hostile, text):
    drawn = "".join(Structure(picture(hostile(text).series, title=text)).drawn)
    # The title, both axes and the legend, which wraps.
    assert not text or re.sub(r"\s+", "", drawn).count(re.sub(r"\s+", "", visible(text)) or "1") >= 4


@settings(deadline=None, max_examples=20)
@given(text=TEXTS, width=st.sampled_from(["20", "80", "200"]))
@example(" ".join(PAYLOADS), "80")
def test_the_terminal_shows_text_and_every_number(hostile, text, width):
    result = hostile(text)
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stream):
        patch.setenv("COLUMNS", width)
        print_overview([result])
        print_claims(result, text)
        print_table(result.tables[0], columns=2)
        print_findings(result)
        say(text)
    out = stream.getvalue()
    assert not CONTROL.search(out)
    squeezed = re.sub(r"[\s\u2500-\u257f]+", "", out)
    for number in ("1.00", "[0.500,1.50]", *interval_text(estimate(result.claims[0]), signed=True).split(" ", 1)):
        assert re.sub(r"\s", "", number) in squeezed
    assert "samedirection" in squeezed
    assert re.sub(r"[\s\u2500-\u257f]+", "", visible(text)) in squeezed


@settings(deadline=None, max_examples=20)
@given(text=TEXTS)
@example(" ".join(PAYLOADS))
def test_the_json_keeps_the_text_and_is_ascii(hostile, text):
    content = hostile(text).as_json()
    assert content.isascii()
    assert json.loads(content)["claims"][0]["statement"] == text


@settings(deadline=None, max_examples=20)
@given(text=TEXTS)
@example(" ".join(PAYLOADS))
def test_markdown_has_no_tag_link_column_or_formula_of_a_text(hostile, text):
    out = verdicts([hostile(text)])
    assert not CONTROL.search(out)
    assert "<" not in out
    bare = re.sub(r"\\[\\`*_|$~\]]", "", out)
    assert "](" not in bare
    assert "$" not in bare
    assert [line.count("|") for line in bare.splitlines() if line.startswith("|")] == [4] * 3 + [7] * 3


def test_captions_and_alternative_texts_of_images_are_escaped():
    for text in PAYLOADS:
        gallery = Gallery(id=text, title=text, columns=[text], rows=[[Picture(uri="data:,", caption=text)]], note=text)
        result = Result(**{**vars(harmless()), "galleries": [gallery], "series": []})
        same = Gallery(id="i", title="t", columns=["c"], rows=[[Picture(uri="data:,", caption="c")]], note=text and "n")
        plain = Result(**{**vars(result), "galleries": [same]})
        assert Structure(page(result)).outside == Structure(page(plain)).outside


def test_the_list_of_runs_shows_what_their_files_say(tmp_path):
    for number, text in enumerate([*PAYLOADS, " ".join(PAYLOADS)]):
        folder = tmp_path / f"{number} [red]x[b] :cat: \x1b[2J"
        folder.mkdir()
        state = {"status": text, "epoch": 1, "settings": {"epochs": 2, "model": {"type": text}}, "last": {"loss": 0.25}}
        (folder / "run.json").write_text(json.dumps(state))
    (folder / "recipe.toml").write_bytes(b'data = "\xff\\u001b[2J[/b]"\nmodel = "$x_$"\n')
    ended = run("runs", str(tmp_path))
    assert ended.exit_code == 0, ended.output
    assert not CONTROL.search(ended.output)
    squeezed = re.sub(r"[\s\u2500-\u257f]+", "", ended.output)
    assert r"\udcff\x1b[2J[/b]$x_$" in squeezed
    assert squeezed.count("0.2500") == len(PAYLOADS) + 1
    assert len(json.loads(run("runs", str(tmp_path), "--json").output)) == len(PAYLOADS) + 1
