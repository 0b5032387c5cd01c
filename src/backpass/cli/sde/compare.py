"""``backpass sde compare``: adversarial training and SGD beside their SDEs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backpass.cli.sde.group import group
from backpass.cli.sde.showing import show

if TYPE_CHECKING:
    from backpass.experiments.experiment import Design

__all__ = ["compare"]


@group.command(
    epilog="""[bold]Examples[/bold]

[green]backpass sde compare[/green]  100 paths of each, some minutes: the SDE costs far more than what it models

[green]backpass sde compare --paths 20 --t 5[/green]  a smaller one, to see that all works"""
)
def compare(
    paths: Annotated[int, typer.Option(min=2, help="Paths of each chain and of each SDE.")] = 100,
    t: Annotated[float, typer.Option(help="The horizon, in learning rates times steps.")] = 20.0,
    records: Annotated[int, typer.Option(min=3, help="How often the paths are looked at.")] = 10,
    eta: Annotated[float, typer.Option(help="The learning rate.")] = 0.1,
    eta_inner: Annotated[float, typer.Option(help="The adversary's step size.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the adversary.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Of data, start and draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/sde-compare"),
) -> None:
    """Train a small tanh network by SGD and with an adversary, and compare both with what their SDEs predict.

    Recorded are the mean squared input gradient, the clean loss and the loss under the training attack.
    """

    def table() -> Design:
        from backpass.experiments.robustness import Paired
        from backpass.papers.adversarial_sde import robustness

        settings = Paired(
            paths=paths, t=t, records=records, eta=eta, eta_inner=eta_inner, steps=steps, batch_size=batch_size
        )
        return robustness(settings, seed)

    show("sde-robustness", table, out)
