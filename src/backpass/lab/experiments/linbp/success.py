"""How many images an attack fools with plain gradients and with LinBP's, by network: the paper's tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from backpass.lab.bench.experiment import Bench, Outcome
from backpass.lab.experiments.linbp.published import published
from backpass.lab.experiments.linbp.trials import Outcomes, Trial, run_trial
from backpass.lab.experiments.linbp.victims import Training, Victim, data_text, victims
from backpass.numbers import fraction_text
from backpass.report.claims import Claim, agreement, judge
from backpass.report.proportions import paired_difference
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval, paired_interval
from backpass.report.wording import interval_text
from backpass.wording import listing

__all__ = ["PAPER", "Contest", "Success", "explain_data", "measure", "networks_table", "slug"]

PAPER = "Li et al., arXiv 2112.11018"
OVER_NETWORKS = (
    "Lines are means over networks that were trained with different seeds, bands their 95 % intervals. Rates are of "
    "those images that a network classifies correctly."
)
PAIRED_NETWORKS = (
    "A pair is one trained network, attacked with both gradients: the same images, random starts and steps. Intervals "
    "are Student's t over the networks, and each stands alone."
)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A network, and where LinBP is placed in it.

    Attributes:
        training: how the network is trained.
        placements: rules; the claims are about the first, the paper's placement or the one most like it.
        sweep: first linear sites, for a plot of success against the placement.
        counterpart: the paper's network, whose numbers stand beside ours.
    """

    training: Training
    placements: tuple[str, ...]
    sweep: tuple[str, ...] = ()
    counterpart: str


