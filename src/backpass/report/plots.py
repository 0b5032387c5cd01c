"""Plots as SVG: inline in a page with its colours and fonts, or as a standalone file."""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from backpass.report.result import Curve, Series
from backpass.report.statistics import Interval
from backpass.report.wording import anchor
from backpass.wording import visible

__all__ = ["CURVE_COLOURS", "inline_svg", "interval_svg", "picture"]

CURVE_COLOURS = ("#0b62a8", "#c2410c", "#4d7c0f", "#7e22ce", "#be185d", "#0f766e")
"""Colours of the curves in order, with a contrast above 4.5 on white; line styles differ as well."""

_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)), (0, (1, 3)))
_MARKERS = "osD^vP"
_INK, _GRID = "#1f2328", "#d0d7de"
_MANY_POINTS = 9  # a curve with more points is drawn without markers
_FONTS = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a label is literal
    "text.usetex": False,
    "font.size": 10,
    "text.color": _INK,
    "axes.facecolor": "none",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def inline_svg(series: Series) -> str:
    """Return a plot as an inline ``<svg>`` element.

    Ink, grid and curves take the page's colours (``currentColor``, ``var(--grid)``, ``var(--curve-1)``, ...), so that
    the plot follows light and dark mode. Every id starts with that of the series, so that ids are unique in a page.
    """
    prefix = f"plot-{anchor(series.id)}"
    root = _draw_svg([series], size=(4.3, 3.4))
    root.remove(root.find("defs"))  # type: ignore[arg-type]  # global style; the page has its own
    for element in root.iter():
        for name, value in element.items():
            element.set(name, _on_page(name, value, prefix))
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update(
        {"class": "plot", "id": prefix, "viewBox": box, "role": "img"}
        | {"aria-labelledby": f"{prefix}-title {prefix}-desc"}
    )
    _insert(root, 0, "title", series.title, id=f"{prefix}-title")
    _insert(root, 1, "desc", series.description, id=f"{prefix}-desc")
    return ElementTree.tostring(root, encoding="unicode")


def interval_svg(interval: Interval) -> str:
    """Return an interval as a small inline ``<svg>`` with 0 in the middle; empty if the mean is not finite."""
    ends = [end for end in (interval.low, interval.high) if math.isfinite(end)]
    if not math.isfinite(interval.mean):
        return ""
    largest = max(map(abs, [interval.mean, *ends])) or 1.0
    mean, *bar = (round(60 + 55 * value / largest, 1) for value in (interval.mean, *ends))
    drawn = f'<line class="bar" x1="{bar[0]}" x2="{bar[1]}" y1="8" y2="8"/>' if len(bar) == 2 else ""
    zero = '<line class="zero" x1="60" x2="60" y1="0" y2="16"/>'
    dot = f'<circle cx="{mean}" cy="8" r="3.5"/>'
    return f'<svg class="interval" viewBox="0 0 120 16" aria-hidden="true">{zero}{drawn}{dot}</svg>'


