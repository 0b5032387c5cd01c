"""``backpass demo``: what another backward pass does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backpass.cli.entry import app
from backpass.cli.printing import print_claims, print_findings, print_written, working

__all__ = ["demo"]


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass demo[/green]  the whole demo, about a minute on two cores

[green]backpass demo --quick[/green]  a smaller one, some seconds, to see that all works

[green]backpass demo --model cnn --out runs/cnn[/green]  another network; takes some minutes"""
)
def demo(
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Runs of each kind; verdicts need 3.", show_default="5")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A lab network for 8x8 images: mlp or cnn, with options after a colon.")
    ] = "mlp:widths=128-128-128",
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="3 seeds, fewer epochs, rates and radii.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also write the main plots to this SVG file.")] = None,
) -> None:
    """Train and attack the same network with plain and with linear backpropagation.

    The same weights, the same batches of real handwritten digits, the same learning rates: only the backward pass
    differs. Every comparison is paired over the seeds and comes with a 95 % interval and a verdict.
    """
    from dataclasses import replace

    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is better known before the work
    with working("loading torch") as report:
        from backpass.files import write_whole
        from backpass.lab.studies.demo.measure import SCALES, measure
        from backpass.lab.studies.demo.result import PICTURE, describe
        from backpass.report.page import write_report
        from backpass.report.plots import picture as draw

        size = replace(SCALES["quick" if quick else "standard"], model=model)
        settings = size if seeds is None else replace(size, seeds=seeds)
        measured = measure(settings, report)
        result = describe(measured)
        written = [*write_report(result, out)]
    if picture is not None:
        shown = [series for series in result.series if series.id in PICTURE]
        written.append(write_whole(picture, draw(shown, title=result.title)))
    print_claims(result, "Claims, paired over seeds, 95 % intervals")
    print_findings(result)
    print_written(measured.seconds, written)
