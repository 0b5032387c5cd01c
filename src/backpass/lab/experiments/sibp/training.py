"""SIBP on MNIST and CIFAR-10: larger steps, faster decrease, better accuracy?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.bench.images import Source, load_parts
from backpass.lab.bench.tuning import Method, Protocol, Tuned, curves_of, table_of, tune
from backpass.report.claims import Claim, judge
from backpass.report.result import Finding, Series, Table
from backpass.report.statistics import mean_interval, paired_interval
from backpass.report.wording import interval_text
from backpass.wording import listing

__all__ = ["EXPERIMENTS", "Early", "longest_step"]

_PAPER = "Liu and Zhang, arXiv 2002.03516"
_USABLE_WITHIN = 3.0


@dataclass(frozen=True, kw_only=True)
class Early:
    """The settings.

    Attributes:
        protocols: how each network is trained, by its name in the report.
        methods: by network and name; ``SIBP``, whose rate is eta, ``SGD`` and others.
    """

    protocols: Mapping[str, Protocol]
    methods: Mapping[str, Mapping[str, Method]]


def longest_step(one: Tuned, seed: int, scale: float = 1.0) -> float:
    """The largest rate times ``scale`` at which the run of a seed learns as well as the method can.

    That is, its training loss ends below its start, and its accuracy on the held-out images within 3 points of the best
    of all rates. 0 where there is none.
    """
    runs = {rate: own[seed] for rate, own in one.by_rate.items()}
    ends = {
        rate: run["held-out accuracy"][-1] for rate, run in runs.items() if run["train loss"][-1] < run["train loss"][0]
    }
    return scale * max((rate for rate, end in ends.items() if end >= max(ends.values()) - _USABLE_WITHIN), default=0.0)


def _measure(settings: Early, bench: Bench) -> Outcome:
    claims: list[Claim] = []
    series: list[Series] = []
    tables: list[Table] = []
    findings: list[Finding] = []
    lines = {}
    chosen = {}
    for name, protocol in settings.protocols.items():
        tuned = tune(bench, protocol, settings.methods[name])
        lines[protocol.source] = load_parts(protocol.source).line
        chosen[name] = {method: one.rate for method, one in tuned.items()}
        claims += _claims(name, protocol, tuned)
        series += [curves_of(name, what, tuned, protocol.marks) for what in ("train loss", "test accuracy")]
        tables.append(table_of(name, tuned))
        findings.append(_finding(name, protocol, tuned))
    return Outcome(
        findings=findings,
        series=series,
        claims=claims,
        tables=tables,
        data=" ".join(lines.values()),
        seeds=range(max(protocol.seeds for protocol in settings.protocols.values())),
        settings={"chosen rates": chosen},
    )


def _claims(name: str, protocol: Protocol, tuned: Mapping[str, Tuned]) -> list[Claim]:
    slug = name.lower().replace(" ", "-")
    seeds = range(protocol.seeds)
    ours = tuned["SIBP"]
    made = [
        judge(
            f"{slug}-larger-steps",
            f"{name}: SIBP bears larger steps than SGD",
            ours=[longest_step(ours, seed, protocol.batch) for seed in seeds],
            theirs=[longest_step(tuned["SGD"], seed) for seed in seeds],
            direction="higher",
            quantity="largest usable rate, eta n / lam for SIBP",
            reference=f"{_PAPER}, abstract",
            published="allows to choose large step size",
        )
    ]
    early, last = protocol.marks[1], protocol.marks[-1]
    for theirs in tuned:
        if theirs == "SIBP":
            continue
        papers = theirs in ("SGD", "ProxProp")
        for key, what, place, statement in (
            ("faster", "train loss", 1, f"SIBP's training loss is lower after {early} batches than that of {theirs}"),
            ("lower", "train loss", -1, f"SIBP's training loss is lower after {last} batches than that of {theirs}"),
            (
                "better",
                "test accuracy",
                -1,
                f"SIBP's test accuracy is higher after {last} batches than that of {theirs}",
            ),
        ):
            loss = what == "train loss"
            made.append(
                judge(
                    f"{slug}-{key}-{theirs.lower()}",
                    f"{name}: {statement}",
                    ours=ours.at(what, place),
                    theirs=tuned[theirs].at(what, place),
                    direction="lower" if loss else "higher",
                    quantity="training loss, nats" if loss else "test accuracy, percentage points",
                    reference=f"{_PAPER}, abstract" if papers else None,
                    published="better in loss decreasing and in accuracy, in words" if papers else "",
                    seeds=seeds,
                )
            )
    return made


def _finding(name: str, protocol: Protocol, tuned: Mapping[str, Tuned]) -> Finding:
    ours, last = tuned["SIBP"], protocol.marks[-1]
    gaps = [
        f"{interval_text(paired_interval(ours.at('test accuracy', -1), one.at('test accuracy', -1)), signed=True)} "
        f"over {method} at {one.rate:g}"
        for method, one in tuned.items()
        if method != "SIBP"
    ]
    steps = {
        method: _range([longest_step(tuned[method], seed, scale) for seed in range(protocol.seeds)])
        for method, scale in (("SIBP", protocol.batch), ("SGD", 1.0))
    }
    loss = interval_text(mean_interval(ours.at("train loss", -1)))
    ratio = [a / b for a, b in zip(ours.at("seconds", -1), tuned["SGD"].at("seconds", -1), strict=True)]
    return Finding(
        name,
        f"After {last} batches of {protocol.batch}, SIBP at eta {ours.rate:g} has the training loss {loss}, and a test "
        f"accuracy that differs by {listing(gaps)}, in percentage points. For large lam its step is eta n / lam times "
        f"the gradient; the largest such rate at which it learns as well as at its best is {steps['SIBP']}, and for "
        f"SGD {steps['SGD']} (of the rates tried). A step takes "
        f"{interval_text(mean_interval(ratio))} times as long as one of SGD. The paper's words: large step sizes, and "
        "better performance in loss decreasing and in training and validation accuracy than SGD and ProxProp.",
    )


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    if high == 0:
        return "none, for it learns at no rate"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _methods(**rates: tuple[float, ...]) -> dict[str, Method]:
    """SIBP with lam 1 and SGD of rate 1; ProxProp with tau 1 and SGD; SGD; AdamW."""
    return {
        "SIBP": Method(rule="sibp:eta={rate}", optimizer="sgd", rates=rates["sibp"]),
        "SGD": Method(optimizer="sgd", rates=rates["sgd"]),
        "ProxProp": Method(rule="proxprop:tau=1.0", optimizer="sgd", rates=rates["proxprop"]),
        "AdamW": Method(optimizer="adamw", rates=rates["adamw"]),
    }


_MNIST = Source(data="mnist", held_out=5000)
_CIFAR10 = Source(data="cifar10", held_out=5000)
_DEEP = "mlp:widths=" + "-".join(["100"] * 8)


def _mnist(marks: tuple[int, ...], judged: int | None, seeds: int) -> Early:
    rates = {"sgd": (0.3, 1.0, 2.0), "proxprop": (10.0, 30.0), "adamw": (1e-3, 3e-3)}
    return Early(
        protocols={
            name: Protocol(model=model, source=_MNIST, batch=100, marks=marks, judged=judged, seeds=seeds, std=0.05)
            for name, model in (("784-500-10", "mlp:widths=500"), ("784-500-500-500-10", "mlp:widths=500-500-500"))
        },
        methods={
            "784-500-10": _methods(sibp=(0.25, 0.5, 1.0), **rates),
            "784-500-500-500-10": _methods(sibp=(0.1, 0.25, 0.5), **rates),
        },
    )


def _depth(marks: tuple[int, ...], judged: int | None, seeds: int) -> Early:
    return Early(
        protocols={
            "Eight layers of 100": Protocol(
                model=_DEEP, source=_MNIST, batch=100, marks=marks, judged=judged, seeds=seeds, std=0.05
            )
        },
        methods={
            "Eight layers of 100": _methods(
                sibp=(0.1, 0.25, 0.5), sgd=(0.1, 0.5, 1.0, 2.0), proxprop=(3.0, 10.0, 30.0), adamw=(1e-3, 3e-3, 1e-2)
            )
        },
    )


def _cifar10(marks: Sequence[tuple[int, ...]], judged: int | None, seeds: int, widths: str) -> Early:
    convolutional, perceptron = marks
    return Early(
        protocols={
            "MLP": Protocol(
                model=f"mlp:widths={widths}", source=_CIFAR10, batch=100, marks=perceptron, judged=judged, seeds=seeds,
                std=0.05,
            ),
            "ConvNet": Protocol(
                model="convnet", source=_CIFAR10, batch=100, marks=convolutional, judged=judged, seeds=seeds
            ),
        },
        methods={
            "MLP": _methods(sibp=(0.1, 0.25, 0.5), sgd=(0.01, 0.03, 0.1), proxprop=(3.0, 10.0, 30.0),
                            adamw=(3e-4, 1e-3)),
            "ConvNet": _methods(sibp=(0.3, 1.0), sgd=(0.03, 0.1, 0.3), proxprop=(10.0, 30.0), adamw=(1e-3, 3e-3)),
        },
    )  # fmt: skip


_QUESTION = (
    "The first batches of training with SIBP beside SGD, ProxProp and AdamW, from the same weights and on the same "
    "batches of 100, every method at the rate that is best on held-out training images. SIBP has lam 1; the paper's "
    "own settings are not in the text that this was made from. "
)

EXPERIMENTS = (
    Experiment(
        name="sibp-mnist",
        title="Does SIBP learn MNIST faster?",
        question=_QUESTION + "Networks of one and of three hidden layers of 500, weights from N(0, 0.05^2).",
        source=f"{_PAPER}, MNIST",
        scales={
            "small": _mnist((0, 100, 200, 300), 2000, 6),
            "paper": _mnist((0, 100, 300, 550, *range(1100, 11_001, 550)), None, 5),
        },
        measure=_measure,
        data=("mnist",),
    ),
    Experiment(
        name="sibp-depth",
        title="Does SIBP train deep, narrow networks from small weights?",
        question=_QUESTION + "Eight hidden layers of 100, weights from N(0, 0.05^2): gradients vanish on their way.",
        source=f"{_PAPER}, abstract: gradient vanishing",
        scales={
            "small": _depth((0, 100, 250, 400), 2000, 6),
            "paper": _depth((0, 100, 300, 550, *range(1100, 11_001, 550)), None, 5),
        },
        measure=_measure,
        data=("mnist",),
    ),
    Experiment(
        name="sibp-cifar10",
        title="Does SIBP learn CIFAR-10 faster?",
        question=_QUESTION + "A perceptron with weights from N(0, 0.05^2), and a network of three convolutions.",
        source=f"{_PAPER}, CIFAR-10",
        scales={
            "small": _cifar10(((0, 20, 40), (0, 50, 100, 150)), 2000, 3, "500-200"),
            "paper": _cifar10(
                ((0, 100, 300, 450, *range(900, 9001, 450)), (0, 100, 300, 450, *range(900, 9001, 450))), None, 5,
                "2000-500",
            ),
        },
        measure=_measure,
        data=("cifar10",),
    ),
)  # fmt: skip
