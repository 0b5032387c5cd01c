"""Result of an attack study: tables, curves, images, claims and findings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backpass.attacks import Rate
from backpass.lab.studies.attack.comparison import (
    Comparison,
    Worst,
    claims,
    compare,
    rule_name,
    worst_cases,
)
from backpass.lab.studies.attack.findings import findings
from backpass.lab.studies.attack.gallery import gallery
from backpass.lab.studies.attack.settings import plan_settings, protocol_settings, subject_text, target_text
from backpass.lab.studies.attack.study import Measured, Placing, Sweep
from backpass.numbers import fraction_text
from backpass.report.proportions import percent
from backpass.report.result import Cell, Curve, Result, Series, Table, environment
from backpass.wording import listing

__all__ = ["CLAIMS_NOTE", "PLOTS_NOTE", "describe"]

PLOTS_NOTE = (
    "Lines are shares of images, bands their 95 % intervals: Wilson's for a share, Agresti and Min's for a difference."
)
CLAIMS_NOTE = (
    "A pair is one image, attacked from the same random starts with either rule's gradients. The interval is Agresti "
    "and Min's (2005) at 95 % for a difference of paired proportions, p is McNemar's exact two-sided one. They speak "
    "of images drawn like these and of this one network."
)
_MOST_FREQUENT = 8
_MOST_CLASSES = 30


def describe(measured: Measured) -> Result:
    """Return the content of the report."""
    study = measured.study
    comparisons, worst = compare(measured), worst_cases(measured)
    classes, numbers_by_class = _classes(measured, worst)
    base = study.rules[0]
    right = measured.reports[base].clean.hits
    others = [rule_name(rule) for rule in study.rules[1:]]
    with_rules = f", with the gradients of {listing([rule_name(base), *others])}" if others else ""
    return Result(
        experiment="attack",
        title=f"How easily is {study.subject.name} fooled?",
        question=(
            f"The data: {study.data.description}. The images that the network has right are "
            f"attacked by {listing(list(study.attacks))}{with_rules}. The network itself, its weights and its answers "
            f"are the same throughout; success is judged on the plain network."
        ),
        scale=f"protocol {study.protocol.name}",
        findings=findings(measured, comparisons, worst),
        environment={
            **environment(
                device=str(study.device),
                threads=torch.get_num_threads(),
                data=study.data.description,
                seeds=[study.options["seed"]],
            ),
            "seconds": round(measured.seconds, 1),
            "parts": f"{measured.computed} computed, {measured.reused} found finished",
        },
        settings=_settings(measured),
        series=[*(_series(measured, sweep) for sweep in measured.sweeps), *_differences(measured, comparisons)]
        if right
        else [],
        tables=_tables(measured, comparisons, worst, classes) if right else [],
        claims=claims(comparisons, base),
        galleries=gallery(measured),
        numbers={
            "rules": {rule: report.to_dict() for rule, report in measured.reports.items()},
            "classes": numbers_by_class,
            "paired_differences": [
                {"attack": one.plan.name, "rule": one.rule, "baseline": base, **one.difference._asdict()}
                for one in comparisons
                if one.difference is not None
            ],
        },
        plots_note=PLOTS_NOTE,
        claims_note=CLAIMS_NOTE,
    )


def _settings(measured: Measured) -> dict[str, object]:
    study = measured.study
    return {
        "network": subject_text(study.subject),
        "data": study.data.description,
        **protocol_settings(study.protocol, study.radii),
        "rules": ", ".join(study.rules),
        **({} if study.target is None else {"target class": target_text(study.data, study.target)}),
        "batch size": study.batch_size,
        "curves": f"measured on {study.swept} images at most" if study.swept else "left out",
        **plan_settings(study.plans),
    }


def _tables(
    measured: Measured, comparisons: Sequence[Comparison], worst: Sequence[Worst], classes: Table
) -> list[Table]:
    study = measured.study
    base = measured.reports[study.rules[0]]
    rows: list[list[Cell]] = [["none", "", "", percent(base.clean), "", "", ""]]
    for one in comparisons:
        report = measured.reports[one.rule]
        rows.append(
            [
                one.plan.text,
                fraction_text(one.plan.eps),
                rule_name(one.rule) if one.plan.uses_gradients else "none used",
                percent(report.robust(one.plan.name)),
                percent(report.fooled(one.plan.name)),
                one.difference.interval if one.difference is not None else "",
                report.attacks[one.plan.name].gradients,
            ]
        )
    tables = [
        Table(
            id="success",
            title="Accuracy under attack, and success",
            columns=[
                "Attack",
                "eps",
                "Gradients of",
                "Accuracy (%)",
                "Fooled of those right (%)",
                f"Difference to {rule_name(study.rules[0])} (points)",
                "Sample gradients",
            ],
            rows=rows,
            note="In brackets 95 % intervals: Wilson's for rates, Agresti and Min's for paired differences. Sample "
            "gradients count what was computed: a fooled image leaves the search.",
        )
    ]
    if len(study.attacks) > 1 or len(study.rules) > 1:
        tables.append(_worst(measured, worst))
    placings = [_placing(text, placing) for text, placing in study.placings.items()]
    return [*tables, classes, *placings, _confusion(measured)]


def _classes(measured: Measured, worst: Sequence[Worst]) -> tuple[Table, list[dict[str, object]]]:
    """Return clean accuracy and accuracy under all attacks by class: a table of the lowest, and all for the JSON."""
    study, base = measured.study, measured.reports[measured.study.rules[0]]
    outcomes = {
        "Right, clean": base.correct,
        **{f"Right, eps {fraction_text(one.eps)}": base.correct & ~one.fooled for one in worst},
    }
    rates: dict[int, list[Rate]] = {}
    for label in torch.unique(base.y).tolist():
        of_class = base.y == label
        rates[label] = [Rate(int(right[of_class].sum()), int(of_class.sum())) for right in outcomes.values()]
    shown = sorted(rates)
    if len(rates) > _MOST_CLASSES:
        shown = sorted(rates, key=lambda label: (rates[label][-1].value, rates[label][0].value))[:_MOST_CLASSES]
    few = f" The {len(shown)} of {len(rates)} classes with the lowest accuracy; result.json has all."
    table = Table(
        id="classes",
        title="Class by class: right, clean and under all attacks (%)",
        columns=["Class", "Images", *outcomes],
        rows=[[study.data.class_name(k), rates[k][0].trials, *map(percent, rates[k])] for k in shown],
        note="Of all images of the class, with Wilson's 95 % intervals. Under attack an image counts as right where no "
        "attack fools it, with the gradients of any rule." + (few if len(shown) < len(rates) else ""),
    )
    everything = [
        {"label": k, "class": study.data.class_name(k), **dict(zip(outcomes, (r.to_dict() for r in row), strict=True))}
        for k, row in rates.items()
    ]
    return table, everything


def _placing(text: str, placing: Placing) -> Table:
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


def _worst(measured: Measured, worst: Sequence[Worst]) -> Table:
    rules = list(measured.reports)
    together = ["all together"] if len(rules) > 1 else []
    return Table(
        id="worst",
        title="All attacks together: fooled of those right (%)",
        columns=["eps", *map(rule_name, rules), *together],
        rows=[
            [
                fraction_text(one.eps),
                *(percent(one.by_rule[rule]) for rule in rules),
                *([percent(one.together)] if together else []),
            ]
            for one in worst
        ],
        note="An image counts as fooled where at least one of the attacks fools it.",
    )


def _confusion(measured: Measured) -> Table:
    """Return the confusion table of labels and predicted classes under the first attack."""
    study = measured.study
    name = study.plans[0].name
    cells = measured.reports[study.rules[0]].confusion(name)
    top = cells.flatten().sort(descending=True, stable=True)
    rows: list[list[Cell]] = [
        [study.data.class_name(place // len(cells)), study.data.class_name(place % len(cells)), count]
        for count, place in zip(
            top.values[:_MOST_FREQUENT].tolist(), top.indices[:_MOST_FREQUENT].tolist(), strict=True
        )
        if count
    ]
    return Table(
        id="confusion",
        title="What becomes what",
        columns=["Class", "seen as", "images"],
        rows=rows,
        note=f"The most frequent changes under {name}, gradients of {rule_name(study.rules[0])}; all are in the JSON.",
    )


def _differences(measured: Measured, comparisons: Sequence[Comparison]) -> list[Series]:
    """Return a plot for each attack: the difference of each rule's success to that of the first rule, by radius."""
    study = measured.study
    label, unit = _radius_axis(study.radii)
    made = []
    for index, text in enumerate(study.attacks, start=1):
        curves = []
        for rule in study.rules[1:]:
            found = {
                c.plan.eps: c.difference.interval
                for c in comparisons
                if (c.plan.text, c.rule) == (text, rule) and c.difference
            }
            if len(found) > 1:
                places = sorted(found)
                given = [found[eps] for eps in places]
                curves.append(Curve(label=rule_name(rule), x=[round(unit * eps, 9) for eps in places], given=given))
        if curves:
            base = rule_name(study.rules[0])
            made.append(
                Series(
                    id=f"difference-{index}",
                    title=f"{text}: difference to {base}",
                    description=f"Share of images fooled less that of {base}, on the same images. Below zero "
                    "the rule's gradients make the weaker attack.",
                    x_label=label,
                    y_label="difference (points)",
                    curves=curves,
                )
            )
    return made


def _radius_axis(radii: Sequence[float]) -> tuple[str, float]:
    """Return the label of an axis of radii and the factor to its unit."""
    in_255ths = all("/255" in fraction_text(eps) for eps in radii)
    return ("eps (255ths)", 255.0) if in_255ths else ("eps", 1.0)


def _series(measured: Measured, sweep: Sweep) -> Series:
    label, unit = _radius_axis(measured.study.radii) if sweep.over == "eps" else ("steps", 1.0)
    rates = next(iter(sweep.rates.values()))
    return Series(
        id=f"{sweep.over}-{measured.study.attacks.index(sweep.attack) + 1}",
        title=f"{sweep.attack}: success against {sweep.over}",
        description=f"{sweep.fixed}; {rates[0].trials:,} images that the network has right, of the first "
        f"{sweep.images:,}.",
        x_label=label,
        y_label="images fooled (%)",
        curves=[
            Curve(
                label=rule_name(rule),
                x=[round(place * unit, 9) for place in sweep.places],
                given=[percent(rate) for rate in of_rule],
            )
            for rule, of_rule in sweep.rates.items()
        ],
        log_x=sweep.over == "steps",
    )
