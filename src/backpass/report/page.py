"""Self-contained HTML page of a result, and its numbers as JSON."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from backpass.files import write_whole
from backpass.report.claims import Claim, count_verdicts
from backpass.report.plots import inline_svg, interval_svg
from backpass.report.result import Cell, Result, Series
from backpass.report.statistics import Interval
from backpass.report.wording import NO_IMAGE, anchor, number, setting
from backpass.wording import visible

__all__ = ["estimate", "page", "render", "shown", "write_report"]


def page(result: Result) -> str:
    """Return the HTML page of a result, with inline style and SVG plots, no scripts and no external references.

    Every number of a table stands in a ``<data value="...">`` element that holds it unrounded. All text of the
    result is escaped here: every string in a template passes `visible` and the escaping of Jinja.
    """
    return render("report.html", page=shown(result))


def render(template: str, **content: Any) -> str:
    """Render a template of the package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=PackageLoader("backpass.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup is no plain str
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(cell=_cell, setting=setting, anchor=anchor)
    templates.filters["bar"] = lambda interval: Markup(interval_svg(interval))  # noqa: S704  (numbers alone)
    return templates.get_template(template).render(**content)


def shown(result: Result, prefix: str = "") -> dict[str, Any]:
    """Return the template context of a result.

    Args:
        result: the result.
        prefix: prefix of every HTML id, so that several results can share a page.
    """
    from markupsafe import Markup

    prefix = anchor(prefix)

    return {
        "result": result,
        "prefix": prefix,
        "plots": [
            {
                "series": series,
                "svg": Markup(inline_svg(replace(series, id=prefix + series.id))),  # noqa: S704
                "rows": _numbers(series),
            }
            for series in result.series
        ],
        "claims": [{"claim": claim, "estimate": estimate(claim)} for claim in result.claims],
        "verdicts": count_verdicts(result.claims),
    }


def estimate(claim: Claim) -> Interval:
    """Return the estimate of a claim with its confidence interval."""
    return Interval(claim.estimate, *claim.interval, claim.n)


def write_report(result: Result, out: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``result.json`` into the folder ``out``, each atomically.

    Returns:
        The paths of the page and of the JSON.

    Raises:
        OSError: the folder cannot be made or written.
    """
    html, numbers = page(result), result.as_json()  # render both before writing either
    return write_whole(out / "report.html", html), write_whole(out / "result.json", numbers)


def _numbers(series: Series) -> list[list[Cell]]:
    """Return the rows of the table under a plot: each x with the intervals of all curves."""
    places = sorted({x for curve in series.curves for x in curve.x})
    columns = [dict(zip(curve.x, curve.intervals, strict=True)) for curve in series.curves]
    return [[x, *(column.get(x, "") for column in columns)] for x in places]


def _cell(value: Cell, *, signed: bool = False) -> Any:
    """Return the HTML of a cell: escaped text, or a rounded number in an element with the unrounded value."""
    from markupsafe import Markup

    def datum(x: float) -> Markup:
        return Markup('<data value="{}">{}</data>').format(repr(x), number(x, signed=signed))

    if isinstance(value, str):
        return Markup.escape(visible(value))
    if isinstance(value, int):
        return Markup('<data value="{}">{}</data>').format(value, f"{value:,}")
    if isinstance(value, float):
        return Markup('<data value="{}">{}</data>').format(repr(value), f"{value:g}")
    if value.n == 0:
        return NO_IMAGE
    if math.isnan(value.low):
        return datum(value.mean)
    return Markup('<span class="interval">{} <span class="ends">[{}, {}]</span></span>').format(
        datum(value.mean), datum(value.low), datum(value.high)
    )
