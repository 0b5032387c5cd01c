"""``backpass runs``: training runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backpass.cli.entry import app
from backpass.cli.printing import print_grid, say

if TYPE_CHECKING:
    from backpass.lab.training.listing import Run

__all__ = ["runs"]


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass runs runs[/green]  all runs in the folder runs and below

[green]backpass runs runs/a runs/b --sort robust[/green]  the most robust first

[green]backpass runs runs --json[/green]  for programs"""
)
def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs, or folders above them.", metavar="DIR...", show_default="runs"),
    ] = None,
    sort: Annotated[str, typer.Option(help="folder, accuracy, robust, loss or seconds.")] = "folder",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List training runs: status, settings, accuracy, robust accuracy, seconds."""
    from backpass.lab.training.listing import find_runs, sort_runs

    found = sort_runs(find_runs(folders or [Path("runs")]), sort)
    if as_json:
        import json
        from dataclasses import asdict

        say(json.dumps([asdict(run) for run in found], indent=2))
        return
    _print(found)


def _print(found: list[Run]) -> None:
    rows = [
        (
            run.folder,
            "\n".join(filter(None, (f"{run.data} {run.model}", run.rule, run.adversary))),
            run.status,
            f"{run.epoch}/{run.epochs}",
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.accuracy is None else f"{run.accuracy:.2%}",
            "" if run.robust_accuracy is None else f"{run.robust_accuracy:.1%}",
            f"{run.seconds:.0f}",
        )
        for run in found
    ]
    print_grid("", ("run", "training", "status", "epochs", "loss", "test", "robust", "s"), rows, words=(0, 1))
