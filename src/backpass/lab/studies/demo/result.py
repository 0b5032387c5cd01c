"""The demo's numbers as a result: plots, tables, claims and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from backpass.lab.studies.demo.claims import claims, diverged, label
from backpass.lab.studies.demo.findings import findings
from backpass.lab.studies.demo.fit import DIVERGED_ABOVE
from backpass.lab.studies.demo.measure import Measured
from backpass.report.result import Cell, Curve, Result, Series, Table, environment
from backpass.report.statistics import mean_interval

__all__ = ["PICTURE", "describe"]

PICTURE = ("rates", "attack")
"""The plots that make the picture of a README."""


def describe(measured: Measured) -> Result:
    """The result that the report shows."""
    demo = measured.demo
    judged = claims(measured)
    plain = label(demo.rules[0])
    return Result(
        experiment="demo",
        title="What does another backward pass do to learning, and to attack?",
        question=(
            f"The same network ({demo.model}) starts from the same weights and sees the same batches of real "
            f"handwritten digits; only its backward pass differs. {plain} is plain backpropagation; LinBP treats "
            "activations as if their derivative were 1. Both learn by plain SGD at the same learning rates. "
            f"Then PGD attacks the {plain}-trained networks, with plain and with linear gradients."
        ),
        scale=demo.scale,
        findings=findings(measured, judged),
        environment={
            **environment(device="cpu", threads=measured.threads, data=measured.data, seeds=range(demo.seeds)),
            "seconds": round(measured.seconds, 1),
        },
        settings=_settings(measured),
        series=_series(measured),
        tables=[_accuracies(measured), _gradients(measured)],
        claims=judged,
    )


def _settings(measured: Measured) -> dict[str, object]:
    chosen = {
        name.replace("_", " "): value for name, value in asdict(measured.demo).items() if name not in ("scale", "seeds")
    }
    return {
        **chosen,
        "optimiser": "SGD without momentum or weight decay",
        "best rates": "; ".join(f"{label(rule)}: {rate or 'none'}" for rule, rate in measured.best_rates.items())
        + ". Of the rates at which no run diverged, the one whose final training loss has the lowest upper end of its "
        "interval, over these same seeds",
        "diverged": f"a training loss that is not finite or above {DIVERGED_ABOVE:g} times its first value",
        "attack": "PGD, l_inf, pixel range [0, 1], step eps/4, one uniform random start, cross-entropy",
        "attacked images": f"held-out and classified correctly, by seed: {', '.join(map(str, measured.attacked))}",
    }


def _series(measured: Measured) -> list[Series]:
    demo = measured.demo
    small, best = min(demo.rates), measured.best_rates[demo.rules[0]]
    return [
        _learning(measured, "small-rate", small, f"Learning at a small rate ({small:g})"),
        _learning(measured, "best-rate", best, f"Learning at BP's best rate ({best:g})", log_y=True),
        _learning(measured, "unit-step", None, f"Learning with steps of equal length ({demo.unit_step:g})", log_y=True),
        Series(
            id="rates",
            title="Where learning ends, by learning rate",
            description=f"Training loss after {demo.epochs} epochs against the learning rate; geometric means.",
            x_label="learning rate",
            y_label="final training loss",
            curves=[
                Curve(
                    label=label(rule),
                    x=demo.rates,
                    runs=_by_seed([[run.losses[-1] for run in measured.runs[rule, rate]] for rate in demo.rates]),
                    geometric=True,
                )
                for rule in demo.rules
            ],
            log_x=True,
            log_y=True,
        ),
        Series(
            id="attack",
            title="PGD's success, by gradients used",
            description=(
                "Part of the correctly classified held-out images that PGD fools, against the l_inf radius eps, "
                "with each rule's gradients on the same BP-trained networks."
            ),
            x_label="eps (pixel range 0 to 1)",
            y_label="images fooled (%)",
            curves=[
                Curve(
                    label=label(rule),
                    x=demo.eps,
                    runs=_by_seed([measured.fooled[rule, eps] for eps in demo.eps]),
                )
                for rule in demo.rules
            ],
        ),
        Series(
            id="attack-difference",
            title="What linear gradients add to PGD",
            description=(
                "The same as paired differences: images fooled with a rule's gradients less those fooled with plain "
                "ones. Below zero, linear gradients make the weaker attack."
            ),
            x_label="eps (pixel range 0 to 1)",
            y_label="difference (percentage points)",
            curves=[
                Curve(
                    label=label(rule),
                    x=demo.eps,
                    runs=_by_seed(
                        [
                            [
                                a - b
                                for a, b in zip(
                                    measured.fooled[rule, e], measured.fooled[demo.rules[0], e], strict=True
                                )
                            ]
                            for e in demo.eps
                        ]
                    ),
                )
                for rule in demo.rules
            ],
        ),
    ]


def _learning(measured: Measured, id_: str, rate: float | None, title: str, *, log_y: bool = False) -> Series:
    demo = measured.demo
    return Series(
        id=id_,
        title=title,
        description=(
            "Mean cross-entropy over all training images, after every epoch"
            + (", every gradient scaled to norm 1 before the step" if rate is None else "")
            + ("; geometric means." if log_y else ".")
        ),
        x_label="epoch",
        y_label="training loss",
        curves=[
            Curve(
                label=label(rule),
                x=range(demo.epochs + 1),
                runs=[run.losses for run in measured.runs[rule, rate]],
                geometric=log_y,
            )
            for rule in demo.rules
        ],
        log_y=log_y,
    )


def _by_seed(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """From a list per place to a list per seed."""
    return [list(values) for values in zip(*columns, strict=True)]


def _accuracies(measured: Measured) -> Table:
    demo = measured.demo

    def cell(rule: str, rate: float | None) -> Cell:
        runs = measured.runs[rule, rate]
        lost = diverged(runs)
        return f"{lost} of {len(runs)} diverged" if lost else mean_interval([run.accuracy for run in runs])

    steps: list[float | None] = [*demo.rates, None]
    return Table(
        id="accuracy",
        title="Test accuracy (%)",
        columns=["Backward pass", *(f"rate {rate:g}" for rate in demo.rates), f"equal steps of {demo.unit_step:g}"],
        rows=[[label(rule), *(cell(rule, rate) for rate in steps)] for rule in demo.rules],
        note=f"After {demo.epochs} epochs, mean over {demo.seeds} seeds with its 95 % interval.",
    )


def _gradients(measured: Measured) -> Table:
    demo = measured.demo
    plain = measured.lengths[demo.rules[0]]
    rows: list[list[Cell]] = []
    for rule in demo.rules:
        ratios = [ours / theirs for ours, theirs in zip(measured.lengths[rule], plain, strict=True)]
        angles = [math.degrees(math.acos(min(1.0, c))) for c in measured.cosines[rule]]
        rows.append([label(rule), mean_interval(ratios), mean_interval(measured.cosines[rule]), mean_interval(angles)])
    return Table(
        id="gradients",
        title="The gradient at the initial weights",
        columns=["Backward pass", "length, relative to BP", "cosine with BP's", "angle to BP's (degrees)"],
        rows=rows,
        note=(
            "Over all training images. A rule whose gradient is longer takes longer steps at the same learning rate: "
            "compare the plot with steps of equal length."
        ),
    )
