"""ControlledLR against fixed rates, linear and cosine decay and Polyak averaging: regression, and MNIST."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from torch import Tensor

from backpass.data import load_data
from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.experiments.sde.image_rates import Task, train
from backpass.lab.experiments.sde.regression_problems import PROBLEMS
from backpass.lab.experiments.sde.regression_rates import RATES, regress
from backpass.report.claims import Claim, judge
from backpass.report.result import Cell, Finding, Table
from backpass.report.statistics import geometric_interval, mean_interval

__all__ = ["EXPERIMENTS", "Images", "Regression"]

_SOURCE = (
    "Gu and Guo, arXiv 2105.08037v1, abstract (learning-rate control, a claim of version 1 alone); the rule is derived "
    "for this project"
)
_START = "the largest rate"
_TUNED = "best of 10 rates"

Ends = dict[str, list[float]]
"""A number per seed, by schedule."""


@dataclass(frozen=True, kw_only=True)
class Regression:
    """Sizes of the comparison on regression.

    Attributes:
        steps: of every run.
        runs: seeds.
        every: between measurements of the second `ControlledLR`.
    """

    steps: int = 2000
    runs: int = 5
    every: int = 10


@dataclass(frozen=True, kw_only=True)
class Images:
    """Sizes of the comparison on MNIST.

    Attributes:
        models: ``mlp``, ``cnn``.
        images: for training, the first of the training set.
        test: for judging, the first of the test set.
        epochs: of every run.
        batch: images per step.
        rate: the largest of the grid of ten, each half of the one before; where all schedules start.
        attack_steps: K of the adversary.
        eta_inner: its step.
        every: between measurements of `ControlledLR`.
        runs: seeds.
    """

    models: tuple[str, ...] = ("mlp", "cnn")
    images: int = 5000
    test: int = 1000
    epochs: int = 4
    batch: int = 50
    rate: float = 0.5
    attack_steps: int = 3
    eta_inner: float = 0.1
    every: int = 5
    runs: int = 3


def _regression(settings: Regression, bench: Bench) -> Outcome:
    effective: dict[str, Ends] = {}
    attacked: dict[str, Ends] = {}
    for problem in PROBLEMS:
        runs = [
            bench.pieces.value(
                f"{problem.name}, seed {seed}",
                partial(regress, problem, seed=seed, steps=settings.steps, every=settings.every),
                problem=asdict(problem),
                seed=seed,
                steps=settings.steps,
                every=settings.every,
            )
            for seed in range(settings.runs)
        ]
        effective[problem.name] = _ends(runs, settings.every, "")
        if problem.steps:
            attacked[problem.name] = _ends(runs, settings.every, " attacked")
    rivals = [name for name in next(iter(effective.values())) if not name.startswith("controlled")]
    return Outcome(
        findings=[_verdicts(effective, rivals, "excess of the effective loss")],
        series=[],
        claims=[_pooled(effective, rival) for rival in rivals],
        tables=[
            _ratios("effective", "Excess of the effective loss, relative to the best fixed rate", effective),
            _values("attacked", "Loss under the adversary, E L(x + delta_K)", attacked),
        ],
        data="made, Gaussian, fresh in every step; and scikit-learn's diabetes data, drawn with replacement",
        seeds=range(settings.runs),
        settings={"rates": f"{RATES}, from half of the stable one, each half of the one before"},
        claims_note="One pair per problem: the means of the logarithms over the seeds, which share their batches.",
    )


def _ends(runs: Sequence[Mapping[str, list[float]]], every: int, suffix: str) -> Ends:
    """The schedules that are compared; the best rate of a grid is the one with the lowest mean over these seeds."""

    def at(name: str, place: int | None) -> list[float]:
        rows = [run[name + suffix] for run in runs]
        if place is None:
            means = [math.fsum(column) for column in zip(*rows, strict=True)]
            place = min(range(len(means)), key=lambda i: means[i] if math.isfinite(means[i]) else math.inf)
        return [row[place] for row in rows]

    return {
        f"fixed, {_TUNED}": at("fixed", None),
        f"linear decay from {_START}": at("linear", 0),
        f"linear decay, {_TUNED}": at("linear", None),
        f"cosine from {_START}": at("cosine", 0),
        f"cosine, {_TUNED}": at("cosine", None),
        f"Polyak average at {_START}": at("Polyak", 0),
        f"Polyak average, {_TUNED}": at("Polyak", None),
        "controlled": at("controlled", 0),
        f"controlled, every {every}": at(f"controlled, every {every}", 0),
        "controlled, Polyak average": at("controlled, Polyak", 0),
    }


def _images(settings: Images, bench: Bench) -> Outcome:
    learn, judge_on = (load_data("mnist", split=split) for split in ("train", "test"))
    images = learn.first(settings.images).images
    test = judge_on.first(settings.test).images
    pairs = (images.x, images.y), (test.x, test.y)
    grid = [settings.rate * 0.5**place for place in range(RATES)]
    plans = [*(("fixed", rate) for rate in grid), *((name, grid[0]) for name in ("linear", "cosine", "controlled"))]
    tables: list[dict[str, Ends]] = [{}, {}, {}]
    for model in settings.models:
        for steps in (0, settings.attack_steps):
            task = Task(
                model=model,
                attack_steps=steps,
                eta_inner=settings.eta_inner,
                epochs=settings.epochs,
                batch=settings.batch,
                every=settings.every,
            )
            found = {
                (schedule, rate): [
                    bench.pieces.value(
                        f"{model}, K = {steps}, {schedule} {rate:g}, seed {seed}",
                        partial(_trained, task, schedule, rate, seed, *pairs),
                        task=asdict(task),
                        schedule=schedule,
                        rate=rate,
                        seed=seed,
                        images=[settings.images, settings.test],
                    )
                    for seed in range(settings.runs)
                ]
                for schedule, rate in plans
            }
            name = f"{model.upper()}, {f'adversarial, K = {steps}' if steps else 'plain'}"
            for table, metric in zip(tables, ("effective", "attacked", "accuracy"), strict=True):
                table[name] = _image_ends(found, grid, metric)
    effective, attacked, accuracy = tables
    rivals = [name for name in next(iter(effective.values())) if not name.startswith("controlled")]
    return Outcome(
        findings=[
            _verdicts(effective, rivals, "effective test loss"),
            _verdicts(attacked, rivals, "test loss under the adversary"),
        ],
        series=[],
        claims=[
            _in_one(task, table[task], rival, quantity)
            for table, quantity in ((effective, "effective test loss"), (attacked, "test loss under the adversary"))
            for task in table
            if table is effective or "adversarial" in task
            for rival in rivals
        ],
        tables=[
            _values("effective", "Effective test loss, E[L + K eta_I/2 |L_x|^2]", effective),
            _values("attacked", "Test loss under the adversary, E L(x + delta_K)", attacked),
            _values("accuracy", "Test accuracy under the adversary, per cent", accuracy),
        ],
        data=learn.description,
        seeds=range(settings.runs),
    )


def _trained(
    task: Task, schedule: str, rate: float, seed: int, images: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> list[dict[str, float]]:
    return [asdict(run) for run in train(task, schedule, rate, seed, images, test)]


def _image_ends(
    found: Mapping[tuple[str, float], Sequence[Sequence[Mapping[str, float]]]], grid: Sequence[float], metric: str
) -> Ends:
    def of(schedule: str, rate: float, averaged: int) -> list[float]:
        return [run[averaged][metric] for run in found[schedule, rate]]

    def best(averaged: int) -> list[float]:
        """The rate of the lowest mean effective loss over these seeds."""

        def badness(rate: float) -> float:
            total = math.fsum(run[averaged]["effective"] for run in found["fixed", rate])
            return total if math.isfinite(total) else math.inf

        return of("fixed", min(grid, key=badness), averaged)

    return {
        f"fixed, {_TUNED}": best(0),
        f"linear decay from {_START}": of("linear", grid[0], 0),
        f"cosine from {_START}": of("cosine", grid[0], 0),
        f"Polyak average at {_START}": of("fixed", grid[0], 1),
        f"Polyak average, {_TUNED}": best(1),
        "controlled": of("controlled", grid[0], 0),
        "controlled, Polyak average": of("controlled", grid[0], 1),
    }


def _verdicts(found: Mapping[str, Ends], rivals: Sequence[str], quantity: str) -> Finding:
    """Count the tasks in which ControlledLR has the lower mean."""
    lower = {
        rival: sum(math.fsum(ends["controlled"]) < math.fsum(ends[rival]) for ends in found.values())
        for rival in rivals
    }
    text = ", ".join(f"{count} of {len(found)} against {rival}" for rival, count in lower.items())
    return Finding(f"Lower mean {quantity}", f"ControlledLR has the lower mean in {text}.")


def _pooled(found: Mapping[str, Ends], rival: str) -> Claim:
    """Over the problems, of the mean logarithms over the seeds."""

    def logs(name: str) -> list[float]:
        return [math.fsum(map(math.log, ends[name])) / len(ends[name]) for ends in found.values()]

    return judge(
        f"below-{_slug(rival)}",
        f"Over the problems, ControlledLR ends lower than: {rival}",
        ours=logs("controlled"),
        theirs=logs(rival),
        direction="lower",
        quantity="log of the excess of the effective loss",
        reference=_SOURCE,
    )


def _in_one(task: str, ends: Ends, rival: str, quantity: str) -> Claim:
    return judge(
        _slug(f"{quantity.split()[-1]}-{task}-below-{rival}"),
        f"{task}: ControlledLR ends lower than: {rival}",
        ours=ends["controlled"],
        theirs=ends[rival],
        direction="lower",
        quantity=quantity,
        reference=_SOURCE,
    )


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _ratios(id_: str, title: str, found: Mapping[str, Ends]) -> Table:
    rows: list[list[Cell]] = []
    for schedule in next(iter(found.values())):
        row: list[Cell] = [schedule]
        for ends in found.values():
            base = ends[f"fixed, {_TUNED}"]
            row.append(geometric_interval([a / b for a, b in zip(ends[schedule], base, strict=True)]))
        rows.append(row)
    return Table(
        id=id_,
        title=title,
        columns=["Schedule", *found],
        rows=rows,
        note="Geometric means over the seeds of the ratio on the same batches, with 95 % intervals; lower is better.",
    )


def _values(id_: str, title: str, found: Mapping[str, Ends]) -> Table:
    return Table(
        id=id_,
        title=title,
        columns=["Schedule", *found],
        rows=[
            [schedule, *(mean_interval(ends[schedule]) for ends in found.values())]
            for schedule in next(iter(found.values()))
        ],
        note="Means over the seeds with 95 % intervals.",
    )


_QUESTION = (
    "ControlledLR measures when a learning rate has ceased to pay, and then lowers it. It starts at the largest rate "
    "and is told neither the number of steps nor the noise. Its rivals: ten fixed rates, of which the best is chosen "
    "in hindsight on the very numbers of the table; linear and cosine decay to zero over the known number of steps; "
    "and Polyak averaging over the second half at fixed rates. "
)

EXPERIMENTS = (
    Experiment(
        name="sde-learning-rate",
        title="Does the controlled learning rate beat a tuned one? Regression",
        question=_QUESTION + "Eight regression problems, two of them adversarial, none used to choose its settings.",
        source=_SOURCE,
        scales={"small": Regression(), "paper": Regression(steps=10_000, runs=20)},
        measure=_regression,
    ),
    Experiment(
        name="sde-learning-rate-mnist",
        title="Does the controlled learning rate beat a tuned one? MNIST",
        question=_QUESTION + "A perceptron and a convolutional network, plain and with an adversary of K ascent steps.",
        source=_SOURCE,
        scales={"small": Images(), "paper": Images(images=60_000, test=10_000, epochs=10, runs=10)},
        measure=_images,
        data=("mnist",),
    ),
)
