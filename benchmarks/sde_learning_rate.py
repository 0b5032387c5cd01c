"""ControlledLR against its rivals, and what it costs: writes docs/results/sde-learning-rate.{md,json}.

Run with BACKPASS_DATA set, from the repository root; about a quarter of an hour on one core. Interrupted, it goes on
from its stored outcomes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from backpass.errors import BackpassError
from backpass.experiments.image_rates import network
from backpass.experiments.running import Failed, run
from backpass.papers.learning_rates import EXPERIMENTS, images
from backpass.report.result import Cell, Result, Table
from backpass.report.statistics import Interval
from backpass.report.wording import interval_text
from backpass.training import ControlledLR, half_losses

OUT = Path("docs/results/sde-learning-rate")
ROUNDS, WARM = 40, 5


def cost(name: str, batch: int) -> float:
    """A measurement in units of a plain step: medians of interleaved runs in this process."""
    model = network(name, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = ControlledLR(optimizer)
    x, y = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
    plain, measured = [], []
    for _ in range(ROUNDS):
        begin = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        middle = time.process_time()
        scheduler.measure(half_losses(model, F.cross_entropy, x, y))
        plain.append(middle - begin)
        measured.append(time.process_time() - middle)
    return statistics.median(measured[WARM:]) / statistics.median(plain[WARM:])


def cell(value: Cell) -> str:
    return interval_text(value) if isinstance(value, Interval) else str(value)


def markdown(table: Table) -> str:
    """With a row per column of the result: the problems are many, the schedules have long names."""
    lines = ["| " + " | ".join([table.columns[0], *table.columns[1:]]) + " |", "| --- " * len(table.columns) + "|"]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows]
    return f"### {table.title}\n\n" + "\n".join(lines) + f"\n\n{table.note}\n"


def page(results: list[Result], costs: dict[str, float]) -> str:
    parts = ["# ControlledLR and its rivals\n"]
    environment = results[0].environment
    parts.append(
        f"PyTorch {environment['versions']['torch']}, one CPU thread. Written by `benchmarks/sde_learning_rate.py`; "
        f"the same comparisons are `backpass reproduce {' '.join(result.experiment for result in results)}`.\n"
    )
    parts.append("## What it costs\n")
    listed = ", ".join(f"{name}: {ratio:.1f}" for name, ratio in costs.items())
    parts.append(
        f"One measurement, in units of a plain forward, backward and step on the same batch ({listed}). With "
        "`every=n` a step costs one n-th of that more.\n"
    )
    for result in results:
        parts += [f"## {result.title}\n", result.question + "\n"]
        shared = {name: value for name, value in result.settings.items() if not isinstance(value, dict)}
        parts.append(f"{result.scale}: " + ", ".join(f"{k} {v}" for k, v in shared.items()) + ".\n")
        parts += [f"**{finding.topic}.** {finding.text}\n" for finding in result.findings]
        parts += [markdown(table) for table in result.tables]
        parts.append("### Verdicts\n")
        parts.append("| claim | difference | verdict |\n| --- | --- | --- |")
        parts += [
            f"| {c.statement} | {interval_text(Interval(c.estimate, *c.interval, c.n), signed=True)} | {c.verdict} |"
            for c in result.claims
        ]
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outcomes", type=Path, default=Path("runs/sde-learning-rate"), help="what is finished")
    parser.add_argument("--models", default="mlp,cnn", help="for MNIST")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    regression, mnist, adversarial = EXPERIMENTS
    mnist = replace(mnist, scales={"small": images(3, tuple(arguments.models.split(",")))})
    results = []
    for experiment in (regression, mnist, adversarial):
        (done,) = run([experiment], scale="small", out=arguments.outcomes, progress=print)
        if isinstance(done, Failed):
            raise BackpassError(done.reason)
        results.append(done.result)
    costs = {f"{name}, batch {batch}": cost(name, batch) for name in ("mlp", "cnn") for batch in (50, 500)}
    OUT.with_suffix(".md").write_text(page(results, costs))
    together = {"cost": costs, "results": [json.loads(result.as_json()) for result in results]}
    OUT.with_suffix(".json").write_text(json.dumps(together, indent=1) + "\n")


if __name__ == "__main__":
    main()
