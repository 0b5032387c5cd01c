"""Self-contained HTML page of several results, with a linked summary of all verdicts at the top."""

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
    """Return the HTML of the overview page."""
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
        folder: folder to search.
        names: names of experiments, in the order of the returned results; other experiments follow.
        damaged: called with a message for each unreadable file, which is then skipped; None raises the error.

    Raises:
        BackpassError: no result can be read, or, without ``damaged``, a file is unreadable.
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
    """Write the overview page of results as ``report.html`` into a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    return write_whole(folder / "report.html", overview(results))
