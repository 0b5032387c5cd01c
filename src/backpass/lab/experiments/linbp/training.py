"""Figures 5 to 8 and 10: networks trained from the same weights on the same batches by BP and by LinBP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.bench.images import load_parts
from backpass.lab.bench.training import Curves, curves
from backpass.lab.experiments.linbp.training_settings import CIFAR10, MNIST, Network, Training
from backpass.report.claims import Claim, judge
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval, paired_interval
from backpass.report.wording import interval_text
from backpass.wording import listing

__all__ = ["EXPERIMENTS", "Told", "measure"]

_PAPER = "Li et al., arXiv 2112.11018"
_RULES = {"bp": "BP", "linbp": "LinBP"}
_MEASURES = {
    "train loss": "training loss",
    "train accuracy": "training accuracy",
    "test loss": "test loss",
    "test accuracy": "test accuracy",
}

Found = dict[str, list[Curves]]
"""By ``bp`` and ``linbp``, the curves of every seed."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the paper says of a figure.

    Attributes:
        train: the figure of training.
        test: the figure of the test images.
        early: its words on the first epochs.
        end: its words on the end.
    """

    train: str
    test: str
    early: str
    end: str


def measure(settings: Training, bench: Bench, told: Told) -> Outcome:
    """Train every network by both rules with every seed, and compare them early and in the end."""
    parts = load_parts(settings.source)
    steps = len(parts.train) // settings.batch
    claims: list[Claim] = []
    series: list[Series] = []
    rows: list[list[Cell]] = []
    findings: list[Finding] = []
    for name, one in settings.networks.items():
        places = range(one.epochs * settings.per_epoch + 1)
        marks = tuple(round(place * steps / settings.per_epoch) for place in places)
        epochs = [place / settings.per_epoch for place in places]
        texts = {"bp": "bp", "linbp": one.rule}
        found = {
            rule: [
                curves(bench, settings.run(one, text, marks, seed), settings.source) for seed in range(settings.seeds)
            ]
            for rule, text in texts.items()
        }
        claims += _claims(name, epochs, found, told)
        series += [_series(name, what, epochs, found) for what in ("train loss", "test loss", "test accuracy")]
        rows += [
            [f"{name}, {label}", *(mean_interval(_at(found[rule], what, -1)) for what in _MEASURES)]
            for rule, label in _RULES.items()
        ]
        findings.append(_finding(name, one, epochs, found, told))
    return Outcome(
        findings=findings,
        series=series,
        claims=claims,
        tables=[
            Table(
                id="end",
                title="At the end of training",
                columns=["Network and gradients", *_MEASURES.values()],
                rows=rows,
                note=f"Means over {settings.seeds} seeds, with 95 % intervals; losses in nats, accuracies in per cent.",
            )
        ],
        data=parts.line,
        seeds=range(settings.seeds),
    )


def _claims(name: str, epochs: Sequence[float], found: Found, told: Told) -> list[Claim]:
    made = []
    for place, key, when in ((1, "early", _early(epochs)), (-1, "end", f"after {epochs[-1]:g} epochs")):
        for what, label in _MEASURES.items():
            lower = what.endswith("loss")
            made.append(
                judge(
                    f"{_slug(name)}-{key}-{_slug(what)}",
                    f"{name}: LinBP has the {'lower' if lower else 'higher'} {label} {when}",
                    ours=_at(found["linbp"], what, place),
                    theirs=_at(found["bp"], what, place),
                    direction="lower" if lower else "higher",
                    quantity=f"{label}, {'nats' if lower else 'percentage points'}",
                    reference=f"{_PAPER}, {told.test if what.startswith('test') else told.train}",
                    published=told.early if key == "early" else told.end,
                    seeds=range(len(found["bp"])),
                    diverged="worse",
                )
            )
    return made


def _series(name: str, what: str, epochs: Sequence[float], found: Found) -> Series:
    label = _MEASURES[what]
    return Series(
        id=_slug(f"{name} {what}"),
        title=f"{name}: {label}",
        description=f"The {label} of {name} against epochs, by BP and by LinBP.",
        x_label="epochs",
        y_label=label + (", nats" if what.endswith("loss") else ", %"),
        curves=[Curve(label=_RULES[rule], x=epochs, runs=[one[what] for one in runs]) for rule, runs in found.items()],
    )


def _finding(name: str, one: Network, epochs: Sequence[float], found: Found, told: Told) -> Finding:
    def both(what: str) -> str:
        ours, theirs = (interval_text(mean_interval(_at(found[rule], what, -1))) for rule in ("linbp", "bp"))
        return f"{ours} with LinBP and {theirs} with BP"

    def difference(place: int) -> str:
        ours, theirs = (_at(found[rule], "train loss", place) for rule in ("linbp", "bp"))
        lost = [f"{sum(map(math.isnan, runs))} of {len(runs)} with {_RULES[rule]}"
                for rule, runs in (("linbp", ours), ("bp", theirs))]  # fmt: skip
        if any(map(math.isnan, [*ours, *theirs])):
            return f"cannot be compared, for runs have diverged, {listing(lost)}"
        return f"differs from BP's by {interval_text(paired_interval(ours, theirs), signed=True)} nats"

    return Finding(
        name,
        f"At rate {one.rate:g}, {_early(epochs)} LinBP's training loss {difference(1)}; the paper says "
        f"{_quoted(told.early)}. After {epochs[-1]:g} epochs it {difference(-1)}; the paper says {_quoted(told.end)}. "
        f"The training loss is then {both('train loss')}, the test accuracy in per cent {both('test accuracy')}. The "
        "paper shows plots of one seed, and its released code plots the best test accuracy until then; here it is the "
        "accuracy of the network as it is.",
    )


def _quoted(words: str) -> str:
    return f"\N{LEFT DOUBLE QUOTATION MARK}{words}\N{RIGHT DOUBLE QUOTATION MARK}"


def _early(epochs: Sequence[float]) -> str:
    return "after the first epoch" if epochs[1] == 1 else f"after {epochs[1]:g} of the first epoch"


def _at(runs: Sequence[Curves], what: str, place: int) -> list[float]:
    return [one[what][place] for one in runs]


def _slug(text: str) -> str:
    return text.lower().replace(" ", "-")


_QUESTION = (
    "Networks learn by SGD from the same weights and on the same batches, once with BP and once with LinBP at the "
    "paper's placement. Between the steps, losses and accuracies are measured on training and on test images. "
)


def _experiment(
    name: str, title: str, question: str, source: str, scales: Mapping[str, Training], told: Told
) -> Experiment[Training]:
    return Experiment(
        name=name,
        title=title,
        question=_QUESTION + question,
        source=f"{_PAPER}, {source}",
        scales=scales,
        measure=partial(measure, told=told),
        data=(scales["small"].source.data,),
    )


_SMALL = (
    "Rate 0.005, momentum 0.9, weight decay 0.0005, batches of 128 and augmentation are those of the released code. "
    "The small scale has small networks, with LinBP in the last stage of a ResNet and at the last two sites of a CNN, "
    "and batches of 32."
)

EXPERIMENTS = (
    _experiment(
        "linbp-fig5",
        "Does LinBP train networks for MNIST faster?",
        "The paper's MLP at rate 0.001 and LeNet-5 at rate 0.005, batches of 64, PyTorch's own initial weights. With "
        "the test curves of Figure 6.",
        "Figures 5 and 6",
        MNIST,
        Told(
            train="Figure 5",
            test="Figure 6",
            early="lower prediction loss and higher accuracy, especially in the early epochs",
            end="lower prediction loss and higher accuracy",
        ),
    ),
    _experiment(
        "linbp-fig7",
        "Does LinBP train networks for CIFAR-10 faster?",
        "The rate follows a cosine. With the test curves of Figure 8. " + _SMALL,
        "Figures 7 and 8",
        CIFAR10["cosine"],
        Told(
            train="Figure 7",
            test="Figure 8",
            early="lower loss and higher accuracy, especially when the training just got started",
            end="just comparable to that of the standard BP",
        ),
    ),
    _experiment(
        "linbp-fig10",
        "Does it with an exponential schedule?",
        "The rate falls by a constant factor after every epoch. " + _SMALL,
        "Figure 10",
        CIFAR10["exponential"],
        Told(
            train="Figure 10",
            test="Figure 10",
            early="similar to the cosine schedule: better at the start",
            end="similar to the cosine schedule: just comparable",
        ),
    ),
)
