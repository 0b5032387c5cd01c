"""What LinBP was made for: images made against one network that fool another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from backpass.attacks import transfer
from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.experiments.linbp.networks import LARGE, LARGE_SEEDS, SMALL_CNN, SMALL_RESNET
from backpass.lab.experiments.linbp.success import OVER_NETWORKS, PAIRED_NETWORKS, explain_data, networks_table, slug
from backpass.lab.experiments.linbp.trials import Trial
from backpass.lab.experiments.linbp.victims import Training, Victim, data_text, victims
from backpass.lab.placements import parse_rule_for
from backpass.report.claims import Claim, judge
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval, paired_interval
from backpass.report.wording import interval_text

__all__ = ["EXPERIMENTS", "Transfer", "measure"]

_GUO = "Guo, Li, Chen, NeurIPS 2020"
_RENORMALISED = "renormalized"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Who makes images, and who judges them.

    Attributes:
        source: the network that is attacked, a ResNet.
        targets: networks that judge.
        start: LinBP's first linear site in the source.
        steps: of the attack, at which success is measured; the attack is run for each.
        trial: its other settings, in pixels.
        seeds: of the networks' training; a source is judged by targets of the next seed, the last by the first's.
    """

    source: Training
    targets: tuple[Training, ...]
    start: str
    steps: tuple[int, ...]
    trial: Trial
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    @property
    def rules(self) -> dict[str, str]:
        """By name, the gradients compared."""
        linear = f"linbp:start={self.start}"
        return {"BP": "bp", "LinBP": linear, "LinBP, renormalised": f"{linear},residual={_RENORMALISED}"}


Rates = Mapping[tuple[str, int], list[dict[str, float]]]
"""By the gradients' name and the steps, for each source the success in per cent by target; its own as ``source``."""


def measure(settings: Transfer, bench: Bench) -> Outcome:
    """Makes images against each source with all gradients, and shows them to the targets.

    Raises:
        BackpassError: there is one seed only.
    """
    if len(settings.seeds) < 2:
        raise BackpassError("transfer needs at least two seeds: a network's own images say nothing of others.")
    shifted = (*settings.seeds[1:], settings.seeds[0])
    judges = {training.model: list(victims(training, shifted, bench)) for training in settings.targets}
    told: dict[str, list[Victim]] = {}
    rates: dict[tuple[str, int], list[dict[str, float]]] = {}
    for place, source in enumerate(victims(settings.source, settings.seeds, bench)):
        told.setdefault(f"{settings.source.model}, source", []).append(source)
        targets = {name: group[place] for name, group in judges.items()}
        for name, rule in settings.rules.items():
            for steps in settings.steps:
                rates.setdefault((name, steps), []).append(
                    bench.pieces.value(
                        f"{rule}, {steps} steps, source seed {source.seed}",
                        partial(_transfer, settings, source, targets, rule, steps),
                        rule=rule,
                        steps=steps,
                        trial=asdict(settings.trial),
                        source=source.key,
                        targets=[target.key for target in targets.values()],
                    )
                )
    return Outcome(
        findings=[_finding(settings, rates), explain_data([settings.source, *settings.targets])],
        series=[_curves(settings, rates, target.model) for target in settings.targets],
        claims=[
            claim
            for target in settings.targets
            for name in list(settings.rules)[1:]
            for claim in [_claim(settings, rates, target.model, name)]
        ],
        tables=[_table(settings, rates), networks_table({**told, **judges})],
        data=data_text([settings.source, *settings.targets]),
        seeds=settings.seeds,
        plots_note=OVER_NETWORKS,
        claims_note=PAIRED_NETWORKS,
    )


def _transfer(
    settings: Transfer, source: Victim, targets: Mapping[str, Victim], rule: str, steps: int
) -> dict[str, float]:
    trial = replace(settings.trial, attack=f"{settings.trial.attack},steps={steps}")
    # Images that fool the source by a hair transfer worst: every one has all its steps.
    attack = replace(trial.make(source.test), early_stop=False)
    images = source.test.first(trial.images).images
    with parse_rule_for(settings.source.model, rule).attach(source.network):
        report = transfer(
            {"": source.network},
            {"source": source.network, **{name: target.network for name, target in targets.items()}},
            (images.x, images.y),
            attack,
        )
    return {name: 100 * rate.value for name, rate in report.rates[""].items()}


