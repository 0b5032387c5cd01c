"""``backpass reproduce`` and ``backpass report``: the papers' experiments, and one page of their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backpass.cli.entry import app
from backpass.cli.options import Device
from backpass.cli.printing import print_grid, print_overview, print_written, say, told_when_interrupted, working
from backpass.errors import BackpassError

if TYPE_CHECKING:
    from backpass.experiments.running import Done, Failed

__all__ = ["report", "reproduce", "verify"]


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass reproduce --list[/green]  the experiments, with the place in the paper

[green]backpass reproduce linbp-fig1 linbp-fig3[/green]  two of them, in some minutes

[green]backpass reproduce all --out runs/all[/green]  all, in about an hour on two cores; interrupted, it goes on

[green]backpass reproduce linbp-table1 --scale paper --device cuda[/green]  the paper's sizes, on a GPU"""
)
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Experiments, or all.")] = None,
    scale: Annotated[str, typer.Option(help="small: minutes on two cores. paper: the paper's sizes.")] = "small",
    out: Annotated[Path, typer.Option(help="Folder; each experiment gets one below.")] = Path("runs/reproduce"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Experiments side by side.", show_default="cores")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Recompute finished experiments.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List the experiments and exit.")] = False,
    cluster: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers run the experiments.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Run the papers' experiments and give a verdict on each of their claims.

    A finished experiment is kept, an interrupted one goes on from its finished runs.
    """
    import os
    import time

    if listing:
        _list(scale)
        return
    if not names:
        raise BackpassError("name an experiment, or all; backpass reproduce --list names them.")
    if out.exists() and not out.is_dir():
        raise BackpassError(f"--out {out} is a file: name a folder, new or of an earlier run.")
    _check_page(out)
    began = time.perf_counter()
    found: list[Done] = []
    failed: list[Failed] = []
    damaged: list[BackpassError] = []
    with working("loading torch") as show, told_when_interrupted("Finished runs are kept: the same command goes on."):
        from backpass.experiments.running import Done
        from backpass.experiments.running import run as run_experiments
        from backpass.lab.subjects import parse_device
        from backpass.papers import choose, experiment_names
        from backpass.report.claims import count_verdicts
        from backpass.report.overview import read_results, write_overview

        chosen = choose(names)
        place = parse_device(device)
        for ended in run_experiments(
            chosen,
            scale=scale,
            out=out,
            device=place,
            jobs=jobs or (1 if place.type == "cuda" else os.cpu_count() or 1),
            cluster=cluster,
            recompute=recompute,
            progress=lambda what: show(what, (len(found) + len(failed)) / len(chosen)),
        ):
            if isinstance(ended, Done):
                found.append(ended)
                counts = count_verdicts(ended.result.claims)
                told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
            else:
                failed.append(ended)
                told = f"failed: {ended.reason}"
            say(f"{ended.name} ({time.perf_counter() - began:.0f} s): {told}", err=True)
        page = write_overview(out, read_results(out, experiment_names(), damaged.append)) if found else None
    if found:
        print_overview([done.result for done in found])
    kept = [done.result.experiment for done in found if done.kept]
    if kept:
        say(f"\nKept from an earlier run: {', '.join(kept)}. --recompute computes them again.")
    if page is not None:
        print_written(time.perf_counter() - began, [page, *(path for done in found for path in done.paths[1:])])
    _tell(damaged)
    if failed:
        names_of = ", ".join(one.name for one in failed)
        raise BackpassError(f"{len(failed)} of {len(chosen)} experiments failed, see above: {names_of}.")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder whose folders hold results.", metavar="DIR")],
    markdown: Annotated[Path | None, typer.Option(help="Also write the verdicts to this Markdown file.")] = None,
) -> None:
    """Build one page of all results in a folder: every verdict on top, each leading to its experiment."""
    import time

    _check_page(folder)
    began = time.perf_counter()
    damaged: list[BackpassError] = []
    with working("drawing"):
        from backpass.files import write_whole
        from backpass.papers import experiment_names
        from backpass.report.markdown import verdicts
        from backpass.report.overview import read_results, write_overview

        results = read_results(folder, experiment_names(), damaged.append)
        written = [write_overview(folder, results)]
        if markdown is not None:
            written.append(write_whole(markdown, verdicts(results)))
    print_overview(results)
    print_written(time.perf_counter() - began, written)
    _tell(damaged)


@app.command()
def verify(
    path: Annotated[
        Path,
        typer.Argument(help="A result.json of reproduce, attack, transfer or demo, or its folder.", metavar="RESULT"),
    ],
) -> None:
    """Recompute every verdict of a result from its stored outcomes, and compare their hashes."""
    from backpass.experiments.verifying import verify as check
    from backpass.papers import EXPERIMENTS
    from backpass.papers.demo import DEMO

    found = check(path, (*EXPERIMENTS, DEMO))
    files = f"{found.outcomes} files of outcomes"
    basis = files if found.from_outcomes else "the numbers in the result"
    if found.outcomes and not found.from_outcomes:
        basis += f", SHA-256 of {files} compared"
    if found.problems:
        raise BackpassError(f"{len(found.problems)} of {path} do not agree: " + " ".join(found.problems))
    say(f"{found.claims} verdicts recomputed from {basis}: all agree.")


def _check_page(folder: Path) -> None:
    """Check that the page of verdicts would not replace the page of one result.

    Raises:
        BackpassError: the folder itself holds a result.
    """
    if (folder / "result.json").exists():
        raise BackpassError(
            f"{folder / 'report.html'} is the page of {folder / 'result.json'} and would be replaced: name another "
            "folder, such as the one above."
        )


def _tell(damaged: Sequence[BackpassError]) -> None:
    """End with the files that are not on the page because they cannot be read.

    Raises:
        BackpassError: there are such files.
    """
    if damaged:
        raise BackpassError("not on the page: " + " ".join(map(str, damaged)))


def _list(scale: str) -> None:
    from backpass.papers import EXPERIMENTS

    for experiment in EXPERIMENTS:
        experiment.design(scale)
    rows = [(one.name, one.title, one.source, ", ".join(one.data) or "made") for one in EXPERIMENTS]
    print_grid(f"{len(rows)} experiments", ("name", "what", "from", "data"), rows, words=(1, 2, 3))
