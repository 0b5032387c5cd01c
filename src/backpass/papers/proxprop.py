"""Experiments on ProxProp (Frerix, Moellenhoff, Moeller, Cremers, ICLR 2018, arXiv 1706.04638)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from backpass.experiments.directions import Directions, measure_directions
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot
from backpass.experiments.images import Source
from backpass.experiments.training import Training, at, at_equal_time, described, training_arm
from backpass.experiments.training_runs import Run
from backpass.report.result import Finding

__all__ = ["EXPERIMENTS"]

_PAPER = "Frerix et al., arXiv 1706.04638"
_NESTEROV = "sgd:momentum=0.95,nesterov=true"
_LOSS, _ACCURACY, _TIME = at("train loss"), at("test accuracy"), at("seconds")
_COLUMNS = (_LOSS, _ACCURACY, at("held-out accuracy"), _TIME)
_WHOLE = Source(data="cifar10", held_out=5000)
_LITTLE = Source(data="cifar10", train=4000, held_out=2000, test=2000)

Methods = dict[str, tuple[str, str, Sequence[float]]]
"""Rule, optimizer and candidate learning rates by name of the method."""


def _marks(steps: int, count: int) -> tuple[int, ...]:
    return tuple(round(steps * place / count) for place in range(count + 1))


def _plots(group: str, marks: Sequence[int]) -> tuple[Plot, ...]:
    loss = {"title": "training loss", "key": "train loss", "y_label": "training loss, nats", "log_y": True}
    return (
        Plot(**loss, x=marks, x_label="steps", groups=(group,)),  # type: ignore[arg-type]
        Plot(**loss, x="seconds", x_label="seconds", groups=(group,)),  # type: ignore[arg-type]
        Plot(title="test accuracy", key="test accuracy", y_label="test accuracy, %", x=marks, x_label="steps",
             groups=(group,)),
    )  # fmt: skip


def compare(
    group: str, training: Training, methods: Methods, pairs: Sequence[tuple[str, str]], seeds: int = 3
) -> Design:
    """Return the scale that trains a network by several methods and compares pairs of them."""
    steps = training.run.marks[-1]
    claims = []
    for ours, theirs in pairs:
        in_paper = theirs in ("SGD", "Adam") and not ours.startswith("Toeplitz")
        for key, measurement, statement, published in (
            ("steps", _LOSS, f"after {steps} steps the training loss is lower",
             "faster decrease of the loss per epoch, in a plot"),
            ("time", at_equal_time("train loss"), "after the same time the training loss is lower",
             "competitive in time, on a GPU"),
            ("accuracy", _ACCURACY, f"after {steps} steps the test accuracy is higher", "at least as high, in a plot"),
        ):  # fmt: skip
            claims.append(
                Comparison(
                    id=f"{ours}-{theirs}-{key}".lower().replace(" + ", "-").replace(" ", "-"),
                    statement=f"{group}: with {ours}, {statement} than with {theirs}",
                    measurement=measurement, ours=ours, theirs=theirs, group=group,
                    direction="higher" if key == "accuracy" else "lower",
                    reference=f"{_PAPER}, section 5", published=published if in_paper else "",
                )
            )  # fmt: skip
    return Design(
        arms=tuple(
            training_arm(name, training, rates, rule=rule, optimizer=optimizer, group=group)
            for name, (rule, optimizer, rates) in methods.items()
        ),
        seeds=tuple(range(seeds)),
        measurements=_COLUMNS,
        comparisons=tuple(claims),
        plots=_plots(group, training.run.marks),
        choice=at("held-out accuracy"),
        cost=_TIME,
        data=described(training.source),
    )


_MLP: Methods = {
    "SGD": ("bp", _NESTEROV, (0.02, 0.05, 0.1)),
    "ProxProp + SGD": ("proxprop:tau=0.05,stop=-1", _NESTEROV, (0.3, 1.0, 3.0)),
    "ProxProp + Adam": ("proxprop:tau=0.05,stop=-1", "adam", (3e-4, 1e-3, 3e-3)),
    "Adam": ("bp", "adam", (3e-4, 1e-3, 3e-3)),
}
_PROX = "proxprop:tau=1.0,stop=-1"
_CONVNET: Methods = {
    "Adam": ("bp", "adam", (1e-3, 3e-3, 1e-2)),
    "ProxProp + Adam": (_PROX, "adam", (1e-2, 3e-2)),
    "Toeplitz + Adam": (f"{_PROX},solver=toeplitz", "adam", (1e-2, 3e-2)),
    "CG-3 + Adam": (f"{_PROX},solver=cg,cg_steps=3", "adam", (1e-2, 3e-2)),
}
_CONVNET_PAPER: Methods = {
    **_CONVNET,
    "SGD": ("bp", _NESTEROV, (3e-3, 1e-2, 3e-2)),
    "CG-10 + Adam": (f"{_PROX},solver=cg,cg_steps=10", "adam", (3e-3, 1e-2)),
}
_MLP_PAIRS = (("ProxProp + SGD", "SGD"), ("ProxProp + Adam", "Adam"), ("ProxProp + SGD", "Adam"))
_CONVNET_PAIRS = (("ProxProp + Adam", "Adam"), ("CG-3 + Adam", "Adam"), ("Toeplitz + Adam", "Adam"))


def _training(model: str, source: Source, batch: int, marks: tuple[int, ...], judged: int) -> Training:
    return Training(run=Run(model=model, batch=batch, marks=marks, judged=judged, normalise=True), source=source)


def solvers(
    training: Training,
    cg_steps: tuple[int, ...] = (3, 5, 10),
    taus: tuple[float, ...] = (1e-3, 1e-2, 0.05, 1.0, 1e2, 1e4),
    warm: int = 5,
) -> Design:
    """Return the scale that compares the exact solve with conjugate gradients; training uses tau = 0.05."""
    tau, plain_rate, exact = 0.05, 0.05, "proxprop:tau={tau},stop=-1"
    rules = {"exact": exact, **{f"CG-{k}": f"{exact},solver=cg,cg_steps={k}" for k in cg_steps}}
    run = replace(training.run, optimizer=_NESTEROV, rate=plain_rate)
    near = [
        Arm(name=name, work=measure_directions, group="Directions",
            candidates={"": Directions(run=run, source=training.source, rule=rule, exact=exact, taus=taus, warm=warm)})
        for name, rule in rules.items()
    ]  # fmt: skip
    trained = [
        training_arm(
            name, training, (rate,), rule=rule.replace("{tau}", f"{tau:g}"), optimizer=_NESTEROV, group="Training"
        )
        for name, rule, rate in (*((name, rule, 1.0) for name, rule in rules.items()), ("gradient", "bp", plain_rate))
    ]
    error = Measurement(label=f"relative distance from the exact direction at tau {tau:g}, worst layer", key="error",
                        at=taus.index(tau))  # fmt: skip
    cosine = Measurement(label="least cosine with the gradient, of all layers and taus", key="cosine", reduce=min)
    few, many, steps = f"CG-{cg_steps[0]}", f"CG-{cg_steps[-1]}", training.run.marks[-1]
    descent = (
        Comparison(
            id=f"descent-{name.lower()}", measurement=cosine, ours=name, group="Directions", low=0.0,
            statement=f"{name}: the direction is one of descent for tau from {min(taus):g} to {max(taus):g}",
            reference=f"{_PAPER}, section 4", published="a descent direction, proved",
        )
        for name in rules
    )  # fmt: skip
    nearer = (
        Comparison(
            id=f"nearer-{more}", measurement=error, ours=f"CG-{more}", theirs=f"CG-{less}", group="Directions",
            statement=f"{more} steps of conjugate gradients come nearer to the exact direction than {less}",
            direction="lower", reference=f"{_PAPER}, section 5",
        )
        for less, more in pairwise(cg_steps)
    )  # fmt: skip
    training_claims = (
        Comparison(
            id=key, statement=statement, measurement=measurement, ours=ours, theirs=theirs, group="Training",
            direction="lower", reference=f"{_PAPER}, section 5",
            published="more steps, nearer to exact; fewer, cheaper, in plots",
        )
        for key, statement, ours, theirs, measurement in (
            ("more-steps", f"{many} has the lower training loss than {few} after {steps} steps", many, few, _LOSS),
            ("exact", f"the exact step has the lower training loss than {many}", "exact", many, _LOSS),
            ("gradient", f"{few} has the lower training loss than the gradient", few, "gradient", _LOSS),
            ("cheaper", f"{few} takes less time than the exact step", few, "exact", _TIME),
        )
    )  # fmt: skip
    directions = {"x": taus, "x_label": "tau", "groups": ("Directions",), "log_x": True}
    return Design(
        arms=(*near, *trained),
        seeds=(0, 1, 2),
        measurements=(error, cosine, *_COLUMNS),
        comparisons=(*descent, *nearer, *training_claims),
        plots=(
            Plot(title="distance from the exact direction", key="error", y_label="relative distance, worst layer",
                 arms=tuple(name for name in rules if name != "exact"), **directions),  # type: ignore[arg-type]
            Plot(title="cosine with the gradient", key="cosine", y_label="cosine, worst layer", **directions),  # type: ignore[arg-type]
            _plots("Training", training.run.marks)[0],
        ),
        data=described(training.source),
    )  # fmt: skip


_QUESTION = (
    "Training by implicit (proximal) steps in the weights of all layers but the last, beside the gradient, with the "
    "same weights and batches. Every method at the rate that is best on held-out training images. "
)
_REMARKS = (
    Finding(
        "The paper's words",
        "In plots, implicit steps lower the loss faster per epoch, are competitive in time, and work with Adam.",
    ),
)

EXPERIMENTS = (
    Experiment(
        name="proxprop-mlp",
        title="Do implicit steps train an MLP faster?",
        question=_QUESTION + "The paper's MLP 3072-4000-1000-4000-10 on CIFAR-10 in batches of 500, a quarter as wide "
        "at the small scale; tau 0.05, Nesterov's momentum 0.95, and Adam.",
        source=f"{_PAPER}, section 5, MLP",
        scales={
            "small": compare(
                "MLP", _training("mlp:widths=1000-250-1000", _LITTLE, 500, _marks(48, 6), 2000), _MLP, _MLP_PAIRS
            ),
            "paper": compare(
                "MLP", _training("mlp:widths=4000-1000-4000", _WHOLE, 500, _marks(4500, 50), 10_000), _MLP, _MLP_PAIRS
            ),
        },
        data=("cifar10",),
        remarks=_REMARKS,
    ),
    Experiment(
        name="proxprop-convnet",
        title="Do implicit steps train a convolutional network faster?",
        question=_QUESTION + "The paper's network of three 5x5 convolutions on CIFAR-10, tau 1, Adam; exact, by three "
        "steps of conjugate gradients, and by a block-Toeplitz matrix.",
        source=f"{_PAPER}, section 5, ConvNet",
        scales={
            "small": compare(
                "ConvNet", _training("convnet", _LITTLE, 200, _marks(24, 3), 2000), _CONVNET, _CONVNET_PAIRS
            ),
            "paper": compare(
                "ConvNet", _training("convnet", _WHOLE, 500, _marks(4500, 50), 10_000), _CONVNET_PAPER,
                (*_CONVNET_PAIRS, ("CG-10 + Adam", "CG-3 + Adam")),
            ),
        },
        data=("cifar10",),
        remarks=_REMARKS,
    ),
    Experiment(
        name="proxprop-cg",
        title="Exact implicit steps, or a few conjugate-gradient steps?",
        question="The proximal direction exactly and by 3, 5 and 10 steps of conjugate gradients: how far from each "
        "other, how far from the gradient for small and large tau, and how well and how fast an MLP learns from them "
        "on CIFAR-10, all at the paper's tau 0.05 and rate 1 with Nesterov's momentum 0.95, beside the gradient at "
        "rate 0.05.",
        source=f"{_PAPER}, sections 4 and 5",
        scales={
            "small": solvers(_training("mlp:widths=1000-250-1000", _LITTLE, 500, _marks(48, 6), 2000)),
            "paper": solvers(_training("mlp:widths=4000-1000-4000", _WHOLE, 500, _marks(4500, 50), 10_000)),
        },
        data=("cifar10",),
        remarks=(
            Finding(
                "The paper's words",
                "Conjugate gradients are offered as the cheap way to an approximate step, and every direction is "
                "proved to be one of descent. Here the exact step is solved on the smaller side of each layer, so that "
                "the trade-off is another.",
            ),
        ),
    ),
)  # fmt: skip