def _rate(rates: Rates, name: str, steps: int, target: str) -> list[float]:
    return [one[target] for one in rates[name, steps]]


def _claim(settings: Transfer, rates: Rates, target: str, name: str) -> Claim:
    steps = settings.steps[-1]
    return judge(
        slug(f"{target} {name}"),
        f"images made with {name} fool {target} more often than BP's, after {steps} steps",
        ours=_rate(rates, name, steps, target),
        theirs=_rate(rates, "BP", steps, target),
        direction="higher",
        quantity="images fooled, percentage points",
        reference=f"{_GUO}, Tables 1 and 2",
        published="higher" if "renormalised" in name else "",
        seeds=settings.seeds,
    )


def _finding(settings: Transfer, rates: Rates) -> Finding:
    steps = settings.steps[-1]
    parts = []
    for target in ("source", *(training.model for training in settings.targets)):
        plain = _rate(rates, "BP", steps, target)
        gains = [
            f"{name} {interval_text(paired_interval(_rate(rates, name, steps, target), plain), signed=True)}"
            for name in list(settings.rules)[1:]
        ]
        who = "the source itself" if target == "source" else target
        parts.append(f"{who}: BP {interval_text(mean_interval(plain))} %, {' and '.join(gains)} points")
    return Finding(
        "Black-box success",
        f"Guo et al. report that images made with LinBP against a ResNet-50 fool other networks more often; they scale "
        f"the branches' gradients to their norm under BP (renormalised), Li et al. do not. Here, against "
        f"{settings.source.model}, linear from {settings.start} on, after {steps} steps, images fooled of those that "
        f"the judge has right: {'; '.join(parts)}.",
    )


def _curves(settings: Transfer, rates: Rates, target: str) -> Series:
    return Series(
        id=slug(f"steps {target}"),
        title=f"Images that fool {target}",
        description=f"Made against {settings.source.model}; success against the attack's steps.",
        x_label="steps",
        y_label="images fooled, %",
        curves=[
            Curve(
                label=name,
                x=settings.steps,
                runs=list(
                    zip(*[_rate(rates, name, steps, target) for steps in settings.steps], strict=True),
                ),
            )
            for name in settings.rules
        ],
    )


def _table(settings: Transfer, rates: Rates) -> Table:
    judges = ("source", *(training.model for training in settings.targets))
    rows: list[list[Cell]] = [
        [name, steps, *(mean_interval(_rate(rates, name, steps, target)) for target in judges)]
        for name in settings.rules
        for steps in settings.steps
    ]
    return Table(
        id="transfer",
        title="Images fooled, in per cent",
        columns=["gradients", "steps", *judges],
        rows=rows,
        note="Of the images that the judge has right when clean; means over the pairs of networks, 95 % intervals.",
    )


def _of(source: Training, targets: Sequence[Training], start: str, images: int | None, precision: str) -> Transfer:
    return Transfer(
        source=source,
        targets=tuple(targets),
        start=start,
        steps=(10, 30),
        # Guo et al.: fresh noise of the radius' width at every iteration, steps of 1/255.
        trial=Trial(
            attack="ifgsm:step=1/255,noise=0.03", eps=0.03, protocol="standard", images=images, precision=precision
        ),
    )


EXPERIMENTS = (
    Experiment(
        name="linbp-transfer",
        title="Do images made with LinBP fool other networks more often?",
        question=(
            "The original use of LinBP: I-FGSM with steps of 1/255 and fresh uniform noise at every iteration, l_inf "
            "radius 0.03, pixels kept in [0, 1], against one network; its images are shown to networks that were "
            "trained apart. With plain gradients, with LinBP as it is, and with the branches renormalised."
        ),
        source=_GUO,
        scales={
            "small": _of(SMALL_RESNET, (SMALL_RESNET, SMALL_CNN), "layer2", 150, "float32"),
            "paper": replace(
                _of(LARGE[1], (LARGE[0], LARGE[3], LARGE[4]), "layer3.1", None, "bfloat16"),
                steps=(10, 50, 100, 300),
                seeds=LARGE_SEEDS,
            ),
        },
        measure=measure,
        data=("cifar10",),
    ),
)
