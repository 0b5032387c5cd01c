"""Result of a transfer study: a matrix per attack and rule, curves, claims and findings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backpass.attacks import Rate
from backpass.lab.studies.attack.comparison import rule_name
from backpass.lab.studies.attack.plans import Plan
from backpass.lab.studies.attack.settings import plan_settings, protocol_settings, subject_text
from backpass.lab.studies.transfer.measure import Measured
from backpass.numbers import fraction_text
from backpass.report.claims import Claim, agreement
from backpass.report.proportions import judge_images, paired_difference, percent, percent_text
from backpass.report.result import Cell, Curve, Finding, Result, Series, Table, environment
from backpass.report.statistics import holm
from backpass.report.wording import number
from backpass.wording import listing

__all__ = ["describe"]

_PLOTS_NOTE = "Lines are the part of the images fooled, bands their 95 % intervals (Wilson)."
_CLAIMS_NOTE = (
    "Both rules are judged on the same images, those that the target has right; n counts images. The test is McNemar's "
    "exact one. Holm's procedure corrects for the number of comparisons: that any of them is wrongly significant has a "
    "chance of at most 5 %. Each interval has the level at which the procedure decides, so that it leaves out 0 where "
    "the difference is significant. They speak of images drawn like these and of these networks."
)
_REFERENCE = "Guo, Li, Chen, NeurIPS 2020: images made with linear backpropagation transfer better"


def describe(measured: Measured) -> Result:
    """Return the content of the report."""
    study = measured.study
    claims = _claims(measured)
    return Result(
        experiment="transfer",
        title="Do images that fool one network fool another?",
        question=(
            f"The data: {study.data.description}. {listing(list(study.attacks))} makes "
            f"adversarial images against {listing(list(study.sources))}; {listing(list(study.targets))} judges them. "
            "Counted are the images that the target has right when they are clean."
        ),
        scale=f"protocol {study.protocol.name}",
        findings=_findings(measured, claims),
        environment={
            **environment(
                device=str(study.device),
                threads=torch.get_num_threads(),
                data=study.data.description,
                seeds=[study.options["seed"]],
            ),
            "seconds": round(measured.seconds, 1),
        },
        settings={
            **{f"source {name}": subject_text(subject) for name, subject in study.sources.items()},
            **{f"target {name}": subject_text(subject) for name, subject in study.targets.items()},
            "data": study.data.description,
            **protocol_settings(study.protocol, study.radii),
            "rules": ", ".join(study.rules),
            **({} if study.gradients is None else {"gradients of each image": study.gradients}),
            "batch size": study.batch_size,
            **plan_settings(study.plans),
        },
        series=_series(measured),
        claims=claims,
        tables=[_clean(measured), *(_matrix(measured, plan, i) for i, plan in enumerate(study.plans, start=1))],
        numbers={
            "clean_accuracy": {target: rate.to_dict() for target, rate in measured.clean.items()},
            "success_rate": [
                {"attack": plan, "rule": rule, "source": source, "target": target, **rate.to_dict()}
                for (plan, rule), report in measured.reports.items()
                for source, row in report.rates.items()
                for target, rate in row.items()
            ],
            "after_gradients": [
                {
                    "attack": plan,
                    "rule": rule,
                    "source": source,
                    "target": target,
                    "gradients": gradients,
                    **rate.to_dict(),
                }
                for (plan, rule), report in measured.reports.items()
                for source, row in report.curves.items()
                for target, curve in row.items()
                for gradients, rate in curve.items()
            ],
        },
        plots_note=_PLOTS_NOTE,
        claims_note=_CLAIMS_NOTE,
    )


def _clean(measured: Measured) -> Table:
    return Table(
        id="clean",
        title="Clean accuracy of the targets (%)",
        columns=["Target", "Accuracy"],
        rows=[[target, percent(rate)] for target, rate in measured.clean.items()],
    )


def _matrix(measured: Measured, plan: Plan, index: int) -> Table:
    study = measured.study
    rows: list[list[Cell]] = []
    for source in study.sources:
        for rule in study.rules_of(plan):
            who = rule_name(rule) if plan.uses_gradients else "none used"
            rows.append(
                [source, who, *(_cell(measured.rate(plan.name, rule, source, target)) for target in study.targets)]
            )
    return Table(
        id=f"matrix-{index}",
        title=f"{plan.text}, eps {fraction_text(plan.eps)}: fooled of those right (%)",
        columns=["Made against", "Gradients of", *(f"shown to {target}" for target in study.targets)],
        rows=rows,
        note="In brackets Wilson's 95 % intervals. A network shown its own images is white-box; the others are "
        "black-box.",
    )


def _cell(rate: Rate) -> Cell:
    return percent(rate) if rate.trials else "none right"


def _claims(measured: Measured) -> list[Claim]:
    """Return the claims that a rule's images transfer better than the first rule's, for every attack and pair."""
    study = measured.study
    base = study.rules[0]
    compared = [
        (plan, rule, source, target)
        for plan in study.plans
        for rule in study.rules_of(plan)[1:]
        for source, target in study.pairs
        if measured.correct[target].any()
    ]

    def fooled(plan: Plan, rule: str, source: str, target: str) -> Tensor:
        return measured.reports[plan.name, rule].fooled[source][target][measured.correct[target]]

    outcomes = [
        (fooled(plan, rule, source, target), fooled(plan, base, source, target))
        for plan, rule, source, target in compared
    ]
    levels = [one.level for one in holm([paired_difference(ours, theirs).p for ours, theirs in outcomes])]
    return [
        judge_images(
            f"transfer-{number}",
            f"{rule_name(rule)} transfers better than {rule_name(base)} from {source} to {target}: "
            f"{plan.text}, eps {fraction_text(plan.eps)}",
            paired_difference(ours, theirs, level),
            theirs=rule_name(base),
            reference=_REFERENCE if rule.startswith("linbp") and base == "bp" else None,
        )
        for number, ((plan, rule, source, target), (ours, theirs), level) in enumerate(
            zip(compared, outcomes, levels, strict=True), start=1
        )
    ]


def _findings(measured: Measured, claims: list[Claim]) -> list[Finding]:
    study = measured.study
    found = [
        Finding(
            "Clean images",
            listing([f"{name} has {percent_text(rate)}" for name, rate in measured.clean.items()])
            + f" of {len(study.data.images):,} images right.",
        )
    ]
    found += [_average(measured, plan) for plan in study.plans if study.pairs]
    if claims:
        counts = [sum(agreement(claim.verdict) is agrees for claim in claims) for agrees in (True, False, None)]
        found.append(
            Finding(
                "Whether a rule transfers better",
                f"Compared with {rule_name(study.rules[0])}, the other rules' images fool a target significantly more "
                f"often in {counts[0]} and significantly less often in {counts[1]} of {len(claims)} comparisons, one "
                f"for every attack and pair of networks; {counts[2]} are undecided.",
            )
        )
    both = {**study.sources, **study.targets}
    initial = [name for name, subject in both.items() if not subject.trained]
    if initial:
        found.append(
            Finding(
                "The weights",
                f"For {listing(initial)} no file of weights was given: the initial ones were used. Unless such a "
                "network loads trained ones by itself, its numbers say nothing about a trained network.",
            )
        )
    if study.data.warning:
        found.append(Finding("The images", study.data.warning))
    if study.protocol.name == "paper":
        step = next((plan.attack.step for plan in study.plans if hasattr(plan.attack, "step")), None)
        found.append(Finding("What eps means here", study.protocol.explain(study.radii, step)))
    return found


def _average(measured: Measured, plan: Plan) -> Finding:
    study = measured.study
    parts = []
    for rule in study.rules_of(plan):
        rates = [measured.rate(plan.name, rule, source, target).value for source, target in study.pairs]
        finite = [100 * rate for rate in rates if math.isfinite(rate)]
        mean = f"{number(sum(finite) / len(finite))} %" if finite else "nothing, as no target has an image right"
        parts.append(f"{rule_name(rule)} {mean}" if plan.uses_gradients else f"random search {mean}")
    return Finding(
        f"{plan.text}, eps {fraction_text(plan.eps)}",
        f"Black-box success, the mean over {len(study.pairs)} pair{'s' if len(study.pairs) > 1 else ''} of networks: "
        f"{listing(parts)}.",
    )


def _series(measured: Measured) -> list[Series]:
    """Return plots of the success on targets against eps and, with a budget, against the number of gradients."""
    return [*_against_eps(measured), *_against_gradients(measured)]


def _against_gradients(measured: Measured) -> list[Series]:
    """Return a plot per pair and radius, with a curve per attack and rule."""
    study = measured.study
    if study.gradients is None or study.gradients < 2:
        return []
    made: list[Series] = []
    for eps in study.radii:
        plans = [plan for plan in study.plans if plan.eps == eps]
        for source, target in study.pairs:
            curves = []
            for plan in plans:
                for rule in study.rules_of(plan):
                    found = measured.reports[plan.name, rule].curves[source][target]
                    curves.append(
                        Curve(
                            label=rule_name(rule) if len(plans) == 1 else f"{plan.text}, {rule_name(rule)}",
                            x=list(map(float, found)),
                            given=[percent(rate) for rate in found.values()],
                        )
                    )
            made.append(
                Series(
                    id=f"gradients-{len(made) + 1}",
                    title=f"{source} to {target}, eps {fraction_text(eps)}, success against gradients used",
                    description=f"{measured.clean[target].hits:,} images that {target} has right. A step of an attack "
                    "may take several gradients; between two steps the images stay as they are.",
                    x_label="gradients of each image",
                    y_label="images fooled (%)",
                    curves=curves,
                )
            )
    return made


def _against_eps(measured: Measured) -> list[Series]:
    """Return a plot per attack and pair, if there are enough radii for a line."""
    study = measured.study
    if len(study.radii) < 2:
        return []
    in_255ths = all("/255" in fraction_text(eps) for eps in study.radii)
    made: list[Series] = []
    for text in study.attacks:
        plans = sorted((plan for plan in study.plans if plan.text == text), key=lambda plan: plan.eps)
        for source, target in study.pairs:
            curves = [
                Curve(
                    label=rule_name(rule),
                    x=[round(plan.eps * (255 if in_255ths else 1), 9) for plan in plans],
                    given=[percent(measured.rate(plan.name, rule, source, target)) for plan in plans],
                )
                for rule in study.rules_of(plans[0])
            ]
            made.append(
                Series(
                    id=f"transfer-{len(made) + 1}",
                    title=f"{text}: {source} to {target}",
                    description=f"{measured.clean[target].hits:,} images that {target} has right.",
                    x_label="eps (255ths)" if in_255ths else "eps",
                    y_label="images fooled (%)",
                    curves=curves,
                )
            )
    return made
