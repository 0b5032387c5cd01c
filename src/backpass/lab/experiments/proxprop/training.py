"""ProxProp on CIFAR-10: does the loss fall faster, per step and in time, and does it work with Adam?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.bench.images import Source, load_parts
from backpass.lab.bench.tuning import Method, Protocol, Tuned, curves_of, loss_after, table_of, tune
from backpass.report.claims import Claim, Direction, judge
from backpass.report.result import Finding
from backpass.report.statistics import mean_interval, paired_interval
from backpass.report.wording import interval_text

__all__ = ["EXPERIMENTS", "NESTEROV", "Comparison"]

_PAPER = "Frerix et al., arXiv 1706.04638"
NESTEROV = "sgd:momentum=0.95,nesterov=true"
"""The paper's SGD."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The settings of one network.

    Attributes:
        name: of the network in the report.
        protocol: how it is trained.
        methods: by name.
        pairs: which method is compared with which.
    """

    name: str
    protocol: Protocol
    methods: Mapping[str, Method]
    pairs: tuple[tuple[str, str], ...]


def _measure(settings: Comparison, bench: Bench) -> Outcome:
    protocol = settings.protocol
    tuned = tune(bench, protocol, settings.methods)
    marks = protocol.marks
    return Outcome(
        findings=[_finding(settings.name, ours, theirs, tuned) for ours, theirs in settings.pairs],
        series=[
            curves_of(settings.name, "train loss", tuned, marks),
            curves_of(settings.name, "train loss", tuned, marks, by="seconds"),
            curves_of(settings.name, "test accuracy", tuned, marks),
        ],
        claims=[claim for ours, theirs in settings.pairs for claim in _claims(settings, ours, theirs, tuned)],
        tables=[table_of(settings.name, tuned)],
        data=load_parts(protocol.source).line,
        seeds=range(protocol.seeds),
        settings={"chosen rates": {name: one.rate for name, one in tuned.items()}},
    )


def _claims(settings: Comparison, ours: str, theirs: str, tuned: Mapping[str, Tuned]) -> list[Claim]:
    a, b, steps = tuned[ours], tuned[theirs], settings.protocol.marks[-1]
    nats, points = "training loss, nats", "test accuracy, percentage points"
    faster = "faster decrease of the loss per epoch, in a plot"
    compared: tuple[tuple[str, str, list[float], list[float], Direction, str, str], ...] = (
        ("steps", f"after {steps} steps the training loss is lower", a.at("train loss", -1), b.at("train loss", -1),
         "lower", nats, faster),
        ("time", "after the same time the training loss is lower", *loss_after(a, b),
         "lower", nats, "competitive in time, on a GPU"),
        ("accuracy", f"after {steps} steps the test accuracy is higher", a.at("test accuracy", -1),
         b.at("test accuracy", -1), "higher", points, "at least as high, in a plot"),
    )  # fmt: skip
    return [
        judge(
            f"{ours}-{theirs}-{key}".lower().replace(" + ", "-").replace(" ", "-"),
            f"{settings.name}: with {ours}, {statement} than with {theirs}",
            ours=first,
            theirs=second,
            direction=direction,
            quantity=quantity,
            reference=f"{_PAPER}, section 5",
            published=published if theirs in _PAPERS_PEERS and not ours.startswith("Toeplitz") else "",
            seeds=range(settings.protocol.seeds),
        )
        for key, statement, first, second, direction, quantity, published in compared
    ]


_PAPERS_PEERS = ("SGD", "Adam")


def _finding(name: str, ours: str, theirs: str, tuned: Mapping[str, Tuned]) -> Finding:
    a, b = tuned[ours], tuned[theirs]
    first, second = (interval_text(mean_interval(one.at("train loss", -1))) for one in (a, b))
    cost = [p / q for p, q in zip(a.at("seconds", -1), b.at("seconds", -1), strict=True)]
    return Finding(
        f"{ours} beside {theirs}",
        f"On the {name} the training loss ends at {first} with {ours} at rate {a.rate:g}, and at {second} with "
        f"{theirs} at rate {b.rate:g}. For the same number of steps it takes {interval_text(mean_interval(cost))} "
        "times as long; after the same time the losses differ by "
        f"{interval_text(paired_interval(*loss_after(a, b)), signed=True)} nats. The test accuracy differs by "
        f"{interval_text(paired_interval(a.at('test accuracy', -1), b.at('test accuracy', -1)), signed=True)} "
        "percentage points. The paper, in plots: implicit steps lower the loss faster per epoch, are competitive in "
        "time, and work with Adam.",
    )


def _marks(steps: int, count: int) -> tuple[int, ...]:
    return tuple(round(steps * place / count) for place in range(count + 1))


_MLP = {
    "SGD": Method(optimizer=NESTEROV, rates=(0.02, 0.05, 0.1)),
    "ProxProp + SGD": Method(rule="proxprop:tau=0.05,stop=-1", optimizer=NESTEROV, rates=(0.3, 1.0, 3.0)),
    "ProxProp + Adam": Method(rule="proxprop:tau=0.05,stop=-1", optimizer="adam", rates=(3e-4, 1e-3, 3e-3)),
    "Adam": Method(optimizer="adam", rates=(3e-4, 1e-3, 3e-3)),
}
_PROX = "proxprop:tau=1.0,stop=-1"
_CONVNET = {
    "Adam": Method(optimizer="adam", rates=(1e-3, 3e-3, 1e-2)),
    "ProxProp + Adam": Method(rule=_PROX, optimizer="adam", rates=(1e-2, 3e-2)),
    "Toeplitz + Adam": Method(rule=f"{_PROX},solver=toeplitz", optimizer="adam", rates=(1e-2, 3e-2)),
    "CG-3 + Adam": Method(rule=f"{_PROX},solver=cg,cg_steps=3", optimizer="adam", rates=(1e-2, 3e-2)),
}
_CONVNET_PAPER = {
    **_CONVNET,
    "SGD": Method(optimizer=NESTEROV, rates=(3e-3, 1e-2, 3e-2)),
    "CG-10 + Adam": Method(rule=f"{_PROX},solver=cg,cg_steps=10", optimizer="adam", rates=(3e-3, 1e-2)),
}
_MLP_PAIRS = (("ProxProp + SGD", "SGD"), ("ProxProp + Adam", "Adam"), ("ProxProp + SGD", "Adam"))
_CONVNET_PAIRS = (("ProxProp + Adam", "Adam"), ("CG-3 + Adam", "Adam"), ("Toeplitz + Adam", "Adam"))
_QUESTION = (
    "Training by implicit (proximal) steps in the weights of all layers but the last, beside the gradient, with the "
    "same weights and batches. Every method at the rate that is best on held-out training images. "
)
_WHOLE = Source(data="cifar10", held_out=5000)
_LITTLE = Source(data="cifar10", train=4000, held_out=2000, test=2000)

EXPERIMENTS = (
    Experiment(
        name="proxprop-mlp",
        title="Do implicit steps train an MLP faster?",
        question=_QUESTION + "The paper's MLP 3072-4000-1000-4000-10 on CIFAR-10 in batches of 500, a quarter as wide "
        "at the small scale; tau 0.05, Nesterov's momentum 0.95, and Adam.",
        source=f"{_PAPER}, section 5, MLP",
        scales={
            "small": Comparison(
                name="MLP",
                protocol=Protocol(
                    model="mlp:widths=1000-250-1000", source=_LITTLE, batch=500, marks=_marks(48, 6), judged=2000,
                    normalise=True,
                ),
                methods=_MLP,
                pairs=_MLP_PAIRS,
            ),
            "paper": Comparison(
                name="MLP",
                protocol=Protocol(
                    model="mlp:widths=4000-1000-4000", source=_WHOLE, batch=500, marks=_marks(4500, 50), judged=10_000,
                    normalise=True,
                ),
                methods=_MLP,
                pairs=_MLP_PAIRS,
            ),
        },
        measure=_measure,
        data=("cifar10",),
    ),
    Experiment(
        name="proxprop-convnet",
        title="Do implicit steps train a convolutional network faster?",
        question=_QUESTION + "The paper's network of three 5x5 convolutions on CIFAR-10, tau 1, Adam; exact, by three "
        "steps of conjugate gradients, and by a block-Toeplitz matrix.",
        source=f"{_PAPER}, section 5, ConvNet",
        scales={
            "small": Comparison(
                name="ConvNet",
                protocol=Protocol(
                    model="convnet", source=_LITTLE, batch=200, marks=_marks(24, 3), judged=2000, normalise=True
                ),
                methods=_CONVNET,
                pairs=_CONVNET_PAIRS,
            ),
            "paper": Comparison(
                name="ConvNet",
                protocol=Protocol(
                    model="convnet", source=_WHOLE, batch=500, marks=_marks(4500, 50), judged=10_000, normalise=True
                ),
                methods=_CONVNET_PAPER,
                pairs=(*_CONVNET_PAIRS, ("CG-10 + Adam", "CG-3 + Adam")),
            ),
        },
        measure=_measure,
        data=("cifar10",),
    ),
)  # fmt: skip
