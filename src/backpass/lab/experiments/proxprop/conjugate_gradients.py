"""ProxProp solved by a few steps of conjugate gradients: how near to the exact direction, how good, how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.bench.images import Parts, Source, load_parts
from backpass.lab.bench.training import Curves, Run, curves, network
from backpass.lab.experiments.proxprop.directions import directions
from backpass.lab.experiments.proxprop.training import NESTEROV
from backpass.lab.training.optimizers import make_optimizer
from backpass.report.claims import Claim, judge, judge_within
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval
from backpass.report.wording import interval_text
from backpass.rules import parse_rule
from backpass.training import Trainer
from backpass.wording import listing

__all__ = ["EXPERIMENTS", "Solvers"]

_PAPER = "Frerix et al., arXiv 1706.04638"


@dataclass(frozen=True, kw_only=True)
class Solvers:
    """The settings.

    Attributes:
        model: the text form of a network of the lab.
        source: of the images.
        batch: images per step.
        marks: the numbers of steps after which a network in training is judged, ascending.
        judged: at most so many images of each part are judged.
        tau: of training.
        rate: of SGD on a proximal direction.
        plain_rate: of SGD on the gradient.
        cg_steps: numbers of conjugate-gradient steps, ascending.
        taus: at which directions are measured.
        warm: steps of SGD before that.
        seeds: how many runs of each kind.
    """

    model: str
    source: Source
    batch: int = 500
    marks: tuple[int, ...]
    judged: int
    tau: float = 0.05
    rate: float = 1.0
    plain_rate: float = 0.05
    cg_steps: tuple[int, ...] = (3, 5, 10)
    taus: tuple[float, ...] = (1e-3, 1e-2, 0.05, 1.0, 1e2, 1e4)
    warm: int = 5
    seeds: int = 3

    @property
    def solvers(self) -> dict[str, str]:
        """The rules' text forms by name, with ``{tau}`` in the place of tau."""
        exact = "proxprop:tau={tau},stop=-1"
        return {"exact": exact, **{f"CG-{k}": f"{exact},solver=cg,cg_steps={k}" for k in self.cg_steps}}


Directions = list[dict[str, dict[str, float]]]
"""For every tau, what `directions` tells."""


def _directions(settings: Solvers, seed: int, device: torch.device) -> Directions:
    parts = load_parts(settings.source)
    run = _run(settings, "bp", settings.plain_rate, seed)
    model = network(run, parts, settings.source.data).to(device)
    optimizer = make_optimizer(run.optimizer, model.parameters(), run.rate)
    batches = _batches(parts, settings.batch, seed, device)
    x, y = map(torch.cat, zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=settings.batch)  # in this order
    Trainer(model, optimizer, loader, epochs=settings.warm, max_steps=settings.warm).fit()
    x, y = batches[settings.warm % len(batches)]
    return [
        directions(model, x, y, {name: parse_rule(_at_tau(text, tau)) for name, text in settings.solvers.items()})
        for tau in settings.taus
    ]


def _at_tau(text: str, tau: float) -> str:
    return text.replace("{tau}", f"{tau:g}")


