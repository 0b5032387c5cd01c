"""When does LinBP make the stronger white-box attack? One thing at a time is changed, in training and in the attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import correlation

from backpass.lab.bench.experiment import Bench, Outcome
from backpass.lab.experiments.linbp.gradients import compare_gradients
from backpass.lab.experiments.linbp.success import (
    OVER_NETWORKS,
    PAIRED_NETWORKS,
    PAPER,
    explain_data,
    slug,
)
from backpass.lab.experiments.linbp.trials import Trial, run_trial
from backpass.lab.experiments.linbp.victims import Training, data_text, victims
from backpass.report.claims import Claim, agreement, judge
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import Interval, mean_interval, paired_interval
from backpass.report.wording import interval_text
from backpass.wording import listing

__all__ = ["Condition", "WhiteBox", "measure"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One comparison of LinBP with plain gradients.

    Attributes:
        factor: what is changed, for instance ``depth``.
        value: to what.
        training: of the network.
        rule: LinBP, in its text form.
        trial: the attack.
    """

    factor: str
    value: str
    training: Training
    rule: str
    trial: Trial


@dataclass(frozen=True, kw_only=True)
class WhiteBox:
    """The comparisons.

    Attributes:
        conditions: the first is the one from which the others differ.
        seeds: of the networks' training.
        lengths: of single steps whose gain is measured on the networks, in pixels of [0, 1].
    """

    conditions: tuple[Condition, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lengths: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    condition: Condition
    ours: list[float]
    theirs: list[float]
    gradients: list[dict[str, float]]

    @property
    def difference(self) -> Interval:
        return paired_interval(self.ours, self.theirs)

    @property
    def name(self) -> str:
        return f"{self.condition.factor}: {self.condition.value}"


def measure(settings: WhiteBox, bench: Bench) -> Outcome:
    """Attacks all networks with both gradients, and compares the gradients themselves."""
    found = [_Measured(condition=condition, ours=[], theirs=[], gradients=[]) for condition in settings.conditions]
    for training in dict.fromkeys(condition.training for condition in settings.conditions):
        for victim in victims(training, settings.seeds, bench):
            for one in found:
                if one.condition.training != training:
                    continue
                rule, trial = one.condition.rule, one.condition.trial
                one.ours.append(run_trial(bench, victim, rule, trial).rate)
                one.theirs.append(run_trial(bench, victim, "bp", trial).rate)
                looked_at = rule if "auto" not in rule else found[0].condition.rule
                one.gradients.append(
                    bench.pieces.value(
                        f"gradients of {training.model}, seed {victim.seed}, {looked_at}",
                        partial(compare_gradients, victim, looked_at, images=trial.images, lengths=settings.lengths),
                        rule=looked_at,
                        images=trial.images,
                        lengths=settings.lengths,
                        victim=victim.key,
                    )
                )
    claims = [_claim(settings, one) for one in found]
    return Outcome(
        findings=[
            _finding(found, claims),
            *_by_factor(found),
            _one_step(settings, found),
            _agreement(found),
            explain_data([condition.training for condition in settings.conditions]),
        ],
        series=[_rise(settings, one) for one in _networks(found)],
        claims=claims,
        tables=[_table(found, claims), _gradients_table(found)],
        data=data_text(condition.training for condition in settings.conditions),
        seeds=settings.seeds,
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
        settings={"conditions": [f"{one.factor}: {one.value}" for one in settings.conditions]},
    )


def _claim(settings: WhiteBox, one: _Measured) -> Claim:
    condition = one.condition
    return judge(
        slug(one.name),
        f"LinBP fools more images than BP ({one.name}; {condition.rule} in {condition.training.model})",
        ours=one.ours,
        theirs=one.theirs,
        direction="higher",
        quantity="images fooled, percentage points",
        reference=f"{PAPER}, Section 4.2.1",
        published="higher, in 29 of the 30 cells of Table I",
        seeds=settings.seeds,
    )


def _finding(found: Sequence[_Measured], claims: Sequence[Claim]) -> Finding:
    groups = {
        agrees: [one.name for one, claim in zip(found, claims, strict=True) if agreement(claim.verdict) is agrees]
        for agrees in (True, False, None)
    }
    base = found[0]
    best = max(found, key=lambda one: one.difference.mean)
    return Finding(
        "When LinBP is stronger, and when not",
        f"In the paper LinBP is ahead in 29 of 30 cells of Table I, by up to 23 percentage points. Here, on "
        f"{base.condition.training.model}, LinBP ({base.condition.rule}) fools "
        f"{interval_text(mean_interval(base.ours))} % and BP {interval_text(mean_interval(base.theirs))} %: "
        f"{interval_text(base.difference, signed=True)} points. Of {len(found)} conditions LinBP is ahead in "
        f"{len(groups[True])}{_named(groups[True])}, behind in {len(groups[False])}"
        f"{_named(groups[False])}, and {len(groups[None])} are undecided. The most favourable is "
        f"{best.name}, with {interval_text(best.difference, signed=True)}.",
    )


def _named(names: Sequence[str]) -> str:
    return f" ({'; '.join(names)})" if names else ""


def _by_factor(found: Sequence[_Measured]) -> list[Finding]:
    """One sentence per factor, the base among its values."""
    base = found[0]
    made = []
    for factor in dict.fromkeys(one.condition.factor for one in found[1:]):
        parts = [
            f"{one.condition.value}: {interval_text(one.difference, signed=True)}, BP "
            f"{mean_interval(one.theirs).mean:.1f} %"
            for one in found[1:]
            if one.condition.factor == factor
        ]
        made.append(
            Finding(
                factor.capitalize(),
                f"LinBP less BP in percentage points, beside BP's rate: {'; '.join(parts)}. At the base "
                f"({base.condition.value}) it is {interval_text(base.difference, signed=True)}, BP "
                f"{mean_interval(base.theirs).mean:.1f} %.",
            )
        )
    return made


def _networks(found: Sequence[_Measured]) -> list[_Measured]:
    """The first condition of every network: what depends on the network alone is shown once."""
    first: dict[tuple[Training, str], _Measured] = {}
    for one in found:
        if "auto" not in one.condition.rule:
            first.setdefault((one.condition.training, one.condition.rule), one)
    return [one for one in first.values() if all(one.gradients)]


def _one_step(settings: WhiteBox, found: Sequence[_Measured]) -> Finding:
    small, large = settings.lengths[0], settings.lengths[-1]
    parts = []
    for length in (small, large):
        ahead = [
            one.name
            for one in _networks(found)
            if paired_interval(
                [g[f"linbp {length:g}"] for g in one.gradients], [g[f"bp {length:g}"] for g in one.gradients]
            ).low
            > 0
        ]
        parts.append(f"of {length:g} it is LinBP in {len(ahead)} of {len(_networks(found))} networks{_named(ahead)}")
    return Finding(
        "One step",
        "For steps that are short enough the gradient of the network itself raises the loss most; only a longer step, "
        f"which wakes sleeping units, can reward another direction. Which gradient's signed step raises it more: "
        f"{listing(parts)}.",
    )


def _agreement(found: Sequence[_Measured]) -> Finding:
    """Return whether LinBP does the worse the less the directions agree, over all networks and placements."""
    points = [
        (numbers["cosine"], ours - theirs)
        for one in _networks(found)
        for numbers, ours, theirs in zip(one.gradients, one.ours, one.theirs, strict=True)
    ]
    cosines, differences = zip(*points, strict=True)
    varied = len(set(cosines)) > 1 and len(set(differences)) > 1
    r = f"{correlation(cosines, differences):.2f}" if varied else "not defined"
    return Finding(
        "How much the directions agree",
        f"Over {len(points)} networks and placements the correlation between the cosine of the two gradients and "
        f"LinBP's difference to BP is {r}. Positive: LinBP costs success in the measure in which it leaves the "
        f"gradient. The cosines run from {min(cosines):.2f} to {max(cosines):.2f}, the differences from "
        f"{min(differences):+.1f} to {max(differences):+.1f} points. Attacks differ between some networks.",
    )


def _rise(settings: WhiteBox, one: _Measured) -> Series:
    return Series(
        id=slug(f"rise {one.name}"),
        title=f"One signed step: {one.name}",
        description=f"How much the mean loss of {one.condition.training.model} rises after one step from the image.",
        x_label="length of the step",
        y_label="rise of the loss",
        curves=[
            Curve(
                label=label,
                x=settings.lengths,
                runs=[[numbers[f"{rule} {length:g}"] for length in settings.lengths] for numbers in one.gradients],
            )
            for rule, label in (("bp", "BP"), ("linbp", "LinBP"))
        ],
        log_x=True,
    )


def _table(found: Sequence[_Measured], claims: Sequence[Claim]) -> Table:
    rows: list[list[Cell]] = [
        [
            one.name,
            one.condition.training.model,
            one.condition.rule,
            str(one.condition.trial),
            mean_interval(one.theirs),
            mean_interval(one.ours),
            one.difference,
            claim.verdict,
        ]
        for one, claim in zip(found, claims, strict=True)
    ]
    return Table(
        id="conditions",
        title="All conditions",
        columns=["condition", "network", "LinBP", "attack", "BP, %", "LinBP, %", "difference", "LinBP is stronger"],
        rows=rows,
        note="Of the correctly classified images; means over the networks, with 95 % intervals.",
    )


def _gradients_table(found: Sequence[_Measured]) -> Table:
    names = ("loss", "asleep", "blind", "agreement", "cosine")
    rows: list[list[Cell]] = [
        [
            one.name,
            one.condition.rule,
            *(mean_interval([numbers[name] for numbers in one.gradients]) for name in names),
            one.difference,
        ]
        for one in _networks(found)
    ]
    return Table(
        id="gradients",
        title="The two gradients at clean images",
        columns=[
            "condition",
            "LinBP",
            "loss",
            "asleep, %",
            "BP blind, %",
            "equal signs, %",
            "cosine",
            "difference, points",
        ],
        rows=rows,
        note="Asleep: negative inputs of the linear sites. Blind: images at which BP's gradient is zero.",
    )
