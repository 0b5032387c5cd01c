"""Self-contained HTML page of several results: a filtered table of all claims, then each experiment."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from backpass.errors import BackpassError
from backpass.files import write_whole
from backpass.report.claims import Claim, count_verdicts
from backpass.report.page import render, shown
from backpass.report.reading import read_result
from backpass.report.result import Result

__all__ = ["overview", "paper_of", "read_results", "write_overview"]

_PAPER = re.compile(r".*?(arXiv \d{4}\.\d{4,5}|\b(19|20)\d\d\b)")


def overview(results: Sequence[Result]) -> str:
    """Return the HTML of the overview page.

    The filters are radio buttons that style sheets read, so that the page has no script.
    """
    pages = [shown(result, f"{place}-{result.experiment}-{result.scale}-") for place, result in enumerate(results, 1)]
    claims = [(result, claim) for result in results for claim in result.claims]
    filters: dict[str, Mapping[str, int]] = {
        "Paper": Counter(paper_of(result) for result, _ in claims),
        "Verdict": count_verdicts([claim for _, claim in claims]),
        "Setting": Counter(claim.setting for _, claim in claims),
    }
    places = {name: {value: place for place, value in enumerate(counts)} for name, counts in filters.items()}

    def classes(result: Result, claim: Claim) -> str:
        """Return the classes by which the filters find a row."""
        values = {"Paper": paper_of(result), "Verdict": claim.verdict, "Setting": claim.setting}
        return " ".join(f"{name.lower()}-{places[name][value]}" for name, value in values.items())

    return render("overview.html", pages=pages, filters=filters, count=len(claims), classes=classes, paper=paper_of)


def paper_of(result: Result) -> str:
    """Return the paper of a result: its source up to the number of an arXiv paper or the year."""
    found = _PAPER.match(result.source)
    return found[0] if found else result.source or "asked here"


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
        raise BackpassError(
            f"there is no result.json in {folder} or its folders: name a folder in which results were written."
        )
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
