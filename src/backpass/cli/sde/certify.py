"""``backpass sde certify``: whether the SDE describes a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backpass.cli.printing import print_findings, print_table, print_written, working
from backpass.cli.sde.group import group

__all__ = ["certify"]


@group.command(
    epilog="""[bold]Examples[/bold]

[green]backpass sde certify runs/robust[/green]  a folder of backpass train, from its last weights

[green]backpass sde certify recipes/robust-mnist.toml --steps 20 --replicas 4 --no-predict[/green]
  from initial weights"""
)
def certify(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, or a recipe's file.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of training that the certificate is for.")] = 50,
    replicas: Annotated[int, typer.Option(min=4, help="Independent runs at each amplification.")] = 8,
    amplifications: Annotated[str, typer.Option(help="Amplifications l of SVAG, from 1.")] = "1,4",
    probe: Annotated[int, typer.Option(min=2, help="Images on which losses are measured.")] = 256,
    limit: Annotated[int, typer.Option(min=2, help="Training images in memory.")] = 10_000,
    predict: Annotated[bool, typer.Option(help="Explore other learning rates and adversaries.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/sde-certify"),
) -> None:
    """Check whether the SDE describes a training run, and predict its losses at other settings.

    Compares training with its SVAG amplifications, and measures curvature, noise, tails and the effect of permuting.
    """
    with working("loading torch") as report:
        from backpass.errors import BackpassError
        from backpass.experiments.certificate import Study, certify_run
        from backpass.experiments.certificate_page import describe
        from backpass.report.page import write_report

        try:
            ls = tuple(int(part) for part in amplifications.split(","))
        except ValueError as error:
            raise BackpassError(
                f"--amplifications must be whole numbers such as 1,4,16; got {amplifications!r}."
            ) from error
        study = Study(
            run=run,
            steps=steps,
            replicas=replicas,
            amplifications=ls,
            probe=probe,
            limit=limit,
            predict=predict,
            seed=seed,
        )
        certified = certify_run(study, report)
        result = describe(certified)
        out.mkdir(parents=True, exist_ok=True)
        written = write_report(result, out)
    for table in result.tables:
        print_table(table, columns=len(table.columns))
    print_findings(result)
    print_written(certified.seconds, written)
