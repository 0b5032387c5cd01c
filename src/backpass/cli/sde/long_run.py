"""``backpass sde long-run``: the stationary law of adversarial training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backpass.cli.sde.group import group
from backpass.cli.sde.showing import show

if TYPE_CHECKING:
    from backpass.experiments.experiment import Design

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

    def table() -> Design:
        from backpass.experiments.long_run import LongRun
        from backpass.papers import adversarial_sde

        settings = LongRun(
            dimension=dim,
            steps=steps,
            eta=eta,
            eta_inner=eta_inner,
            batch_size=batch_size,
            paths=paths,
            relaxations=relaxations,
        )
        return adversarial_sde.long_run(settings, seed)

    show("sde-long-run", table, out)