@dataclass(frozen=True, kw_only=True)
class Success:
    """What is attacked, and how.

    Attributes:
        contests: the networks.
        seeds: of their training.
        attacks: in their text forms.
        radii: in the protocols' units.
        protocols: of the attacks.
        images: test images, from the first; all where it is None.
        precision: of the search.
    """

    contests: tuple[Contest, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    attacks: tuple[str, ...]
    radii: tuple[float, ...] = (8 / 255, 16 / 255)
    protocols: tuple[str, ...] = ("paper", "standard")
    images: int | None = None
    precision: str = "float32"

    @property
    def trials(self) -> list[Trial]:
        """Every attack at every radius in every protocol."""
        return [
            Trial(attack=attack, eps=eps, protocol=protocol, images=self.images, precision=self.precision)
            for protocol, eps, attack in product(self.protocols, self.radii, self.attacks)
        ]


def slug(text: str) -> str:
    """Letters, digits and hyphens, for the id of a claim or a plot."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


Found = dict[tuple[str, Trial], list[Outcomes]]
"""By rule and trial, the outcomes by seed."""


def measure(settings: Success, bench: Bench, *, reference: str) -> Outcome:
    """Attacks every network with every rule; `reference` is the place in the paper."""
    found: dict[str, Found] = {}
    told: dict[str, list[Victim]] = {}
    for contest in settings.contests:
        by: Found = {}
        found[contest.training.model] = by
        told[contest.training.model] = []
        for victim in victims(contest.training, settings.seeds, bench):
            told[contest.training.model].append(victim)
            for trial in settings.trials:
                swept = contest.sweep if trial == settings.trials[0] else ()
                for rule in dict.fromkeys(["bp", *contest.placements, *map(_starting, swept)]):
                    by.setdefault((rule, trial), []).append(run_trial(bench, victim, rule, trial))
    claims = [claim for contest in settings.contests for claim in _claims(settings, contest, found, reference)]
    return Outcome(
        findings=[
            _finding(settings, found, claims, reference),
            *(_placements(settings, contest, found[contest.training.model]) for contest in settings.contests),
            explain_data([contest.training for contest in settings.contests]),
        ],
        series=[
            _sweep(settings, contest, found[contest.training.model]) for contest in settings.contests if contest.sweep
        ],
        claims=claims,
        tables=[
            _rates(settings, found),
            _printed(settings, reference),
            _pairs(settings, found),
            networks_table(told),
        ],
        data=data_text(contest.training for contest in settings.contests),
        seeds=settings.seeds,
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    )


def networks_table(told: dict[str, list[Victim]]) -> Table:
    """What the networks have learned."""
    rows: list[list[Cell]] = []
    for model, group in told.items():
        columns = [[v.loss for v in group], [v.accuracy for v in group], [v.test_accuracy for v in group]]
        rows.append([model, group[0].training.epochs, *map(mean_interval, columns)])
    return Table(
        id="networks",
        title="The networks",
        columns=["network", "epochs", "loss on what it learned", "accuracy on it, %", "accuracy on other images, %"],
        rows=rows,
        note="Means over the seeds, with 95 % intervals; on the first 1,000 images, without augmentation.",
    )


def explain_data(trainings: Sequence[Training]) -> Finding:
    """What the images are, and what must be known of them."""
    return Finding("The images", data_text(trainings))


def _starting(start: str) -> str:
    return f"linbp:start={start}"


def _rate(found: Found, rule: str, trial: Trial) -> list[float]:
    return [outcomes.rate for outcomes in found[rule, trial]]


def _claims(settings: Success, contest: Contest, found: dict[str, Found], reference: str) -> list[Claim]:
    model, rule = contest.training.model, contest.placements[0]
    made = []
    for trial in settings.trials:
        printed = published(trial.attack, trial.eps, contest.counterpart)
        made.append(
            judge(
                slug(f"{model} {trial.protocol} {round(255 * trial.eps)} {trial.attack}"),
                f"LinBP fools more images of {model} than BP: {trial}",
                ours=_rate(found[model], rule, trial),
                theirs=_rate(found[model], "bp", trial),
                direction="higher",
                quantity="images fooled, percentage points",
                reference=f"{PAPER}, {reference}",
                published=_printed_text(printed, contest.counterpart) if trial.protocol == "paper" and printed else "",
                seeds=settings.seeds,
            )
        )
    return made


def _printed_text(printed: tuple[float, float], network: str) -> str:
    bp, linbp = printed
    return f"{linbp - bp:+.2f} ({linbp:.2f} % against {bp:.2f} %, {network})".replace("-", "\N{MINUS SIGN}", linbp < bp)


def _finding(settings: Success, found: dict[str, Found], claims: Sequence[Claim], reference: str) -> Finding:
    """The paragraph that explains: the paper's numbers and ours, side by side, and how often each side is ahead."""
    sides = []
    trial = settings.trials[0]
    for contest in settings.contests:
        model, rule = contest.training.model, contest.placements[0]
        ours, theirs = _rate(found[model], rule, trial), _rate(found[model], "bp", trial)
        printed = published(trial.attack, trial.eps, contest.counterpart)
        if printed:
            sides.append(f"the paper prints {printed[1]:.2f} % and {printed[0]:.2f} % for {contest.counterpart}")
        sides.append(
            f"here, on {model}, LinBP ({rule}) fools {interval_text(mean_interval(ours))} % and BP "
            f"{interval_text(mean_interval(theirs))} %, a difference of "
            f"{interval_text(paired_interval(ours, theirs), signed=True)}"
        )
    counts = [sum(agreement(claim.verdict) is agrees for claim in claims) for agrees in (True, False, None)]
    return Finding(
        "The paper's numbers and ours",
        f"With {trial}, of the correctly classified images: {'; '.join(sides)}. Of all {len(claims)} comparisons "
        f"LinBP is ahead in {counts[0]} and behind in {counts[1]}; {counts[2]} are undecided. The question is the "
        f"paper's {reference}; the networks are those of the table below, not the paper's, unless they have its names.",
    )


def _placements(settings: Success, contest: Contest, found: Found) -> Finding:
    trial = settings.trials[0]
    rates = {rule: mean_interval(_rate(found, rule, trial)).mean for rule, of in found if of == trial}
    parts = [f"{rule} {rate:.1f} %" for rule, rate in rates.items()]
    best = max(rates, key=lambda rule: rates[rule])
    return Finding(
        f"Where LinBP is placed in {contest.training.model}",
        f"With {trial}: {listing(parts)}. The best of these is {best}, chosen on the very images that it is measured "
        "on, which flatters it.",
    )


def _rates(settings: Success, found: dict[str, Found]) -> Table:
    rows: list[list[Cell]] = []
    for contest, trial in product(settings.contests, settings.trials):
        model = contest.training.model
        for rule in ("bp", *contest.placements):
            rows.append(
                [
                    model,
                    trial.protocol,
                    fraction_text(trial.eps),
                    trial.attack,
                    rule,
                    mean_interval(_rate(found[model], rule, trial)),
                ]
            )
    return Table(
        id="success",
        title="Images fooled, in per cent",
        columns=["network", "protocol", "eps", "attack", "gradients", "fooled, %"],
        rows=rows,
        note=f"Means over {len(settings.seeds)} networks, with 95 % intervals; of the correctly classified images.",
    )


def _printed(settings: Success, reference: str) -> Table:
    rows: list[list[Cell]] = []
    for contest, eps, attack in product(settings.contests, settings.radii, settings.attacks):
        printed = published(attack, eps, contest.counterpart)
        if printed:
            rows.append([contest.counterpart, fraction_text(eps), attack, *printed, contest.training.model])
    return Table(
        id="published",
        title=f"The paper's numbers: {reference}",
        columns=["network", "eps", "attack", "BP, %", "LinBP, %", "stands beside our"],
        rows=rows,
        note="The paper counts the best of 5 restarts, on all correctly classified test images of CIFAR-10.",
    )


def _pairs(settings: Success, found: dict[str, Found]) -> Table:
    trial = settings.trials[0]
    rows: list[list[Cell]] = []
    for contest in settings.contests:
        model, rule = contest.training.model, contest.placements[0]
        for seed, ours, theirs in zip(
            settings.seeds, found[model][rule, trial], found[model]["bp", trial], strict=True
        ):
            if not bool(ours.right.any()):
                continue
            difference = paired_difference(ours.fooled[ours.right], theirs.fooled[ours.right])
            rows.append([model, seed, difference.only_ours, difference.only_theirs, difference.interval, difference.p])
    return Table(
        id="images",
        title="Image by image, network by network",
        columns=["network", "seed", "LinBP only", "BP only", "difference, percentage points", "McNemar's p"],
        rows=rows,
        note=f"{trial}. Intervals are of the difference of two paired proportions, over the images.",
    )


def _sweep(settings: Success, contest: Contest, found: Found) -> Series:
    trial = settings.trials[0]
    places = list(range(1, len(contest.sweep) + 1))
    plain = _rate(found, "bp", trial)
    rates = [_rate(found, _starting(start), trial) for start in contest.sweep]
    return Series(
        id=slug(f"placement {contest.training.model}"),
        title=f"Success against LinBP's start in {contest.training.model}",
        description=f"{trial}. Starts from left to right: {', '.join(contest.sweep)}; sites from there on are linear.",
        x_label="start, from the last site to the first",
        y_label="images fooled, %",
        curves=[
            Curve(label="BP", x=places, runs=[[rate] * len(places) for rate in plain]),
            Curve(label="LinBP", x=places, runs=[list(run) for run in zip(*rates, strict=True)]),
        ],
    )
