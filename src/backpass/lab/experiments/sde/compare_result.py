"""The comparison's numbers as a result: plots, a table, claims and words."""

from __future__ import annotations

import math
from dataclasses import asdict

from torch import Tensor

from backpass.lab.experiments.sde.compare import Measured
from backpass.report.claims import Claim, judge
from backpass.report.result import Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import mean_interval

__all__ = ["describe", "gap", "tolerance"]

_ABSTRACT = "Gu and Guo, arXiv 2105.08037v1, abstract: the SDE confirms the robustness as a gradient flow"
_DERIVED = "derived for this project in the setting of Gu and Guo, arXiv 2105.08037v1"
_TITLES = {
    "gradient_penalty": ("Mean squared input gradient", "E |grad_x L|^2"),
    "expected_loss": ("Clean loss", "E L"),
    "adversarial_loss": ("Loss under the training attack", "E L(x + delta_K)"),
}
_WORDS = {
    "SGD": "SGD",
    "SGD, C": "SGD, its SDE",
    "AT": "AT",
    "AT, C": "AT, exact (C)",
    "AT, B": "AT, expanded (B)",
}
_PREDICTED = ("gradient_penalty", "expected_loss")


def gap(measured: Measured, quantity: str, who: str, mode: str = "C") -> Tensor:
    """|mean of the chain - mean of its SDE| at every record but the first, (R - 1,)."""
    values = measured.values[quantity]
    return (values[who].mean(1) - values[f"{who}, {mode}"].mean(1)).abs()[1:]


def tolerance(measured: Measured, quantity: str, who: str) -> Tensor:
    """Three standard errors of the difference of the two means, plus 5 % of the prediction; (R - 1,)."""
    chain, ours = measured.values[quantity][who], measured.values[quantity][f"{who}, C"]
    error = (chain.var(1) / chain.shape[1] + ours.var(1) / ours.shape[1]).sqrt()
    return (3 * error + 0.05 * ours.mean(1).abs())[1:]


def describe(measured: Measured) -> Result:
    """The result that the report shows."""
    study = measured.study
    return Result(
        experiment="sde-compare",
        title="Does the SDE predict adversarial training?",
        question=(
            "A tanh network of 37 parameters learns by SGD and by adversarial training, many times from one start, and "
            "so do the SDEs that model them. Recorded are the mean squared input gradient, which the theory says "
            "adversarial training lowers, and the clean and the adversarial loss."
        ),
        scale="standard",
        findings=_findings(measured),
        environment={
            **environment(device="cpu", threads=1, data="made from the seed", seeds=[study.seed]),
            "seconds": round(measured.seconds, 1),
        },
        settings=asdict(study),
        series=[_series(measured, quantity) for quantity in _TITLES],
        tables=[_table(measured)],
        claims=_claims(measured),
        plots_note=(
            "Lines are means over the paths, bands their 95 % intervals. AT is adversarial training; exact (C) and "
            "expanded (B) are its SDEs."
        ),
        claims_note=(
            "Differences between the two ways of training are paired over the paths, which see the same batches; those "
            "between predictions are taken over the recorded times, which depend on each other. Each interval is "
            "Student's t."
        ),
    )


def _series(measured: Measured, quantity: str) -> Series:
    title, label = _TITLES[quantity]
    return Series(
        id=quantity.replace("_", "-"),
        title=title,
        description=f"{label} against time, the number of steps times the learning rate; chains and predictions.",
        x_label="time",
        y_label=label,
        curves=[
            Curve(label=_WORDS[who], x=measured.times.tolist(), runs=values.T.tolist())
            for who, values in measured.values[quantity].items()
        ],
    )


def _table(measured: Measured) -> Table:
    return Table(
        id="end",
        title=f"At time {measured.study.t:g}",
        columns=["", *_WORDS.values()],
        rows=[
            [label, *(mean_interval(measured.values[quantity][who][-1].tolist()) for who in _WORDS)]
            for quantity, (_, label) in _TITLES.items()
        ],
        note=f"Means over {measured.study.paths} paths with 95 % intervals.",
    )


