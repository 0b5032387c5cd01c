"""Plots as SVG text: for a page, where they take its colours and fonts, and as a picture of their own."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from backpass.lab.result import Curve, Series

__all__ = ["CURVE_COLOURS", "inline_svg", "picture"]

CURVE_COLOURS = ("#0b62a8", "#c2410c", "#4d7c0f", "#7e22ce", "#be185d", "#0f766e")
"""Of the curves, in order: on white all have a contrast above 4.5, and none is told by hue alone."""

_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)), (0, (1, 3)))
_MARKERS = "osD^vP"
_INK, _GRID = "#1f2328", "#d0d7de"
_MANY_POINTS = 9  # a curve with more points is drawn without markers
_FONTS = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
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
    """A plot for the inside of a page.

    Its ink is the page's ``currentColor``, its grid ``var(--grid)`` and its curves ``var(--curve-1)`` and on, so
    that it follows light and dark; every id begins with the series' own, so that several fit on one page.
    """
    svg = _render([series], size=(4.3, 3.4))
    prefix = f"plot-{series.id}"
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for index, colour in enumerate(CURVE_COLOURS, start=1):
        svg = svg.replace(colour, f"var(--curve-{index})")
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None  # noqa: S101  (matplotlib always writes one)
    head = (
        f'<svg class="plot" id="{prefix}" viewBox="{box[1]}" role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{escape(series.title)}</title>'
        f'<desc id="{prefix}-desc">{escape(series.description)}</desc>'
    )
    return re.sub(r"<svg\b[^>]*>", lambda _: head, svg, count=1)


def picture(series: Sequence[Series], *, title: str) -> str:
    """Plots side by side as one SVG file on white, for a README."""
    svg = _render(series, size=(4.3 * len(series), 3.6), background="white")
    return re.sub(r"(<svg\b[^>]*>)", lambda m: f"{m[1]}\n <title>{escape(title)}</title>", svg, count=1)


def _render(series: Sequence[Series], *, size: tuple[float, float], background: str = "none") -> str:
    """Draw one panel per series and return matplotlib's SVG without prolog and metadata."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    salt = "+".join(one.id for one in series)  # clip paths and markers get the same ids in every run
    style: Any = {**_STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, facecolor=background)
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
        panels = figure.subplots(1, len(series), squeeze=False)[0]
        for panel, one in zip(panels, series, strict=True):
            _draw(panel, one, titled=len(series) > 1)
        handles, labels = panels[0].get_legend_handles_labels()
        if background != "none":  # a page explains the crosses below its plots; a picture must by itself
            handles.append(Line2D([], [], linestyle="none", marker="x", markeredgewidth=1.8, color=_INK))
            labels.append("a run diverged")
        columns = _legend_columns(labels, size[0])
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        stream = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"(font: (?:[\w.]+ )*[\d.]+px )[^;\"]*", lambda m: m[1] + _FONTS, svg)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """All in one row where they fit into the width, in inches; else as many columns of the widest as do."""
    widths = [0.6 + 0.065 * len(label) for label in labels]
    return len(labels) if sum(widths) <= width else max(1, int(width / max(widths)))


def _draw(axes: Any, series: Series, *, titled: bool) -> None:
    """One panel: a line with its band per curve, and a cross where a run has diverged."""
    for index, curve in enumerate(series.curves):
        _draw_curve(axes, curve, index)
    axes.set(xlabel=series.x_label, ylabel=series.y_label)
    if titled:
        axes.set_title(series.title, fontsize=10.5)
    for axis, logarithmic in ((axes.xaxis, series.log_x), (axes.yaxis, series.log_y)):
        if logarithmic:
            axis._set_axes_scale("log")
            axis.set_major_formatter("{x:g}")
    if all(isinstance(x, int) for curve in series.curves for x in curve.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    ticks = sorted({x for curve in series.curves for x in curve.x})
    if len(ticks) <= _MANY_POINTS:
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()


def _draw_curve(axes: Any, curve: Curve, index: int) -> None:
    colour, few = CURVE_COLOURS[index % len(CURVE_COLOURS)], len(curve.x) <= _MANY_POINTS
    intervals = curve.intervals
    (line,) = axes.plot(
        curve.x,
        [i.mean for i in intervals],
        color=colour,
        linestyle=_LINES[index % len(_LINES)],
        marker=_MARKERS[index % len(_MARKERS)] if few else "none",
        label=curve.label,
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
    lost = [x for x, i in zip(curve.x, intervals, strict=True) if not math.isfinite(i.mean)]
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
