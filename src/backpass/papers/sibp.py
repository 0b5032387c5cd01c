"""Experiments on SIBP, semi-implicit back propagation (Liu and Zhang, arXiv 2002.03516)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Plot
from backpass.experiments.images import Source
from backpass.experiments.training import Training, at, described, largest_usable_rate, training_arm
from backpass.experiments.training_runs import Run
from backpass.report.result import Finding

__all__ = ["EXPERIMENTS"]

_PAPER = "Liu and Zhang, arXiv 2002.03516"
_BATCH = 100
_MNIST, _CIFAR10 = Source(data="mnist", held_out=5000), Source(data="cifar10", held_out=5000)
_STEPS = largest_usable_rate({"SIBP": _BATCH})
_COLUMNS = (at("train loss"), at("test accuracy"), at("held-out accuracy"), at("seconds"))

Rates = Mapping[str, Sequence[float]]
"""Candidate rates by method: ``sibp`` (eta, with lam = 1 and SGD of rate 1), ``sgd``, ``proxprop`` (rate of SGD, with
tau = 1) and ``adamw``."""


def _arms(group: str, training: Training, rates: Rates) -> tuple[Arm, ...]:
    return (
        training_arm("SIBP", training, rates["sibp"], rule="sibp:eta={rate}", optimizer="sgd", group=group),
        training_arm("SGD", training, rates["sgd"], optimizer="sgd", group=group),
        training_arm("ProxProp", training, rates["proxprop"], rule="proxprop:tau=1.0", optimizer="sgd", group=group),
        training_arm("AdamW", training, rates["adamw"], optimizer="adamw", group=group),
    )


def _comparisons(group: str, marks: Sequence[int]) -> tuple[Comparison, ...]:
    slug, reference = group.lower().replace(" ", "-"), f"{_PAPER}, abstract"
    claims = [
        Comparison(
            id=f"{slug}-larger-steps", statement=f"{group}: SIBP is stable at larger learning rates than SGD",
            measurement=_STEPS, ours="SIBP", theirs="SGD", group=group, direction="higher",
            reference=reference, published="allows to choose large step size",
        )
    ]  # fmt: skip
    for other, of_the_paper in (("SGD", True), ("ProxProp", True), ("AdamW", False)):
        for key, curve, place, what in (
            ("faster", "train loss", 1, "SIBP's training loss is lower"),
            ("lower", "train loss", -1, "SIBP's training loss is lower"),
            ("better", "test accuracy", -1, "SIBP's test accuracy is higher"),
        ):
            when = f"after {marks[place]} batches"
            claims.append(
                Comparison(
                    id=f"{slug}-{key}-{other.lower()}", statement=f"{group}: {what} {when} than that of {other}",
                    measurement=at(curve, place, when), ours="SIBP", theirs=other, group=group,
                    direction="lower" if curve == "train loss" else "higher",
                    reference=reference if of_the_paper else "",
                    published="better in loss decreasing and in accuracy, in words" if of_the_paper else "",
                )
            )  # fmt: skip
    return tuple(claims)


def scale(networks: Mapping[str, tuple[Training, Rates]], seeds: int) -> Design:
    """Return the scale for networks by name, each with its training settings and candidate rates."""
    plots = []
    for group, (training, _) in networks.items():
        for key, label, log in (
            ("train loss", "training loss, nats", True),
            ("test accuracy", "test accuracy, %", False),
        ):
            plots.append(
                Plot(title=f"{label.partition(',')[0]} against steps", key=key, x=training.run.marks, x_label="steps",
                     y_label=label, groups=(group,), log_y=log)
            )  # fmt: skip
    return Design(
        arms=tuple(arm for group, (training, rates) in networks.items() for arm in _arms(group, training, rates)),
        seeds=tuple(range(seeds)),
        measurements=_COLUMNS,
        comparisons=tuple(
            claim for group, (training, _) in networks.items() for claim in _comparisons(group, training.run.marks)
        ),
        plots=tuple(plots),
        choice=at("held-out accuracy"),
        cost=at("seconds"),
        data=described(*(training.source for training, _ in networks.values())),
    )


def _training(model: str, source: Source, marks: tuple[int, ...], judged: int | None, std: float | None) -> Training:
    return Training(run=Run(model=model, batch=_BATCH, marks=marks, judged=judged, std=std), source=source)


_SHALLOW: Rates = {"sibp": (0.25, 0.5, 1.0), "sgd": (0.3, 1.0, 2.0), "proxprop": (10.0, 30.0), "adamw": (1e-3, 3e-3)}
_MLP: Rates = {
    "sibp": (0.1, 0.25, 0.5), "sgd": (0.01, 0.03, 0.1), "proxprop": (3.0, 10.0, 30.0), "adamw": (3e-4, 1e-3)
}  # fmt: skip
_CONVNET: Rates = {"sibp": (0.3, 1.0), "sgd": (0.03, 0.1, 0.3), "proxprop": (10.0, 30.0), "adamw": (1e-3, 3e-3)}
_DEEP: Rates = {
    "sibp": (0.05, 0.1, 0.25, 0.5), "sgd": (0.1, 0.5, 1.0, 2.0),
    "proxprop": (3.0, 10.0, 30.0), "adamw": (1e-3, 3e-3, 1e-2),
}  # fmt: skip


def _mnist(marks: tuple[int, ...], judged: int | None, seeds: int) -> Design:
    return scale(
        {
            "784-500-10": (_training("mlp:widths=500", _MNIST, marks, judged, 0.05), _SHALLOW),
            "784-500-500-500-10": (
                _training("mlp:widths=500-500-500", _MNIST, marks, judged, 0.05),
                {**_SHALLOW, "sibp": (0.1, 0.25, 0.5)},
            ),
        },
        seeds,
    )


def _depth(marks: tuple[int, ...], judged: int | None, seeds: int) -> Design:
    deep = _training("mlp:widths=" + "-".join(["100"] * 8), _MNIST, marks, judged, 0.05)
    return scale({"Eight layers of 100": (deep, _DEEP)}, seeds)


def _cifar10(
    widths: str, perceptron: tuple[int, ...], convolutional: tuple[int, ...], judged: int | None, seeds: int
) -> Design:
    return scale(
        {
            "MLP": (_training(f"mlp:widths={widths}", _CIFAR10, perceptron, judged, 0.05), _MLP),
            "ConvNet": (_training("convnet", _CIFAR10, convolutional, judged, None), _CONVNET),
        },
        seeds,
    )


_LONG = (0, 100, 300, 550, *range(1100, 11_001, 550))
_LONG_CIFAR10 = (0, 100, 300, 450, *range(900, 9001, 450))
_QUESTION = (
    "The first batches of training with SIBP beside SGD, ProxProp and AdamW, from the same weights and on the same "
    "batches of 100, every method at the rate that is best on held-out training images. SIBP has lam 1; the paper's "
    "own settings are not in the text that this was made from. "
)
_REMARKS = (
    Finding(
        "Learning rates",
        "For large lam SIBP's step is eta n / lam times the gradient: the largest usable rate is given in this unit. "
        "It is the largest of those tried at which the loss falls and the accuracy is within 3 points of the best.",
    ),
    Finding(
        "The paper's words",
        "Large step sizes, and better performance in loss decreasing and in training and validation accuracy than SGD "
        "and ProxProp.",
    ),
)

EXPERIMENTS = (
    Experiment(
        name="sibp-mnist",
        title="Does SIBP learn MNIST faster?",
        question=_QUESTION + "Networks of one and of three hidden layers of 500, weights from N(0, 0.05^2).",
        source=f"{_PAPER}, MNIST",
        scales={"small": _mnist((0, 100, 200, 300), 2000, 6), "paper": _mnist(_LONG, None, 5)},
        data=("mnist",),
        remarks=_REMARKS,
    ),
    Experiment(
        name="sibp-depth",
        title="Does SIBP train deep, narrow networks from small weights?",
        question=_QUESTION + "Eight hidden layers of 100, weights from N(0, 0.05^2): gradients vanish on their way.",
        source=f"{_PAPER}, abstract: gradient vanishing",
        scales={"small": _depth((0, 100, 250, 400), 2000, 6), "paper": _depth(_LONG, None, 5)},
        data=("mnist",),
        remarks=_REMARKS,
    ),
    Experiment(
        name="sibp-cifar10",
        title="Does SIBP learn CIFAR-10 faster?",
        question=_QUESTION + "A perceptron with weights from N(0, 0.05^2), and a network of three convolutions.",
        source=f"{_PAPER}, CIFAR-10",
        scales={
            "small": _cifar10("500-200", (0, 50, 100, 150), (0, 20, 40), 2000, 3),
            "paper": _cifar10("2000-500", _LONG_CIFAR10, _LONG_CIFAR10, None, 5),
        },
        data=("cifar10",),
        remarks=_REMARKS,
    ),
)