def _claims(measured: Measured) -> list[Claim]:
    end = {
        quantity: {who: values[-1].tolist() for who, values in row.items()} for quantity, row in measured.values.items()
    }
    found = [
        judge(
            "flatter",
            "adversarial training ends with a smaller input gradient than SGD",
            ours=end["gradient_penalty"]["AT"],
            theirs=end["gradient_penalty"]["SGD"],
            direction="lower",
            quantity="E |grad_x L|^2",
            reference=_ABSTRACT,
        ),
        judge(
            "slope",
            "at the same point adversarial training changes E |grad_x L|^2 / 2 more to the negative than SGD",
            ours=measured.slopes.tolist(),
            theirs=[0.0] * len(measured.slopes),
            direction="lower",
            quantity="difference of the slopes d/dt, over points",
            reference=_ABSTRACT,
        ),
        judge(
            "robust",
            "adversarial training ends with a lower loss under the training attack than SGD",
            ours=end["adversarial_loss"]["AT"],
            theirs=end["adversarial_loss"]["SGD"],
            direction="lower",
            quantity="E L(x + delta_K)",
        ),
        judge(
            "clean",
            "adversarial training ends with a higher clean loss than SGD",
            ours=end["expected_loss"]["AT"],
            theirs=end["expected_loss"]["SGD"],
            direction="higher",
            quantity="E L",
        ),
        judge(
            "exact-closer",
            "the SDE with the exact attack (C) is closer to the input gradient of adversarial training than the "
            "expanded one (B)",
            ours=gap(measured, "gradient_penalty", "AT").tolist(),
            theirs=gap(measured, "gradient_penalty", "AT", "B").tolist(),
            direction="lower",
            quantity="distance of the means of E |grad_x L|^2, over times",
            reference=_DERIVED,
        ),
    ]
    for who in ("SGD", "AT"):
        for quantity in _PREDICTED:
            found.append(
                judge(
                    f"predicted-{who}-{quantity}".lower().replace("_", "-"),
                    f"{_WORDS[who]}: its SDE predicts {_TITLES[quantity][1]} within 3 standard errors plus 5 %",
                    ours=gap(measured, quantity, who).tolist(),
                    theirs=tolerance(measured, quantity, who).tolist(),
                    direction="lower",
                    quantity="distance of the means less that allowance, over times",
                    reference=_DERIVED,
                )
            )
    return found


def _findings(measured: Measured) -> list[Finding]:
    end = {
        quantity: {who: values[-1].mean().item() for who, values in row.items()}
        for quantity, row in measured.values.items()
    }
    penalty, clean, robust = (end[quantity] for quantity in _TITLES)
    within = [
        (gap(measured, quantity, who) <= tolerance(measured, quantity, who)).tolist()
        for who in ("SGD", "AT")
        for quantity in _PREDICTED
    ]
    flat = [value for row in within for value in row]
    fallen = (measured.slopes < 0).double().mean().item()
    return [
        Finding(
            "Robustness",
            f"E |grad_x L|^2 ends at {penalty['AT']:.3f} under adversarial training and at {penalty['SGD']:.3f} under "
            f"SGD. At {math.floor(1000 * fallen) / 10:g} % of {len(measured.slopes)} points that the chains visit, the "
            "adversary's slope of it is below SGD's.",
        ),
        Finding(
            "Prediction",
            f"{sum(flat)} of {len(flat)} recorded means lie within 3 standard errors plus 5 % of the SDE's with the "
            f"exact attack. It predicts {penalty['AT, C']:.3f} for adversarial training; expanded it predicts "
            f"{penalty['AT, B']:.3f}: use the exact one to predict, the expanded one to explain.",
        ),
        Finding(
            "The losses",
            f"Clean loss ends at {clean['AT']:.3f} instead of {clean['SGD']:.3f}; loss under the training attack at "
            f"{robust['AT']:.3f} instead of {robust['SGD']:.3f}.",
        ),
    ]
