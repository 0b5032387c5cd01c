"""One self-contained page of many results: every verdict on top, each leading to its experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from backpass.errors import BackpassError
from backpass.files import write_whole
from backpass.report.claims import count_verdicts
from backpass.report.page import render, shown
from backpass.report.reading import read_result
from backpass.report.result import Result

__all__ = ["overview", "read_results", "write_overview"]


def overview(results: Sequence[Result]) -> str:
    """Return the page."""
    pages = [shown(result, f"{result.experiment}-{result.scale}-") for result in results]
    return render(
        "overview.html",
        pages=pages,
        verdicts=count_verdicts([claim for result in results for claim in result.claims]),
        scales=sorted({result.scale for result in results}, reverse=True),
    )


def read_results(
    folder: Path, names: Sequence[str] = (), damaged: Callable[[BackpassError], None] | None = None
) -> list[Result]:
    """Read every ``result.json`` at most two folders below.

    Args:
        folder: where to look.
        names: of experiments, in the order of the results; others follow.
        damaged: called with what is wrong with a file that cannot be read, which is then left out; None: it is raised.

    Raises:
        BackpassError: there is none that can be read, or one that cannot.
    """
    paths = sorted({*folder.glob("result.json"), *folder.glob("*/result.json"), *folder.glob("*/*/result.json")})
    if not paths:
        raise BackpassError(f"there is no result.json in {folder} or its folders: run backpass reproduce first.")
    results = []
    for path in paths:
        try:
            results.append(read_result(path))
        except BackpassError as error:
            if damaged is None:
                raise
            damaged(error)
    if not results:
        raise BackpassError(f"no result.json in {folder} or its folders can be read.")
    order = {name: place for place, name in enumerate(names)}
    return sorted(results, key=lambda result: (order.get(result.experiment, len(order)), result.scale))


def write_overview(folder: Path, results: Sequence[Result]) -> Path:
    """Write ``report.html`` over results into a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    return write_whole(folder / "report.html", overview(results))
