"""``backpass sde long-run``: the stationary law of adversarial training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backpass.cli.printing import print_claims, print_findings, print_table, print_written, working
from backpass.cli.sde.group import group

__all__ = ["long_run"]


@group.command(
    epilog="""[bold]Examples[/bold]

[green]backpass sde long-run[/green]  two parameters, 400 paths, in less than a minute

[green]backpass sde long-run --dim 1 --steps 0[/green]  plain SGD with one parameter"""
)
def long_run(
    dim: Annotated[int, typer.Option(help="Parameters of the regression: 1 or 2.")] = 2,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the adversary; 0 for plain SGD.")] = 2,
    eta: Annotated[float, typer.Option(help="The learning rate.")] = 0.02,
    eta_inner: Annotated[float, typer.Option(help="The adversary's step size.")] = 0.1,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 1,
    paths: Annotated[int, typer.Option(help="Independent runs, at least 8.")] = 400,
    relaxations: Annotated[float, typer.Option(help="Length of a run, in relaxation times.")] = 16.0,
    seed: Annotated[int, typer.Option(help="Of the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/sde-long-run"),
) -> None:
    """Run adversarial training into its stationary law, and compare it with the prediction.

    The shifted minimum, the mean, the covariance and the rate of relaxation, and whether fluctuation and dissipation
    balance.
    """
    out.mkdir(parents=True, exist_ok=True)
    with working("loading torch"):
        from backpass.lab.experiments.sde.long_run import Study, describe, measure
        from backpass.report.page import write_report

        study = Study(
            dimension=dim,
            steps=steps,
            eta=eta,
            eta_inner=eta_inner,
            batch_size=batch_size,
            paths=paths,
            relaxations=relaxations,
            seed=seed,
        )
        measured = measure(study)
        result = describe(measured)
        written = write_report(result, out)
    for table in result.tables:
        print_table(table, columns=len(table.columns))
    print_claims(result, "Claims, 95 % intervals")
    print_findings(result)
    print_written(measured.seconds, written)
