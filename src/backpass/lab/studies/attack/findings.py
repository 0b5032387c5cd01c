"""Findings of an attack study, generated from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from backpass.attacks import Rate
from backpass.lab.studies.attack.comparison import Comparison, Worst, rule_name
from backpass.lab.studies.attack.study import Measured, Placing, Study
from backpass.numbers import fraction_text
from backpass.report.proportions import percent_text
from backpass.report.result import Finding
from backpass.report.wording import interval_text
from backpass.wording import listing

__all__ = ["findings", "subject_findings"]


def findings(measured: Measured, comparisons: Sequence[Comparison], worst: Sequence[Worst]) -> list[Finding]:
    """Return a summary, then a finding for each attack, and the limits of the measurement."""
    study = measured.study
    found = [_summary(measured, comparisons, worst)]
    if measured.reports[study.rules[0]].clean.hits:
        found += [_attack(measured, [c for c in comparisons if c.plan.text == text]) for text in study.attacks]
        found += _together(study, worst)
        found += _masking(measured)
    found += [_placing(text, placing) for text, placing in study.placings.items()]
    found += subject_findings(study)
    found.append(
        Finding(
            "What this cannot say",
            "This is one network and one set of images: the intervals are over images drawn like these, not over "
            "trainings. An image that no attack fooled may still fall to a stronger one: these success rates are lower "
            "bounds.",
        )
    )
    return found


def _summary(measured: Measured, comparisons: Sequence[Comparison], worst: Sequence[Worst]) -> Finding:
    """Return clean accuracy, accuracy under all attacks and the comparison of the rules, a sentence each."""
    study = measured.study
    base = measured.reports[study.rules[0]]
    sentences = [
        f"{study.subject.name} has {base.clean.hits:,} of {base.clean.trials:,} images right, "
        f"{percent_text(base.clean)}."
    ]
    if not base.clean.hits:
        sentences.append("There is nothing to attack: an attack's success counts those alone.")
        return Finding("In short", " ".join(sentences))
    left = [
        f"{percent_text(Rate(base.clean.hits - one.together.hits, base.clean.trials))} at eps {fraction_text(one.eps)}"
        for one in sorted(worst, key=lambda one: one.eps)
    ]
    left = [left[0], *left[1:][-1:]]
    sentences.append(f"Under {'every attack' if len(study.attacks) > 1 else 'attack'} it still has {listing(left)}.")
    differences = [c.difference.interval for c in comparisons if c.difference is not None]
    if differences:
        more, fewer = sum(d.low > 0 for d in differences), sum(d.high < 0 for d in differences)
        sentences.append(
            f"Compared with the gradients of {rule_name(study.rules[0])}, those of the other rules fool significantly "
            f"more images in {more} and significantly fewer in {fewer} of {len(differences)} comparisons."
        )
    return Finding("In short", " ".join(sentences))


def subject_findings(study: Study) -> list[Finding]:
    """Return findings about weights, data and protocol."""
    found = []
    if not study.subject.trained:
        found.append(
            Finding(
                "The weights",
                "No file of weights was given: the network was attacked with its own initial weights. Unless it loads "
                "trained ones by itself, these numbers say nothing about a trained network.",
            )
        )
    if study.data.warning:
        found.append(Finding("The images", study.data.warning))
    if study.protocol.name == "paper":
        step = next((plan.attack.step for plan in study.plans if hasattr(plan.attack, "step")), None)
        found.append(Finding("What eps means here", study.protocol.explain(study.radii, step)))
    return found


def _attack(measured: Measured, comparisons: Sequence[Comparison]) -> Finding:
    """Return the success of one attack with every rule's gradients, at the smallest and the largest radius."""
    ends = {min(measured.study.radii), max(measured.study.radii)}
    comparisons = [one for one in comparisons if one.plan.eps in ends]
    parts = []
    for rule in dict.fromkeys(one.rule for one in comparisons):
        of_rule = [one for one in comparisons if one.rule == rule]
        who = f"with the gradients of {rule_name(rule)}" if of_rule[0].plan.uses_gradients else "without gradients"
        parts.append(f"{who} it fools {listing([_success(measured, one) for one in of_rule])}")
    return Finding(comparisons[0].plan.text, _sentence("; ".join(parts)))


def _success(measured: Measured, one: Comparison) -> str:
    rate = f"{percent_text(measured.reports[one.rule].fooled(one.plan.name))} at eps {fraction_text(one.plan.eps)}"
    if one.difference is None:
        return rate
    interval = one.difference.interval
    told = (
        "significantly more" if interval.low > 0 else "significantly fewer" if interval.high < 0 else "not significant"
    )
    return f"{rate} ({told}: {interval_text(interval, signed=True)} points)"


def _placing(text: str, placing: Placing) -> Finding:
    choice = placing.choice
    assert isinstance(choice.rule.start, int)  # noqa: S101  a search gives a place counted from the end
    best = choice.rates[choice.rule.start]
    told = (
        "On them no start does better than plain backpropagation."
        if best.hits <= choice.plain.hits
        else "That is the best of several on the very images that it was chosen by; the numbers above are of others."
    )
    return Finding(
        f"Where {text} starts",
        f"At {choice.rule}: of {len(choice.rates)} starts it fools most images, {percent_text(best)}, with "
        f"{placing.plan} on images that are not attacked otherwise ({placing.images}). Plain backpropagation fools "
        f"{percent_text(choice.plain)} of them. {told}",
    )


def _together(study: Study, worst: Sequence[Worst]) -> list[Finding]:
    """Return a finding about images that only the further rules fool."""
    if len(study.rules) < 2:
        return []
    parts = [f"{one.further:,} at eps {fraction_text(one.eps)} ({percent_text(one.together)} in all)" for one in worst]
    return [
        Finding(
            f"Beyond {rule_name(study.rules[0])}",
            f"The other rules fool images that {rule_name(study.rules[0])} does not: {listing(parts)}. Any further "
            "attempt may find some, also a further restart with the same gradients.",
        )
    ]


def _masking(measured: Measured) -> list[Finding]:
    """Return a finding about gradient masking: images that only the gradient-free attack fools."""
    study = measured.study
    base = measured.reports[study.rules[0]]
    found = []
    for eps in study.radii:
        blind = [plan for plan in study.plans if plan.eps == eps and not plan.uses_gradients]
        seeing = [plan for plan in study.plans if plan.eps == eps and plan.uses_gradients]
        if not blind or not seeing:
            continue
        only = base.attacks[blind[0].name].success.clone()
        for report in measured.reports.values():
            for plan in seeing:
                only &= ~report.attacks[plan.name].success
        count = int(only.sum())
        advice = (
            "If they are more than a few, either the attacks with gradients are too short (try more steps and "
            "restarts) or gradients are masked, and then those attacks are not to be trusted."
            if count
            else "That is no sign of masked gradients."
        )
        found.append(
            Finding(
                f"Random search, eps {fraction_text(eps)}",
                f"{count:,} images are fooled by random search and by no attack that uses gradients. {advice}",
            )
        )
    return found


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