def _batches(parts: Parts, size: int, seed: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(parts.train), generator=torch.Generator().manual_seed(seed))
    train = parts.train
    rows = torch.split(order[: len(order) // size * size], size)
    return [((train.pixels[r].float() / train.white).to(device), train.labels[r].to(device)) for r in rows[:32]]


def _run(settings: Solvers, rule: str, rate: float, seed: int) -> Run:
    return Run(
        model=settings.model,
        rule=rule,
        optimizer=NESTEROV,
        rate=rate,
        batch=settings.batch,
        marks=settings.marks,
        judged=settings.judged,
        seed=seed,
        normalise=True,
    )


def _measure(settings: Solvers, bench: Bench) -> Outcome:
    seeds = range(settings.seeds)
    told = [
        bench.pieces.value(
            f"directions, seed {seed}",
            partial(_directions, settings, seed, bench.device),
            **asdict(settings),
            seed=seed,
            device=bench.device.type,
        )
        for seed in seeds
    ]
    rules = {name: (_at_tau(text, settings.tau), settings.rate) for name, text in settings.solvers.items()}
    trained = {
        name: [curves(bench, _run(settings, text, rate, seed), settings.source) for seed in seeds]
        for name, (text, rate) in {**rules, "gradient": ("bp", settings.plain_rate)}.items()
    }
    return Outcome(
        findings=_findings(settings, told, trained),
        series=_series(settings, told, trained),
        claims=[*_direction_claims(settings, told), *_training_claims(settings, trained)],
        tables=[_table(settings, told, trained)],
        data=load_parts(settings.source).line,
        seeds=seeds,
    )


def _direction_claims(settings: Solvers, told: Sequence[Directions]) -> list[Claim]:
    made = [
        judge_within(
            f"descent-{name.lower()}",
            f"{name}: the direction is one of descent for tau from {min(settings.taus):g} to {max(settings.taus):g}",
            values=[min(at[name]["cosine"] for at in one) for one in told],
            low=0.0,
            high=math.inf,
            quantity="least cosine with the gradient, of all layers and taus",
            reference=f"{_PAPER}, section 4",
            published="a descent direction, proved",
        )
        for name in settings.solvers
    ]
    place = settings.taus.index(settings.tau)
    made += [
        judge(
            f"nearer-{more}",
            f"{more} steps of conjugate gradients come nearer to the exact direction than {less}",
            ours=[one[place][f"CG-{more}"]["error"] for one in told],
            theirs=[one[place][f"CG-{less}"]["error"] for one in told],
            direction="lower",
            quantity="distance from the exact direction, relative, of the worst layer",
            reference=f"{_PAPER}, section 5",
        )
        for less, more in zip(settings.cg_steps, settings.cg_steps[1:], strict=False)
    ]
    return made


def _training_claims(settings: Solvers, trained: Mapping[str, Sequence[Curves]]) -> list[Claim]:
    few, many = (f"CG-{k}" for k in (settings.cg_steps[0], settings.cg_steps[-1]))
    steps = settings.marks[-1]
    asked = (
        ("more-steps", f"{many} has the lower training loss than {few} after {steps} steps", many, few, "train loss"),
        ("exact", f"the exact step has the lower training loss than {many}", "exact", many, "train loss"),
        ("gradient", f"{few} has the lower training loss than the gradient", few, "gradient", "train loss"),
        ("cheaper", f"{few} takes less time than the exact step", few, "exact", "seconds"),
    )
    return [
        judge(
            key,
            statement,
            ours=[one[what][-1] for one in trained[ours]],
            theirs=[one[what][-1] for one in trained[theirs]],
            direction="lower",
            quantity="training loss, nats" if what == "train loss" else "seconds of the training steps",
            reference=f"{_PAPER}, section 5",
            published="more steps, nearer to exact; fewer, cheaper, in plots",
            seeds=range(settings.seeds),
        )
        for key, statement, ours, theirs, what in asked
    ]


def _series(settings: Solvers, told: Sequence[Directions], trained: Mapping[str, Sequence[Curves]]) -> list[Series]:
    plots = (
        ("error", "Distance from the exact direction", "relative distance", [f"CG-{k}" for k in settings.cg_steps]),
        ("cosine", "Cosine with the gradient", "cosine, worst layer", list(settings.solvers)),
    )
    made = [
        Series(
            id=what,
            title=title,
            description=f"{title} against tau, by solver, of the worst layer.",
            x_label="tau",
            y_label=y_label,
            curves=[
                Curve(label=name, x=settings.taus, runs=[[at[name][what] for at in one] for one in told])
                for name in names
            ],
            log_x=True,
        )
        for what, title, y_label, names in plots
    ]
    made.append(
        Series(
            id="loss",
            title="Training loss",
            description="The training loss against steps, by solver, and by the gradient.",
            x_label="steps",
            y_label="training loss, nats",
            curves=[
                Curve(label=name, x=settings.marks, runs=[one["train loss"] for one in runs])
                for name, runs in trained.items()
            ],
        )
    )
    return made


def _table(settings: Solvers, told: Sequence[Directions], trained: Mapping[str, Sequence[Curves]]) -> Table:
    place = settings.taus.index(settings.tau)
    rows: list[list[Cell]] = []
    for name, runs in trained.items():
        near: list[Cell] = ["", ""]
        if name in settings.solvers:
            near = [mean_interval([one[place][name][what] for one in told]) for what in ("error", "cosine")]
        ends = [mean_interval([one[what][-1] for one in runs]) for what in ("train loss", "test accuracy", "seconds")]
        rows.append([name, *near, *ends])
    return Table(
        id="solvers",
        title=f"By solver, at tau {settings.tau:g}",
        columns=[
            "solver",
            "distance from exact",
            "cosine with gradient",
            "training loss",
            "test accuracy, %",
            "seconds",
        ],
        rows=rows,
        note=f"SGD at rate {settings.rate:g} on proximal directions, {settings.plain_rate:g} on the gradient; "
        "distances and cosines are those of the worst layer.",
    )


def _findings(settings: Solvers, told: Sequence[Directions], trained: Mapping[str, Sequence[Curves]]) -> list[Finding]:
    place = settings.taus.index(settings.tau)

    def end(name: str, what: str) -> str:
        return interval_text(mean_interval([one[what][-1] for one in trained[name]]))

    errors = [
        f"{100 * mean_interval([one[place][f'CG-{k}']['error'] for one in told]).mean:.0f} % after {k} steps"
        for k in settings.cg_steps
    ]
    losses = [f"{end(name, 'train loss')} ({name})" for name in trained]
    seconds = [f"{end(name, 'seconds')} ({name})" for name in trained]
    least = min(at[name]["cosine"] for one in told for at in one for name in settings.solvers)
    return [
        Finding(
            "Exact or a few steps",
            f"At tau {settings.tau:g} conjugate gradients miss the exact direction by {listing(errors)}, in the worst "
            f"layer. The training loss ends at {listing(losses)}; the steps take {listing(seconds)} seconds. The paper "
            "offers conjugate gradients as the cheap way to an approximate step; here the exact step is solved on the "
            "smaller side of each layer, so that the trade-off is another.",
        ),
        Finding(
            "Descent",
            f"The least cosine of a direction with the gradient, of all taus, layers and seeds, is {least:.2g}; the "
            "paper proves that it is positive for every tau.",
        ),
    ]


_QUESTION = (
    "The proximal direction exactly and by 3, 5 and 10 steps of conjugate gradients: how far from each other, how far "
    "from the gradient for small and large tau, and how well and how fast an MLP learns from them on CIFAR-10, all at "
    "the paper's tau 0.05 and rate 1 with Nesterov's momentum 0.95, beside the gradient at rate 0.05."
)

EXPERIMENTS = (
    Experiment(
        name="proxprop-cg",
        title="Exact implicit steps, or a few conjugate-gradient steps?",
        question=_QUESTION,
        source=f"{_PAPER}, sections 4 and 5",
        scales={
            "small": Solvers(
                model="mlp:widths=1000-250-1000",
                source=Source(data="cifar10", train=4000, held_out=2000, test=2000),
                marks=(0, 8, 16, 24, 32, 40, 48),
                judged=2000,
            ),
            "paper": Solvers(
                model="mlp:widths=4000-1000-4000",
                source=Source(data="cifar10", held_out=5000),
                marks=tuple(range(0, 4501, 90)),
                judged=10_000,
            ),
        },
        measure=_measure,
        data=("cifar10",),
    ),
)
