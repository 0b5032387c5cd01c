"""What several commands print in the same way: results on stdout, what is going on on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from backpass.lab.result import Cell, Result
    from backpass.lab.result import Table as Numbers

__all__ = [
    "print_claims",
    "print_findings",
    "print_overview",
    "print_table",
    "print_written",
    "told_when_interrupted",
    "working",
]

_COLOURS = {"holds": "green", "does not hold": "red", "undecided": "yellow"}


@contextmanager
def working(what: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar while something goes on; yields what sets it: (what is going on, the part done)."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda now, part: bar.update(task, description=now, completed=part)


@contextmanager
def told_when_interrupted(text: str) -> Iterator[None]:
    """Ctrl-C inside says so on stderr, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. {text}", markup=False, highlight=False, soft_wrap=True)
        raise


def print_claims(result: Result, title: str) -> None:
    """The claims with their differences and verdicts."""
    from backpass.lab.report import estimate
    from backpass.lab.wording import interval_text

    table = Table(title=title, title_justify="left", show_lines=False)
    table.add_column("claim", overflow="fold")
    table.add_column("measured", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for claim in result.claims:
        difference = interval_text(estimate(claim), signed=True)
        table.add_row(claim.statement, difference, f"[{_COLOURS[claim.verdict]}]{claim.verdict}[/]")
    Console().print(table)


def print_overview(results: Sequence[Result]) -> None:
    """Every claim of several results with its verdict, and how many have each."""
    from backpass.lab.report import count_verdicts, estimate
    from backpass.lab.wording import interval_text

    table = Table(
        title="Claims and verdicts: what is claimed of, less what it is compared with; 95 % intervals",
        title_justify="left",
    )
    table.add_column("claim", overflow="fold")
    table.add_column("measured", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for result in results:
        table.add_section()
        table.add_row(f"[bold]{result.experiment}[/]  {result.source}", "", "")
        for claim in result.claims:
            numbers = interval_text(estimate(claim), signed=True)
            words = f"{escape(claim.statement)} [dim]({escape(claim.quantity)})[/]"
            table.add_row(words, numbers, f"[{_COLOURS[claim.verdict]}]{claim.verdict}[/]")
    Console().print(table)
    counts = count_verdicts([claim for result in results for claim in result.claims])
    Console().print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def print_table(numbers: Numbers, columns: int) -> None:
    """The first columns of a table of the report."""
    table, console = Table(title=numbers.title, title_justify="left"), Console()
    of_words = [any(isinstance(row[at], str) and row[at] for row in numbers.rows) for at in range(columns)]
    cells = [list(map(_cell, row[:columns])) for row in numbers.rows]
    wide = sum(max(len(row[at]) for row in cells) for at in range(columns) if not of_words[at] and cells)
    # Numbers stay whole, unless they fill the line: then intervals are broken, and names stay whole.
    broken = wide > console.width / 2
    for column, words in zip(numbers.columns[:columns], of_words, strict=True):
        table.add_column(column, overflow="fold", no_wrap=words is broken)
    for row in cells:
        table.add_row(*row)
    console.print(table)


def print_findings(result: Result) -> None:
    """The findings as a list."""
    for finding in result.findings:
        Console().print(f"\N{BULLET} {finding.topic}. {finding.text}", markup=False, highlight=False)


def print_written(seconds: float, paths: Sequence[Path]) -> None:
    """How long it took, and where the results are."""
    Console().print(f"\n{seconds:.0f} s. Written: {', '.join(map(str, paths))}", markup=False, soft_wrap=True)


def _cell(value: Cell) -> str:
    from backpass.lab.statistics import Interval
    from backpass.lab.wording import interval_text

    if isinstance(value, Interval):
        return interval_text(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
