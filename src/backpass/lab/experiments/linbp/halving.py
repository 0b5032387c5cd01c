"""When Auto-PGD halves its step: earlier halvings mean that it stops making progress earlier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.experiments.linbp.networks import LARGE, LARGE_SEEDS, SMALL_RESNET
from backpass.lab.experiments.linbp.published import HALVINGS
from backpass.lab.experiments.linbp.success import OVER_NETWORKS, PAIRED_NETWORKS, PAPER, explain_data
from backpass.lab.experiments.linbp.trials import Trial, search_halvings
from backpass.lab.experiments.linbp.victims import Training, data_text, victims
from backpass.report.claims import Claim, judge
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval, paired_interval
from backpass.report.wording import interval_text
from backpass.wording import listing

__all__ = ["EXPERIMENTS", "Halving", "measure", "nth"]

_TIMES = ("first", "second", "third", "fourth")


@dataclass(frozen=True, kw_only=True)
class Halving:
    """What is attacked, and how.

    Attributes:
        training: of the network.
        rule: LinBP, in its text form.
        trial: Auto-PGD.
        seeds: of the training.
    """

    training: Training
    rule: str
    trial: Trial
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


Found = Mapping[str, Sequence[Sequence[Sequence[int]]]]
"""By rule, for each network and image, the iterations at which the step was halved."""


def measure(settings: Halving, bench: Bench) -> Outcome:
    """Runs Auto-PGD to its last step on every image, fooled or not, and notes the halvings."""
    found: dict[str, list[list[list[int]]]] = {"bp": [], "linbp": []}
    for victim in victims(settings.training, settings.seeds, bench):
        for name, rule in (("bp", "bp"), ("linbp", settings.rule)):
            found[name].append(
                bench.pieces.value(
                    f"{rule} against {victim.training.model}, seed {victim.seed}",
                    partial(search_halvings, victim, rule, settings.trial),
                    rule=rule,
                    trial=asdict(settings.trial),
                    victim=victim.key,
                )
            )
    claims = [_claim(settings, found, place) for place in range(len(_TIMES))]
    return Outcome(
        findings=[_finding(settings, found), explain_data([settings.training])],
        series=[_curves(found)],
        claims=claims,
        tables=[_table(found)],
        data=data_text([settings.training]),
        seeds=settings.seeds,
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    )


def nth(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], place: int) -> tuple[float, float, float]:
    """The mean iteration of a halving under both rules, over the images that have it under both; and their share.

    Args:
        ours: by image, the iterations at which the step was halved, in order.
        theirs: of the same images, under the other rule.
        place: 0 for the first halving.

    Returns:
        Two means (``nan`` where no image has it), and the share in per cent.
    """
    pairs = [(a[place], b[place]) for a, b in zip(ours, theirs, strict=True) if min(len(a), len(b)) > place]
    if not pairs:
        return float("nan"), float("nan"), 0.0
    return (
        sum(a for a, _ in pairs) / len(pairs),
        sum(b for _, b in pairs) / len(pairs),
        100 * len(pairs) / len(ours),
    )


def _columns(found: Found, place: int) -> tuple[list[float], list[float], list[float]]:
    """LinBP's means, BP's means and the shares, by network."""
    each = [nth(ours, theirs, place) for ours, theirs in zip(found["linbp"], found["bp"], strict=True)]
    return [one[0] for one in each], [one[1] for one in each], [one[2] for one in each]


def _claim(settings: Halving, found: Found, place: int) -> Claim:
    ours, theirs, _ = _columns(found, place)
    linbp, bp = HALVINGS["linbp"][place], HALVINGS["bp"][place]
    return judge(
        f"halving-{place + 1}",
        f"with LinBP Auto-PGD halves its step earlier the {_TIMES[place]} time",
        ours=ours,
        theirs=theirs,
        direction="lower",
        quantity="iterations",
        reference=f"{PAPER}, Section 4.2.1",
        published=f"\N{MINUS SIGN}{bp - linbp:.2f} ({linbp:g} against {bp:g}, ResNet-50)",
        seeds=settings.seeds,
    )


def _finding(settings: Halving, found: Found) -> Finding:
    parts = []
    for place, time in enumerate(_TIMES):
        ours, theirs, share = _columns(found, place)
        parts.append(
            f"the {time} time at {mean_interval(ours).mean:.2f} with LinBP and {mean_interval(theirs).mean:.2f} with "
            "BP, "
            f"{interval_text(paired_interval(ours, theirs), signed=True)} (the paper: {HALVINGS['linbp'][place]:g} and "
            f"{HALVINGS['bp'][place]:g}; {mean_interval(share).mean:.0f} % of our images have it under both)"
        )
    return Finding(
        "When the step is halved",
        f"Auto-PGD with {settings.trial} halves its step {listing(parts)}, on average over the images, fooled or not. "
        "It halves where too few of the last steps raised the loss: an early halving says that progress has stopped, "
        "at a maximum or before one: by itself it is no merit. Success is measured in linbp-table2.",
    )


def _curves(found: Found) -> Series:
    places = list(range(len(_TIMES)))
    runs = [_columns(found, place) for place in places]
    return Series(
        id="halvings",
        title="The iteration of each halving",
        description="Mean iteration of the first four halvings, over the images that have them under both rules.",
        x_label="halving",
        y_label="iteration",
        curves=[
            Curve(
                label=label,
                x=[place + 1 for place in places],
                runs=list(zip(*[run[side] for run in runs], strict=True)),
            )
            for side, label in ((1, "BP"), (0, "LinBP"))
        ],
    )


def _table(found: Found) -> Table:
    rows: list[list[Cell]] = []
    for place, time in enumerate(_TIMES):
        ours, theirs, share = _columns(found, place)
        rows.append(
            [
                time,
                mean_interval(theirs),
                mean_interval(ours),
                paired_interval(ours, theirs),
                HALVINGS["bp"][place],
                HALVINGS["linbp"][place],
                mean_interval(share),
            ]
        )
    return Table(
        id="halvings",
        title="Iterations of the halvings",
        columns=["halving", "BP", "LinBP", "difference", "BP, paper", "LinBP, paper", "images that have it, %"],
        rows=rows,
        note="The paper's are of ResNet-50. Means over the networks, with 95 % intervals.",
    )


_SMALL = Halving(
    training=SMALL_RESNET,
    rule="linbp:start=layer3",
    trial=Trial(attack="apgd:steps=100,restarts=1", eps=8 / 255, images=60),
)

EXPERIMENTS = (
    Experiment(
        name="linbp-halving",
        title="Does Auto-PGD halve its step earlier with LinBP?",
        question=(
            "Auto-PGD halves its step where it makes no progress. The paper counts the iterations until then and takes "
            "fewer as a sign of faster convergence. Every image has all 100 steps here, also when it is fooled before."
        ),
        source=f"{PAPER}, Section 4.2.1",
        scales={
            "small": _SMALL,
            "paper": replace(
                _SMALL,
                training=LARGE[1],
                seeds=LARGE_SEEDS,
                rule="linbp:start=paper",
                trial=replace(_SMALL.trial, images=None, precision="bfloat16"),
            ),
        },
        measure=measure,
        data=("cifar10",),
    ),
)
