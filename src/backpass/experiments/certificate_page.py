"""Page of a certificate: checks, plots of SVAG and of predictions, and the recommended schedule."""

from __future__ import annotations

import math
from dataclasses import asdict

from backpass.experiments.certificate import Certified
from backpass.report.result import Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import Interval, mean_interval
from backpass.sde import Certificate, Predictor

__all__ = ["describe"]

_WORDS = {
    "expected_loss": "clean loss",
    "adversarial_loss": "loss under the adversary",
    "gradient_penalty": "E |grad_x L|^2",
}
_POINTS = 9


def describe(certified: Certified) -> Result:
    """Return the content of the page."""
    study, recipe, certificate = certified.study, certified.recipe, certified.certificate
    predictor = certified.predictor
    return Result(
        experiment="sde-certify",
        title=f"Does the SDE describe {study.run.name}?",
        question=(
            "Adversarial training from the present weights is run several times beside its SVAG amplifications, which "
            "approach the SDE with minibatches alone. The SDE describes the run where losses agree, the learning rate "
            "is far from the limit of stability, the accumulated noise is near normal, and permuting the samples does "
            "not change the spread."
        ),
        scale="standard",
        findings=_findings(certified),
        environment={
            **environment(device="cpu", threads=1, data=recipe.data, seeds=[study.seed]),
            "seconds": round(certified.seconds, 1),
        },
        settings={**asdict(study), "run": str(study.run), "model": recipe.model},
        series=[_svag(certificate), *(_predictions(predictor) if predictor else [])],
        tables=[_checks(certificate), _local(certificate, certified.eta)],
        claims=[],
        plots_note="Bands are 95 % intervals: over the replicas for SVAG, of a new run for predictions.",
    )


def _findings(certified: Certified) -> list[Finding]:
    certificate, eta = certified.certificate, certified.eta
    failed = [check for check in certificate.checks if check.verdict == "failed"]
    open_ones = [check.name for check in certificate.checks if check.verdict == "undecided"]
    verdict = (
        f"No check failed at eta = {eta:g}, B = {certified.recipe.batch_size} over {certificate.steps} steps."
        if certificate.valid
        else "Failed: "
        + "; ".join(f"{one.name} is {one.estimate.value:.3g}, expected {one.limit}" for one in failed)
        + "."
    )
    if open_ones:
        verdict += f" Undecided with this many replicas: {', '.join(open_ones)}."
    found = [Finding("The SDE describes this run" if certificate.valid else "The SDE does not describe it", verdict)]
    schedule = certificate.schedule
    if schedule is None:
        found.append(Finding("Schedule", "No recommendation: the curvature along the gradient is not positive."))
    else:
        hold = schedule.switch / eta
        text = (
            f"hold {eta:g} for these {certificate.steps} steps"
            if hold >= certificate.steps
            else f"hold {eta:g} for {hold:.0f} steps, then let 1/rate grow by {schedule.problem.effective:.3g} a step"
        )
        found.append(Finding("Schedule", f"From curvature, noise and gradient at the start: {text}."))
    if certified.notes:
        found.append(Finding("Not covered", " ".join(certified.notes)))
    return found


def _checks(certificate: Certificate) -> Table:
    return Table(
        id="checks",
        title="Checks",
        columns=["Check", "measured", "condition", "verdict"],
        rows=[[check.name, Interval(*check.estimate, 2), check.limit, check.verdict] for check in certificate.checks],
        note="A check fails only where its whole interval violates the condition.",
    )


def _local(certificate: Certificate, eta: float) -> Table:
    local = certificate.local
    return Table(
        id="local",
        title="At the start",
        columns=["Quantity", "value"],
        rows=[
            [name, f"{value:.4g}"]
            for name, value in (
                ("|h|^2, squared mean gradient", local.drift),
                ("tr S, variance of a batch's gradient", local.noise),
                ("noise over drift, tr S / |h|^2", local.noise_to_drift),
                ("curvature along the gradient, through the attack", local.curvature),
                ("largest curvature", local.largest),
                ("largest stable rate, 2 / curvature", 2 / local.largest if local.largest > 0 else math.inf),
                ("eta", eta),
            )
        ],
    )


def _svag(certificate: Certificate) -> Series:
    ls = sorted(certificate.values)
    values = {name: [mean_interval(certificate.values[one][name].tolist()) for one in ls] for name in _WORDS}
    return Series(
        id="svag",
        title="Amplification",
        description="Losses at the end of the runs against the amplification l; l = 1 is training itself.",
        x_label="l",
        y_label="value at the end",
        curves=[Curve(label=words, x=list(map(float, ls)), given=values[name]) for name, words in _WORDS.items()],
        log_x=True,
        log_y=True,
    )


def _predictions(predictor: Predictor) -> list[Series]:
    base = predictor.base
    rates = [base.eta * (0.5 + k / (_POINTS - 1)) for k in range(_POINTS)]
    inner = [base.eta_inner * (0.5 + k / (_POINTS - 1)) for k in range(_POINTS)]
    counts = list(range(max(0, base.steps - 1), base.steps + 3))
    varied: list[tuple[str, str, list[float], list[tuple[float, int, float]]]] = [
        ("eta", "learning rate eta", rates, [(one, base.steps, base.eta_inner) for one in rates]),
        ("k", "steps K of the adversary", [float(k) for k in counts], [(base.eta, k, base.eta_inner) for k in counts]),
        ("eta-inner", "step eta_I of the adversary", inner, [(base.eta, base.steps, one) for one in inner]),
    ]
    found = []
    for id_, label, x, settings in varied:
        predicted = [predictor.predict(*one) for one in settings]
        found.append(
            Series(
                id=f"predicted-{id_}",
                title=f"Predicted against {label}",
                description=f"Losses predicted after the same SDE time, {predictor.time:g}, against {label}.",
                x_label=label,
                y_label="predicted",
                curves=[
                    Curve(label=words, x=x, given=[Interval(*one[name], 2) for one in predicted])
                    for name, words in _WORDS.items()
                ],
                log_y=True,
            )
        )
    return found
