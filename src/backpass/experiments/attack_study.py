"""Attacks on one network under several rules, as an experiment with one arm per attack, radius and rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from backpass.attacks import Attack, Report, evaluate
from backpass.data import Labelled
from backpass.experiments.experiment import Arm, Comparison, Context, Design, Experiment, Measurement, Outcome, Plot
from backpass.experiments.studies import AttackImages, Run, Study, radius_axis, rule_name
from backpass.experiments.sweeps import planned_sweeps
from backpass.lab.plans import Plan
from backpass.numbers import fraction_text
from backpass.report.proportions import marks
from backpass.rules import parse_rule
from backpass.wording import listing

__all__ = ["FOOLED", "arm_name", "attack_experiment", "attack_images", "success_curve"]

_PLOTS_NOTE = "Lines are shares of images, or paired differences; bands their 95 % intervals, of Wilson or of McNemar."
_CLAIMS_NOTE = (
    "A pair is one image, attacked from the same random starts with either rule's gradients. The interval belongs to "
    "McNemar's exact test. They speak of images drawn like these and of this one network."
)
_TABLE = "Li et al., arXiv 2112.11018, Tables I and II: on deep CIFAR-10 networks"
ROBUST = Measurement(label="accuracy", unit="%", key="robust", images=True)
FOOLED = Measurement(label="fooled of those right", unit="%", key="fooled", images=True)
_GRADIENTS = Measurement(label="sample gradients", key="gradients")


def attack_images(settings: Run, seed: int, context: Context) -> Outcome:
    """Attack every image once; return the marks of the images and the predictions under attack."""
    study: Study = context.loaded
    report = _evaluate(context, settings.rule, study.data, {settings.plan: study.plan(settings.plan).attack})
    record = report.attacks[settings.plan]
    return {
        "right": marks(report.correct),
        "robust": marks(report.correct & ~record.success),
        "fooled": marks(record.success, record.attacked),
        "prediction": record.prediction.tolist(),
        "gradients": record.gradients,
    }


def success_curve(settings: Run, seed: int, context: Context) -> Outcome:
    """Attack the first images at every value of a setting; return the marks of the images at each."""
    study: Study = context.loaded
    sweep = next(one for one in planned_sweeps(study) if one.name == settings.plan)
    named = {f"{sweep.over} {value:.12g}": attack for value, attack in sweep.attacks.items()}
    report = _evaluate(context, settings.rule, study.data.first(study.swept), named)
    return {sweep.name: [marks(report.attacks[name].success, report.attacks[name].attacked) for name in named]}


def _evaluate(context: Context, rule: str, data: Labelled, attacks: Mapping[str, Attack]) -> Report:
    study: Study = context.loaded
    with parse_rule(rule).attach(study.subject.network):
        report = evaluate(
            study.protocol.model(study.subject.model),
            AttackImages(data, study.protocol),
            attacks,
            batch_size=study.batch_size,
            resume=study.shards,
            tag=rule,
            targets=study.target,
            progress=lambda done, total: context.progress(done / max(total, 1)),
        )
    study.parts["computed"] += report.shards_computed
    study.parts["reused"] += report.shards_reused
    return report


def arm_name(rule: str, plan: Plan) -> str:
    """Return the name of the arm of a rule and a radius."""
    eps = f"eps {fraction_text(plan.eps)}"
    return f"{rule_name(rule)}, {eps}" if plan.uses_gradients else eps


def attack_experiment(study: Study) -> Experiment:
    """Return the experiment of a study: a group per attack, an arm per rule and radius, and the curves."""
    (source,) = study.sources
    arms = [
        Arm(
            name=arm_name(rule, plan),
            work=attack_images,
            group=plan.text,
            candidates={"": study.run(rule, plan, source)},
        )
        for plan in study.plans
        for rule in study.rules_of(plan)
    ]
    sweeps = planned_sweeps(study)
    arms += [
        Arm(
            name=rule_name(rule),
            work=success_curve,
            group=f"{sweep.attack}: success against {sweep.over}",
            candidates={"": replace(study.run(rule, sweep.plan, source, tuple(sweep.attacks)), plan=sweep.name)},
        )
        for sweep in sweeps
        for rule in study.rules
    ]
    others = [rule_name(rule) for rule in study.rules[1:]]
    with_rules = f", with the gradients of {listing([rule_name(study.rules[0]), *others])}" if others else ""
    design = Design(
        arms=tuple(arms),
        seeds=(study.options["seed"],),
        measurements=(ROBUST, FOOLED, _GRADIENTS),
        comparisons=tuple(_comparisons(study)),
        plots=tuple(_plots(study)),
        data=lambda: study.data.description,
    )
    return Experiment(
        name="attack",
        title=f"How easily is {study.subject.name} fooled?",
        question=f"The data: {study.data.description}. The images that the network has right are attacked by "
        f"{listing(list(study.attacks))}{with_rules}. The network itself, its weights and its answers are the same "
        "throughout; success is judged on the plain network.",
        source="",
        scales={f"protocol {study.protocol.name}": design},
        plots_note=_PLOTS_NOTE,
        claims_note=_CLAIMS_NOTE,
    )


def _comparisons(study: Study) -> Iterator[Comparison]:
    base = study.rules[0]
    pairs = [(plan, rule) for plan in study.plans for rule in study.rules_of(plan)[1:]]
    for number, (plan, rule) in enumerate(pairs, start=1):
        yield Comparison(
            id=f"{number}",
            statement=f"{rule_name(rule)} fools more images than {rule_name(base)}: {plan.text}, "
            f"eps {fraction_text(plan.eps)}",
            measurement=FOOLED,
            ours=arm_name(rule, plan),
            theirs=arm_name(base, plan),
            group=plan.text,
            reference=_TABLE if rule.startswith("linbp") and base == "bp" else "",
        )


def _plots(study: Study) -> Iterator[Plot]:
    for sweep in planned_sweeps(study):
        label, places = radius_axis(tuple(sweep.attacks)) if sweep.over == "eps" else ("steps", list(sweep.attacks))
        yield Plot(
            title=sweep.fixed,
            key=sweep.name,
            x=places,
            x_label=label,
            y_label="images fooled (%)",
            groups=(f"{sweep.attack}: success against {sweep.over}",),
            images=True,
            log_x=sweep.over == "steps",
        )
    label, places = radius_axis(sorted(study.radii))
    for text in study.attacks:
        plans = sorted((plan for plan in study.plans if plan.text == text), key=lambda plan: plan.eps)
        if len(plans) < 2 or len(study.rules) < 2 or not plans[0].uses_gradients:
            continue
        base = rule_name(study.rules[0])
        yield Plot(
            title=f"difference to {base}",
            x=places,
            x_label=label,
            y_label="difference (points)",
            groups=(text,),
            measurement=FOOLED,
            less=[arm_name(study.rules[0], plan) for plan in plans],
            lines={rule_name(r): [arm_name(r, plan) for plan in plans] for r in study.rules[1:]},
        )
