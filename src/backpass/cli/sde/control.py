"""``backpass sde control``: the best learning-rate schedule of a linear-quadratic problem."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backpass.cli.printing import print_findings, print_table, print_written, working
from backpass.cli.sde.group import group

__all__ = ["control"]


@group.command(
    epilog="""[bold]Examples[/bold]

[green]backpass sde control[/green]  in a few seconds

[green]backpass sde control --adversarial 0.5 --eta 0.05[/green]  with an adversary that adds .5 to the curvature"""
)
def control(
    curvature: Annotated[float, typer.Option(help="Curvature a of the loss at its minimum.")] = 1.0,
    noise: Annotated[float, typer.Option(help="Variance s^2 of a minibatch gradient.")] = 1.0,
    eta: Annotated[float, typer.Option(help="The largest learning rate.")] = 0.1,
    start: Annotated[float, typer.Option(help="Excess risk at the start.")] = 0.5,
    t: Annotated[float, typer.Option(help="The horizon, in largest learning rates times steps.")] = 10.0,
    adversarial: Annotated[float, typer.Option(help="Curvature that an adversary adds, K eta_I V''.")] = 0.0,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/sde-control"),
) -> None:
    """Compute the learning-rate schedule with the smallest excess risk at a horizon.

    In closed form, by the Hamilton-Jacobi-Bellman equation, and beside the best fixed rate.
    """
    out.mkdir(parents=True, exist_ok=True)
    with working("loading torch"):
        from backpass.experiments.optimal_rate import Quadratic, compare_schedules
        from backpass.report.page import write_report

        settings = Quadratic(curvature=curvature, noise=noise, eta=eta, start=start, t=t, adversarial=adversarial)
        result = compare_schedules(settings)
        written = write_report(result, out)
    for table in result.tables:
        print_table(table, columns=len(table.columns))
    print_findings(result)
    print_written(result.environment["seconds"], written)
