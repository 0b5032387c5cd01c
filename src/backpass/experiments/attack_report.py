"""Parts of the report of an attack study that are not of every experiment: summary, worst case, classes, images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backpass.attacks import Rate
from backpass.experiments.attack_study import arm_name
from backpass.experiments.experiment import Outcome
from backpass.experiments.judging import RunsByArm
from backpass.experiments.placing import Placing
from backpass.experiments.samples import gallery
from backpass.experiments.studies import Study, comparison_of_rules, limits, rule_name, settings_of
from backpass.lab.plans import Plan
from backpass.numbers import fraction_text
from backpass.report.proportions import percent, percent_text, rate_of
from backpass.report.result import Cell, Finding, Result, Table
from backpass.wording import listing

__all__ = ["attack_result"]

_LIMITS = Finding(
    "What this cannot say",
    "This is one network and one set of images: the intervals are over images drawn like these, not over trainings. An "
    "image that no attack fooled may still fall to a stronger one: these success rates are lower bounds.",
)
_MOST_FREQUENT = 8
_MOST_CLASSES = 30


@dataclass(frozen=True, kw_only=True, eq=False)
class _Worst:
    """Images that at least one attack fools at one radius, in all and by rule; (N,) bool each."""

    eps: float
    by_rule: Mapping[str, Tensor]

    @property
    def fooled(self) -> Tensor:
        return torch.stack(list(self.by_rule.values())).any(0)


def attack_result(study: Study, result: Result, found: RunsByArm, placings: Mapping[str, Placing]) -> Result:
    """Return the result of an attack study with its summary, further tables and images.

    Args:
        study: the study.
        result: result of the harness.
        found: the outcomes.
        placings: selected start by text form of the rule with ``start=auto``.
    """
    runs = {(rule, plan.name): _outcome(study, found, rule, plan) for plan in study.plans for rule in study.rules}
    right = _bool(next(iter(runs.values()))["right"])
    worst = [_worst(study, runs, eps) for eps in study.radii]
    about = [_placing_finding(text, one) for text, one in placings.items()]
    base = replace(
        result,
        settings={**settings_of(study), "curves": _curves_text(study)},
        environment={
            **result.environment,
            "parts": f"{study.parts['computed']} computed, {study.parts['reused']} found finished",
        },
    )
    if not right.any():
        return replace(base, findings=[_summary(study, result, right, []), *about, *limits(study)],
                       tables=[], series=[], claims=[])  # fmt: skip
    classes, numbers = _classes(study, right, worst)
    rules = {rule: _numbers(study, runs, rule) for rule in study.rules}
    several = len(study.attacks) > 1 or len(study.rules) > 1
    tables = [_worst_table(study, worst, int(right.sum()))] if several else []
    tables += [classes, *(_placing_table(text, one) for text, one in placings.items())]
    tables.append(_confusion(study, rules[study.rules[0]]["attacks"][study.plans[0].name]["confusion"]))
    first = [_summary(study, result, right, worst), *_together(study, worst, int(right.sum()))]
    return replace(
        base,
        findings=[*first, *_masking(study, runs), *about, *limits(study), _LIMITS],
        tables=[*result.tables, *tables],
        galleries=gallery(study, {rule: runs[rule, _shown(study).name] for rule in study.rules_of(_shown(study))}),
        numbers={**result.numbers, "classes": numbers, "rules": rules},
    )


def _outcome(study: Study, found: RunsByArm, rule: str, plan: Plan) -> Outcome:
    """Return the outcome of a rule; that of the first rule for an attack without gradients."""
    own = rule if plan.uses_gradients else study.rules[0]
    return found[plan.text, arm_name(own, plan)].runs[0]


def _bool(text: str) -> Tensor:
    return torch.tensor([mark == "1" for mark in text])


def _shown(study: Study) -> Plan:
    return next((plan for plan in study.plans if plan.uses_gradients), study.plans[0])


def _curves_text(study: Study) -> str:
    return f"measured on {study.swept} images at most" if study.swept else "left out"


def _worst(study: Study, runs: Mapping[tuple[str, str], Outcome], eps: float) -> _Worst:
    names = [plan.name for plan in study.plans if plan.eps == eps]
    by_rule = {rule: torch.stack([_bool(runs[rule, name]["fooled"]) for name in names]).any(0) for rule in study.rules}
    return _Worst(eps=eps, by_rule=by_rule)


def _summary(study: Study, result: Result, right: Tensor, worst: Sequence[_Worst]) -> Finding:
    """Return clean accuracy, accuracy under all attacks and the comparison of the rules, a sentence each."""
    clean = Rate(int(right.sum()), len(right))
    sentences = [f"{study.subject.name} has {clean.hits:,} of {clean.trials:,} images right, {percent_text(clean)}."]
    if not worst:
        sentences.append("There is nothing to attack: an attack's success counts those alone.")
        return Finding("In short", " ".join(sentences))
    left = [
        f"{percent_text(Rate(int((right & ~one.fooled).sum()), len(right)))} at eps {fraction_text(one.eps)}"
        for one in sorted(worst, key=lambda one: one.eps)
    ]
    left = [left[0], *left[1:][-1:]]
    sentences.append(f"Under {'every attack' if len(study.attacks) > 1 else 'attack'} it still has {listing(left)}.")
    return Finding("In short", " ".join([*sentences, *comparison_of_rules(study, result.claims)]))


def _together(study: Study, worst: Sequence[_Worst], right: int) -> list[Finding]:
    """Return a finding about images that only the further rules fool."""
    if len(study.rules) < 2:
        return []
    parts = [
        f"{int((one.fooled & ~one.by_rule[study.rules[0]]).sum()):,} at eps {fraction_text(one.eps)} "
        f"({percent_text(Rate(int(one.fooled.sum()), right))} in all)"
        for one in worst
    ]
    return [
        Finding(
            f"Beyond {rule_name(study.rules[0])}",
            f"The other rules fool images that {rule_name(study.rules[0])} does not: {listing(parts)}. Any further "
            "attempt may find some, also a further restart with the same gradients.",
        )
    ]


def _masking(study: Study, runs: Mapping[tuple[str, str], Outcome]) -> list[Finding]:
    """Return a finding about gradient masking: images that only the gradient-free attack fools."""
    found = []
    for eps in study.radii:
        blind = [plan.name for plan in study.plans if plan.eps == eps and not plan.uses_gradients]
        seeing = [plan.name for plan in study.plans if plan.eps == eps and plan.uses_gradients]
        if not blind or not seeing:
            continue
        only = _bool(runs[study.rules[0], blind[0]]["fooled"])
        for name in seeing:
            for rule in study.rules:
                only &= ~_bool(runs[rule, name]["fooled"])
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
                f"Images fooled by random search and by no attack that uses gradients: {count:,}. {advice}",
            )
        )
    return found


def _worst_table(study: Study, worst: Sequence[_Worst], right: int) -> Table:
    together = ["all together"] if len(study.rules) > 1 else []
    rows: list[list[Cell]] = []
    for one in worst:
        fooled = [*one.by_rule.values(), *([one.fooled] if together else [])]
        rows.append([fraction_text(one.eps), *(percent(Rate(int(some.sum()), right)) for some in fooled)])
    return Table(
        id="worst",
        title="All attacks together: fooled of those right (%)",
        columns=["eps", *map(rule_name, study.rules), *together],
        rows=rows,
        note="An image counts as fooled where at least one of the attacks fools it.",
    )


def _classes(study: Study, right: Tensor, worst: Sequence[_Worst]) -> tuple[Table, list[dict[str, object]]]:
    """Return clean accuracy and accuracy under all attacks by class: a table of the lowest, and all for the JSON."""
    y, names = study.data.images.labels, study.data.class_name
    outcomes = {
        "Right, clean": right,
        **{f"Right, eps {fraction_text(one.eps)}": right & ~one.fooled for one in worst},
    }
    rates: dict[int, list[Rate]] = {}
    for label in torch.unique(y).tolist():
        of_class = y == label
        rates[label] = [Rate(int(some[of_class].sum()), int(of_class.sum())) for some in outcomes.values()]
    shown = sorted(rates)
    if len(rates) > _MOST_CLASSES:
        shown = sorted(rates, key=lambda label: (rates[label][-1].value, rates[label][0].value))[:_MOST_CLASSES]
    few = f" The {len(shown)} of {len(rates)} classes with the lowest accuracy; result.json has all."
    table = Table(
        id="classes",
        title="Class by class: right, clean and under all attacks (%)",
        columns=["Class", "Images", *outcomes],
        rows=[[names(k), rates[k][0].trials, *map(percent, rates[k])] for k in shown],
        note="Of all images of the class, with Wilson's 95 % intervals. Under attack an image counts as right where no "
        "attack fools it, with the gradients of any rule." + (few if len(shown) < len(rates) else ""),
    )
    everything: list[dict[str, object]] = [
        {"label": k, "class": names(k), **dict(zip(outcomes, (r.to_dict() for r in row), strict=True))}
        for k, row in rates.items()
    ]
    return table, everything


def _numbers(study: Study, runs: Mapping[tuple[str, str], Outcome], rule: str) -> dict[str, Any]:
    """Return the rates of every attack under a rule, and its changes of class as (label, seen as, images)."""
    attacks = {}
    for plan in study.plans:
        outcome = runs[rule, plan.name]
        if rule not in study.rules_of(plan):
            continue
        pairs = torch.stack([study.data.images.labels.long(), torch.tensor(outcome["prediction"])], 1)
        changes, counts = torch.unique(pairs[_bool(outcome["fooled"])], dim=0, return_counts=True)
        attacks[plan.name] = {
            "robust_accuracy": rate_of(outcome["robust"]).to_dict(),
            "success_rate": rate_of(outcome["fooled"]).to_dict(),
            "confusion": torch.cat([changes, counts[:, None]], 1).tolist(),
            "gradients": outcome["gradients"],
        }
    clean = rate_of(runs[rule, study.plans[0].name]["right"])
    return {"clean_accuracy": clean.to_dict(), "attacks": attacks}


def _confusion(study: Study, changes: Sequence[Sequence[int]]) -> Table:
    """Return the most frequent changes of class under the first attack."""
    names = study.data.class_name
    top = sorted(changes, key=lambda row: -row[2])[:_MOST_FREQUENT]
    return Table(
        id="confusion",
        title="What becomes what",
        columns=["Class", "seen as", "images"],
        rows=[[names(label), names(seen), count] for label, seen, count in top],
        note=f"The most frequent changes under {study.plans[0].name}, gradients of {rule_name(study.rules[0])}; all "
        "are in the JSON.",
    )


def _placing_table(text: str, placing: Placing) -> Table:
    """Return a table of all candidate starts with their success."""
    choice = placing.choice
    rows: list[list[Cell]] = [["none: BP", percent(choice.plain)]]
    rows += [[f"{start}", percent(rate)] for start, rate in choice.rates.items()]
    return Table(
        id=f"placing-{choice.rule.start}",
        title=f"Where {text} starts",
        columns=["First linear site, from the end", "Fooled of those right (%)"],
        rows=rows,
        note=f"{placing.plan}; {placing.images}. None of these images is attacked otherwise.",
    )


def _placing_finding(text: str, placing: Placing) -> Finding:
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
