"""``backpass sde compare``: adversarial training and SGD beside their SDEs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backpass.cli.printing import print_claims, print_findings, print_table, print_written, working
from backpass.cli.sde.group import group

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
    out.mkdir(parents=True, exist_ok=True)
    with working("loading torch") as report:
        from backpass.lab.experiments.sde.compare import Study, measure
        from backpass.lab.experiments.sde.compare_result import describe
        from backpass.report.page import write_report

        study = Study(
            paths=paths,
            t=t,
            records=records,
            eta=eta,
            eta_inner=eta_inner,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
        )
        measured = measure(study, report)
        result = describe(measured)
        written = write_report(result, out)
    for table in result.tables:
        print_table(table, columns=len(table.columns))
    print_claims(result, "Claims, 95 % intervals")
    print_findings(result)
    print_written(measured.seconds, written)
