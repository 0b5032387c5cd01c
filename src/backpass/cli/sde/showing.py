"""An experiment at the sizes of a command line: run, written and printed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from backpass.cli.printing import print_claims, print_findings, print_table, print_written, working

if TYPE_CHECKING:
    from collections.abc import Callable

    from backpass.experiments.experiment import Design

__all__ = ["show"]


def show(name: str, make: Callable[[], Design], out: Path) -> None:
    """Run one of the SDE's experiments and print its page.

    Args:
        name: of the experiment.
        make: returns its table.
        out: folder for report.html and result.json.

    Raises:
        BackpassError: a setting is out of its range.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with working("loading torch") as report:
        from backpass.errors import BackpassError
        from backpass.experiments.running import Failed, run
        from backpass.papers import adversarial_sde
        from backpass.report.page import write_report

        (experiment,) = (one for one in adversarial_sde.EXPERIMENTS if one.name == name)
        experiment = replace(experiment, scales={"standard": make()})
        with TemporaryDirectory() as outcomes:
            (done,) = run([experiment], scale="standard", out=Path(outcomes), progress=lambda what: report(what, 0.0))
        if isinstance(done, Failed):
            raise BackpassError(done.reason)
        written = write_report(done.result, out)
    for table in done.result.tables:
        print_table(table, columns=len(table.columns))
    print_claims(done.result, "Claims, 95 % intervals")
    print_findings(done.result)
    print_written(time.perf_counter() - began, written)