def picture(series: Sequence[Series], *, title: str) -> str:
    """Return plots, two per row, as a standalone SVG on a white background."""
    across = min(2, len(series))
    root = _draw_svg(series, size=(4.3 * across, 3.4 * -(-len(series) // across)), background="white")
    root.set("xmlns", "http://www.w3.org/2000/svg")
    _insert(root, 0, "title", title)
    return ElementTree.tostring(root, encoding="unicode")


def _on_page(name: str, value: str, prefix: str) -> str:
    """Return the value of an attribute of matplotlib's SVG with the ids and colours of the page."""
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return value.replace("#", f"#{prefix}-")
    value = value.replace("url(#", f"url(#{prefix}-").replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for index, colour in enumerate(CURVE_COLOURS, start=1):
        value = value.replace(colour, f"var(--curve-{index})")
    return value


def _insert(root: Element, place: int, tag: str, text: str, **attributes: str) -> None:
    element = Element(tag, attributes)
    element.text = visible(text)
    root.insert(place, element)


def _draw_svg(series: Sequence[Series], *, size: tuple[float, float], background: str = "none") -> Element:
    """Draw one panel per series; return matplotlib's SVG without namespaces and metadata."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    salt = "+".join(visible(one.id) for one in series)  # deterministic ids of clip paths and markers
    style: Any = {**_STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's fonts have it
        figure = Figure(figsize=size, facecolor=background)
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
        across = min(2, len(series))
        panels = figure.subplots(-(-len(series) // across), across, squeeze=False).flat
        for panel, one in zip(panels, series, strict=False):
            _draw(panel, one, titled=len(series) > 1)
            if len(series) > 1:
                panel.legend(
                    panel.get_legend_handles_labels()[0],
                    [_legend_label(curve.label) for curve in one.curves],
                    frameon=False,
                    fontsize=8.5,
                )
        for panel in panels:
            panel.set_axis_off()
        intervals = [interval for one in series for curve in one.curves for interval in curve.intervals]
        if background != "none" and any(one.n and math.isnan(one.mean) for one in intervals):
            figure.supxlabel("\N{MULTIPLICATION SIGN}: a run diverged", fontsize=9)  # a page explains it below
        if len(series) == 1:
            labels = [_legend_label(curve.label) for curve in series[0].curves]
            figure.legend(
                figure.axes[0].get_legend_handles_labels()[0],
                labels,
                loc="outside lower center",
                ncols=_legend_columns(labels, size[0]),
                frameon=False,
                fontsize=9,
            )
        stream = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(stream.getvalue())  # noqa: S314  (written by matplotlib; labels are escaped there)
    for metadata in root.findall("{*}metadata"):
        root.remove(metadata)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.keys() if "}" in name]:  # noqa: SIM118  (an element is no mapping)
            element.set(name.rpartition("}")[2], element.attrib.pop(name))
        if "style" in element.attrib:
            fonts = re.sub(r"(font: (?:[\w.]+ )*[\d.]+px )[^;]*", lambda m: m[1] + _FONTS, element.attrib["style"])
            element.set("style", fonts)
    return root


def _legend_label(text: str) -> str:
    """Wrap a long label; matplotlib leaves out labels that begin with an underscore."""
    return "\n".join(textwrap.wrap(visible(text), 54)).replace("_", " _", 1 if text.startswith("_") else 0)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Return the number of labels that fit side by side into a width in inches."""
    widths = [0.6 + 0.065 * max(map(len, label.split("\n"))) for label in labels]
    return max(1, len(labels) if sum(widths) <= width else int(width / max(widths)))


def _draw(axes: Any, series: Series, *, titled: bool) -> None:
    """Draw one panel: a line with a band per curve, and a cross where a run diverged."""
    from matplotlib.ticker import LogFormatter

    for index, curve in enumerate(series.curves):
        _draw_curve(axes, curve, index)
    axes.set(xlabel=visible(series.x_label), ylabel=visible(series.y_label))
    if titled:
        axes.set_title(visible(series.title), fontsize=10.5)
    for axis, logarithmic in ((axes.xaxis, series.log_x), (axes.yaxis, series.log_y)):
        if logarithmic:
            axis._set_axes_scale("log")
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # its default output is mathtext
    if all(isinstance(x, int) for curve in series.curves for x in curve.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    ticks = sorted({x for curve in series.curves for x in curve.x})
    if len(ticks) <= _MANY_POINTS and (series.log_x or _spaced(ticks)):
        axes.set_xticks(ticks, [f"{x:g}" if len(f"{x:g}") < 6 else f"{x:.3g}" for x in ticks])
        axes.minorticks_off()


def _spaced(ticks: Sequence[float]) -> bool:
    """Return True if the labels of the ticks do not overlap on a linear axis."""
    return all(after - before >= 0.08 * (ticks[-1] - ticks[0]) for before, after in pairwise(ticks))


def _draw_curve(axes: Any, curve: Curve, index: int) -> None:
    colour, few = CURVE_COLOURS[index % len(CURVE_COLOURS)], len(curve.x) <= _MANY_POINTS
    intervals = curve.intervals
    (line,) = axes.plot(
        curve.x,
        [i.mean for i in intervals],
        color=colour,
        linestyle=_LINES[index % len(_LINES)],
        marker=_MARKERS[index % len(_MARKERS)] if few else "none",
        label=f"curve {index + 1}",
    )
    line.set_gid(f"curve-{index + 1}")
    band = axes.fill_between(
        curve.x,
        [i.low for i in intervals],
        [i.high for i in intervals],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
    band.set_gid(f"band-{index + 1}")
    lost = [x for x, i in zip(curve.x, intervals, strict=True) if i.n and not math.isfinite(i.mean)]
    if lost:
        crosses = axes.plot(
            lost if few else lost[:1],
            [0.985 - 0.055 * index] * (len(lost) if few else 1),
            linestyle="none",
            marker="x",
            color=colour,
            markeredgewidth=1.8,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
        crosses[0].set_gid(f"diverged-{index + 1}")
