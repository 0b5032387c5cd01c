"""Transfer of adversarial images between networks, as an experiment: one arm per attack, radius, rule and source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from backpass.attacks import Iterative, Rate, transfer
from backpass.experiments.experiment import Arm, Comparison, Context, Design, Experiment, Measurement, Outcome, Plot
from backpass.experiments.judging import RunsByArm
from backpass.experiments.studies import (
    AttackImages,
    Run,
    Study,
    comparison_of_rules,
    limits,
    radius_axis,
    rule_name,
    settings_of,
)
from backpass.lab.placements import parse_rule_for
from backpass.lab.plans import Plan
from backpass.numbers import fraction_text
from backpass.report.proportions import marks, percent, percent_text, rate_of
from backpass.report.result import Finding, Result, Table
from backpass.report.wording import number
from backpass.wording import listing

__all__ = ["transfer_experiment", "transfer_images", "transfer_result"]

_PLOTS_NOTE = "Lines are the part of the images fooled, bands their 95 % intervals (Wilson)."
_CLAIMS_NOTE = (
    "Both rules are judged on the same images, those that the target has right; n counts images. The interval belongs "
    "to McNemar's exact test. They speak of images drawn like these and of these networks."
)
_REFERENCE = "Guo, Li, Chen, NeurIPS 2020: images made with linear backpropagation transfer better"


def transfer_images(settings: Run, seed: int, context: Context) -> Outcome:
    """Attack one source under a rule; return the marks of the images on every target.

    ``shown to T`` has the marks of the final images on the target T, ``T after gradients`` a list of marks, one for
    each number in ``gradients``, and ``clean T`` those of the clean images, 1 where T has them right.
    """
    study: Study = context.loaded
    plan, source = study.plan(settings.plan), settings.source
    subject = study.sources[source]
    with parse_rule_for(subject.name, settings.rule).attach(subject.network):
        report = transfer(
            {source: study.protocol.model(subject.model)},
            {name: study.protocol.model(target.model) for name, target in study.targets.items()},
            AttackImages(study.data, study.protocol),
            plan.attack,
            batch_size=study.batch_size,
            classes=study.target,
            resume=study.shards,
            tag=settings.rule,
            gradients=_budgets(study, plan),
            progress=lambda done, total: context.progress(done / max(total, 1)),
        )
    found: dict[str, Any] = {"gradients": _budgets(study, plan) or []}
    for target, fooled in report.fooled[source].items():
        attacked = report.attacked[target]
        found[f"clean {target}"] = marks(report.correct[target])
        found[f"shown to {target}"] = marks(fooled, attacked)
        found[f"{target} after gradients"] = [marks(one[source][target], attacked) for one in report.after.values()]
    return found


def _budgets(study: Study, plan: Plan) -> list[int] | None:
    """Return the numbers of gradients at which an attack is evaluated: 1, 2, 5, 10, ... and the budget."""
    if study.gradients is None or not isinstance(plan.attack, Iterative):
        return None
    least, budget = plan.attack.cost(1), study.gradients
    series = [first * 10**power for power in range(len(str(budget))) for first in (1, 2, 5)]
    return sorted({budget, *(mark for mark in series if least <= mark < budget)})


def _arm(plan: Plan, rule: str) -> str:
    return f"{plan.name}, {rule_name(rule)}" if plan.uses_gradients else plan.name


def _fooled(target: str) -> Measurement:
    return Measurement(label=f"shown to {target}", unit="%", key=f"shown to {target}", images=True)


def transfer_experiment(study: Study) -> Experiment:
    """Return the experiment of a study: a group per source, an arm per attack, radius and rule."""
    design = Design(
        arms=tuple(
            Arm(name=_arm(plan, rule), work=transfer_images, group=source,
                candidates={"": study.run(rule, plan, source)})
            for source in study.sources
            for plan in study.plans
            for rule in study.rules_of(plan)
        ),
        seeds=(study.options["seed"],),
        measurements=tuple(map(_fooled, study.targets)),
        comparisons=tuple(_comparisons(study)),
        plots=(*_against_eps(study), *_against_gradients(study)),
        data=lambda: study.data.description,
    )  # fmt: skip
    return Experiment(
        name="transfer",
        title="Do images that fool one network fool another?",
        question=f"The data: {study.data.description}. {listing(list(study.attacks))} makes adversarial images against "
        f"{listing(list(study.sources))}; {listing(list(study.targets))} judges them. Counted are the images that the "
        "target has right when they are clean.",
        source="",
        scales={f"protocol {study.protocol.name}": design},
        plots_note=_PLOTS_NOTE,
        claims_note=_CLAIMS_NOTE,
    )


def _pairs(study: Study) -> list[tuple[str, str]]:
    """Return the pairs (source, target) of different networks."""
    return [(source, target) for source in study.sources for target in study.targets if source != target]


def _comparisons(study: Study) -> Iterator[Comparison]:
    base = study.rules[0]
    every = [
        (plan, rule, source, target)
        for plan in study.plans
        for rule in study.rules_of(plan)[1:]
        for source, target in _pairs(study)
    ]
    for place, (plan, rule, source, target) in enumerate(every, start=1):
        yield Comparison(
            id=f"{place}",
            statement=f"{rule_name(rule)} transfers better than {rule_name(base)} from {source} to {target}: "
            f"{plan.text}, eps {fraction_text(plan.eps)}",
            measurement=_fooled(target),
            ours=_arm(plan, rule),
            theirs=_arm(plan, base),
            group=source,
            reference=_REFERENCE if rule.startswith("linbp") and base == "bp" else "",
        )


def _against_eps(study: Study) -> Iterator[Plot]:
    """Yield a plot per attack and pair, if there are enough radii for a line."""
    if len(study.radii) < 2:
        return
    label, places = radius_axis(sorted(study.radii))
    for text in study.attacks:
        plans = sorted((plan for plan in study.plans if plan.text == text), key=lambda plan: plan.eps)
        lines = {rule_name(rule): [_arm(plan, rule) for plan in plans] for rule in study.rules_of(plans[0])}
        for source, target in _pairs(study):
            yield Plot(title=f"{text}, shown to {target}", x=places, x_label=label, y_label="images fooled (%)",
                       measurement=_fooled(target), lines=lines, groups=(source,))  # fmt: skip


def _against_gradients(study: Study) -> Iterator[Plot]:
    """Yield a plot per pair and radius against the gradients used, with a line per attack and rule."""
    if study.gradients is None or study.gradients < 2:
        return
    for eps in study.radii:
        plans = [plan for plan in study.plans if plan.eps == eps]
        for source, target in _pairs(study):
            yield Plot(
                title=f"eps {fraction_text(eps)}, shown to {target}, success against gradients used",
                key=f"{target} after gradients", x="gradients", images=True, groups=(source,),
                x_label="gradients of each image", y_label="images fooled (%)",
                arms=tuple(_arm(plan, rule) for plan in plans for rule in study.rules_of(plan)),
            )  # fmt: skip


def transfer_result(study: Study, result: Result, found: RunsByArm) -> Result:
    """Return the result with the targets' clean accuracy and the mean success of every rule.

    Args:
        study: the study.
        result: result of the harness.
        found: the outcomes.
    """
    outcome = next(iter(found.values())).runs[0]
    clean = {target: rate_of(outcome[f"clean {target}"]) for target in study.targets}
    words = listing([f"{name} has {percent_text(rate)}" for name, rate in clean.items()])
    own = [Finding("Clean images", f"{words} of {len(study.data.images):,} images right.")]
    own += [_mean(study, found, plan) for plan in study.plans if _pairs(study)]
    own += [Finding("Whether a rule transfers better", text) for text in comparison_of_rules(study, result.claims)]
    accuracy = Table(
        id="clean",
        title="Clean accuracy of the targets (%)",
        columns=["Target", "Accuracy"],
        rows=[[target, percent(rate)] for target, rate in clean.items()],
    )
    return replace(
        result,
        settings=settings_of(study),
        findings=[*own, *limits(study)],
        tables=[accuracy, *result.tables],
        numbers={**result.numbers, "success_rate": _numbers(study, found)},
    )


def _mean(study: Study, found: RunsByArm, plan: Plan) -> Finding:
    parts = []
    for rule in study.rules_of(plan):
        rates = [_rate(found, plan, rule, source, target).value for source, target in _pairs(study)]
        finite = [100 * rate for rate in rates if math.isfinite(rate)]
        mean = f"{number(sum(finite) / len(finite))} %" if finite else "nothing, as no target has an image right"
        parts.append(f"{rule_name(rule)} {mean}" if plan.uses_gradients else f"random search {mean}")
    count = len(_pairs(study))
    return Finding(
        f"{plan.text}, eps {fraction_text(plan.eps)}",
        f"Black-box success, the mean over {count} pair{'s' if count > 1 else ''} of networks: {listing(parts)}.",
    )


def _rate(found: RunsByArm, plan: Plan, rule: str, source: str, target: str) -> Rate:
    return rate_of(found[source, _arm(plan, rule)].runs[0][f"shown to {target}"])


def _numbers(study: Study, found: RunsByArm) -> list[dict[str, object]]:
    """Return the success rate of every attack, rule, source and target, and of every number of gradients."""
    made: list[dict[str, object]] = []
    for source in study.sources:
        for plan in study.plans:
            for rule in study.rules_of(plan):
                outcome = found[source, _arm(plan, rule)].runs[0]
                for target in study.targets:
                    own = {"attack": plan.name, "rule": rule, "source": source, "target": target}
                    after = zip(outcome["gradients"], outcome[f"{target} after gradients"], strict=True)
                    curve = [{"gradients": count, **rate_of(text).to_dict()} for count, text in after]
                    made.append({**own, **_rate(found, plan, rule, source, target).to_dict(), "after_gradients": curve})
    return made
