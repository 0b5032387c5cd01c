"""``backpass sde weak-error``: how close the SDEs are to the chain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backpass.cli.sde.group import group
from backpass.cli.sde.showing import show

if TYPE_CHECKING:
    from backpass.experiments.experiment import Design

__all__ = ["weak_error"]


@group.command(
    epilog="""[bold]Examples[/bold]

[green]backpass sde weak-error[/green]  two steps of attack, in some seconds

[green]backpass sde weak-error --dim 2 --steps 3 --rho 3[/green]  two parameters, a stronger adversary"""
)
def weak_error(
    dim: Annotated[int, typer.Option(help="Parameters of the regression: 1 or 2.")] = 1,
    steps: Annotated[int, typer.Option(min=0, help="Steps of the adversary; 0 for plain SGD.")] = 2,
    rho: Annotated[float, typer.Option(min=0, help="The adversary's step size over the learning rate.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 1,
    t: Annotated[float, typer.Option(help="The horizon, in learning rates times steps.")] = 2.0,
    eta: Annotated[float, typer.Option(help="The largest learning rate.")] = 0.02,
    halvings: Annotated[int, typer.Option(min=1, help="How often it is halved.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/sde-weak-error"),
) -> None:
    """Measure the weak order of four SDEs against adversarial training, without Monte Carlo.

    A linear regression on four points; the chain's transfer operator against the exponential of each SDE's generator.
    """

    def table() -> Design:
        from backpass.experiments.weak_orders import Orders
        from backpass.papers.adversarial_sde import weak_orders

        return weak_orders(
            Orders(
                dimensions=(dim,), steps=(steps,), rhos=(rho,), batch_size=batch_size, t=t, largest=eta,
                halvings=halvings,
            )
        )  # fmt: skip

    show("sde-weak-error", table, out)
