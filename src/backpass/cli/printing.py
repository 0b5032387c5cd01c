"""Output that several commands share: results on stdout, progress on stderr.

Every text from outside is printed through `_text` or `say`: it is never markup, an emoji code
or a control sequence.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from backpass.wording import visible

if TYPE_CHECKING:
    from backpass.report.result import Cell, Result
    from backpass.report.result import Table as Numbers

__all__ = [
    "print_claims",
    "print_findings",
    "print_grid",
    "print_overview",
    "print_table",
    "print_written",
    "say",
    "told_when_interrupted",
    "working",
]

_COLOURS = {
    "replicated": "green", "contradicted": "red", "same direction": "green", "opposite direction": "red",
    "undecided": "yellow",
    "finished": "green", "running": "cyan", "interrupted": "yellow", "diverged": "red",
}  # fmt: skip
_TERMINATED = 143  # exit code after SIGTERM
_EVERY = 5.0  # seconds between lines of progress
_NARROWEST = 8  # characters of a column of words; below that a table is printed as a list


@contextmanager
def working(what: str) -> Iterator[Callable[[str, float], None]]:
    """Show progress; yield a function that sets it: (description, share in [0, 1]).

    A terminal has a bar, any other stderr a line every few seconds.
    """
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda now, part: bar.update(task, description=visible(now), completed=part)


class _Lines:
    """Progress as lines on stderr."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._text = ""

    def __call__(self, now: str, part: float) -> None:
        text = f"{now}: {part:.0%}"
        if text != self._text and time.monotonic() - self._last >= _EVERY:
            self._last, self._text = time.monotonic(), text
            say(text, err=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


@contextmanager
def told_when_interrupted(text: str) -> Iterator[None]:
    """Print how to continue to stderr after Ctrl-C or SIGTERM."""

    def terminate(*_: object) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        Console(stderr=True).print(f"Interrupted. {text}", markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, Terminated):
            raise SystemExit(_TERMINATED) from None
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def say(text: object, *, err: bool = False) -> None:
    """Print a line."""
    typer.echo(visible(text), err=err)


def print_grid(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str] | str], words: Sequence[int] = (0,)
) -> None:
    """Print a table with all numbers in full; in a terminal too narrow for that, print a list.

    Args:
        title: above the table.
        columns: the headings.
        rows: one cell per column; a single string is a heading over the rows that follow.
        words: the columns whose cells may be wrapped.
    """
    console = Console()
    widths = _widths(columns, rows, words, console.width)
    if widths is None:  # an interval below its mean takes less room than beside it
        stacked = [row if isinstance(row, str) else [cell.replace(" [", "\n[") for cell in row] for row in rows]
        widths = _widths(columns, stacked, words, console.width)
        if widths is None:
            _print_list(console, title, columns, rows)
            return
        rows = stacked
    table = Table(title=_text(title), title_justify="left")
    for column, width in zip(columns, widths, strict=True):
        table.add_column(_text(column), width=width, overflow="fold")
    for row in rows:
        if isinstance(row, str):
            table.add_section()
            table.add_row(Text(visible(row), style="bold"))
        else:
            table.add_row(*map(_text, row))
    console.print(table)


def _widths(
    columns: Sequence[str], rows: Sequence[Sequence[str] | str], words: Sequence[int], available: int
) -> list[int] | None:
    """Return the columns' widths, those of numbers as wide as their longest cell; None where that leaves no room."""
    cells = [row for row in rows if not isinstance(row, str)]
    longest = [max([_width(row[at]) for row in cells], default=0) for at in range(len(columns))]
    widths = [
        max(longest[at], min(_NARROWEST, max([*map(cell_len, column.split()), 1]))) for at, column in enumerate(columns)
    ]
    room = available - 3 * len(columns) - 1 - sum(width for at, width in enumerate(widths) if at not in words)
    for left, at in zip(range(len(words), 0, -1), sorted(words, key=lambda at: widths[at]), strict=True):
        share = room // left
        if share < min(widths[at], _NARROWEST):
            return None
        widths[at] = min(widths[at], share)
        room -= widths[at]
    return widths if room >= 0 else None


def _print_list(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str] | str]) -> None:
    if title:
        console.print(Text(visible(title), style="italic"))
    for row in rows:
        if isinstance(row, str):
            console.print(Text(visible(row), style="bold"))
            continue
        console.print(_text(row[0]))
        for column, cell in zip(columns[1:], row[1:], strict=True):
            console.print(Text(f"  {visible(column)}: ") + _text(cell.replace("\n", ", ")))


def _text(cell: str) -> Text:
    return Text(visible(cell), style=_COLOURS.get(cell, ""))


def _width(cell: str) -> int:
    return max([*map(cell_len, visible(cell).split("\n")), 1])


def print_claims(result: Result, title: str) -> None:
    """Print the claims with their differences and verdicts."""
    from backpass.report.page import estimate
    from backpass.report.wording import interval_text

    rows = [(claim.statement, interval_text(estimate(claim), signed=True), claim.verdict) for claim in result.claims]
    print_grid(title, ("claim", "measured", "verdict"), rows)


def print_overview(results: Sequence[Result]) -> None:
    """Print every claim of several results with its verdict, and the number of claims by verdict."""
    from backpass.report.claims import count_verdicts
    from backpass.report.page import estimate
    from backpass.report.wording import interval_text

    rows: list[Sequence[str] | str] = []
    for result in (result for result in results if result.claims):
        rows.append(f"{result.experiment}  {result.source or result.title}")
        for claim in result.claims:
            measured = interval_text(estimate(claim), signed=True)
            rows.append((f"{claim.statement} ({claim.quantity})", measured, claim.verdict))
    title = "Claims and verdicts: what is claimed of, less what it is compared with; 95 % intervals"
    print_grid(title, ("claim", "measured", "verdict"), rows)
    counts = count_verdicts([claim for result in results for claim in result.claims])
    say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def print_table(numbers: Numbers, columns: int) -> None:
    """Print the first columns of a table of the report."""
    rows = [[_cell(cell) for cell in row[:columns]] for row in numbers.rows]
    heads = list(numbers.columns[:columns])
    words = [at for at in range(len(heads)) if all(isinstance(row[at], str) for row in numbers.rows)]
    print_grid(numbers.title, heads, rows, words or (0,))


def print_findings(result: Result) -> None:
    """Print the findings as a list."""
    for finding in result.findings:
        Console().print(_text(f"\N{BULLET} {finding.topic}. {finding.text}"))


def print_written(seconds: float, paths: Sequence[Path]) -> None:
    """Print the duration and the files written."""
    say(f"\n{seconds:.0f} s. Written: {', '.join(map(str, paths))}")


def _cell(value: Cell) -> str:
    from backpass.report.statistics import Interval
    from backpass.report.wording import interval_text

    if isinstance(value, Interval):
        return interval_text(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
