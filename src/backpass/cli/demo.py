"""``backpass demo``: four papers on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backpass.cli.entry import app
from backpass.cli.printing import print_claims, print_findings, print_written, working

__all__ = ["demo"]


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass demo[/green]  about a minute

[green]backpass demo --quick[/green]  some seconds, to see that the installation works"""
)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller networks and 3 seeds.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also write the plots to this SVG file.")] = None,
) -> None:
    """Show on real handwritten digits what changing the backward pass does.

    Four parts, each with 95 % intervals over seeds: attacks that transfer to another network (LinBP, SGM, BPA),
    implicit steps beside AdamW (ProxProp), training from bad initial weights (SIBP), and the SDE of adversarial
    training.
    """
    out.mkdir(parents=True, exist_ok=True)  # fails before the work rather than after it
    with working("loading torch") as report:
        from backpass.experiments.experiment import Context
        from backpass.experiments.running import run_here
        from backpass.files import write_whole
        from backpass.lab.threads import one_thread
        from backpass.papers.demo import DEMO
        from backpass.report.page import write_report
        from backpass.report.plots import picture as draw

        with one_thread():
            done = run_here(DEMO, "quick" if quick else "standard", out=out, context=Context(), progress=report)
        assert done is not None  # noqa: S101  (it stores)
        result = done[0]
        written = [*write_report(result, out)]
    if picture is not None:
        written.append(write_whole(picture, draw(result.series, title=result.title)))
    print_claims(result, "Claims, paired over seeds, 95 % intervals")
    print_findings(result)
    print_written(result.environment["seconds"], written)
