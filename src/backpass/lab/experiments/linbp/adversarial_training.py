"""Figures 11 and 12 on a smaller network: LinBP in adversarial training, for the weights, for the examples, or both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from backpass.attacks import PGD, Attack, AutoAttack, evaluate
from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.training.assembly import assemble, complete
from backpass.lab.training.parts import load_parts
from backpass.lab.training.recipe import Recipe
from backpass.report.claims import Claim, judge
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval
from backpass.report.wording import interval_text
from backpass.rules import unwrap

__all__ = ["EXPERIMENTS", "Strategies", "measure_strategies"]

_PAPER = "Li et al., arXiv 2112.11018, Section 4.2.3"
STRATEGIES = {
    "BP": ("bp", "bp"),
    "1, LinBP for the weights": ("linbp:start=paper", "bp"),
    "2, LinBP for the examples": ("bp", "linbp:start=paper"),
    "both": ("linbp:start=paper", "linbp:start=paper"),
}
"""By name, the rules for the weights and for the examples, as the paper numbers them."""

_JUDGE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Strategies:
    """The settings.

    Attributes:
        data: the data set.
        model: the network; the paper's placement of LinBP in it must be known.
        limit: how many images are learned from; ``None``: all.
        eps: the l_inf radius of training, at which robustness is judged.
        far: a larger radius, reported too.
        steps: of PGD in training.
        step: its step.
        epochs: passes over the images.
        warmup: epochs until eps is reached.
        batch: images per step.
        rate: of Adam, falling to 0 linearly.
        judged: test images for AutoAttack, and images of each part for PGD.
        queries: of AutoAttack's Square, which has 5,000 in its standard version.
        seeds: of weights, order and examples.
    """

    data: str = "mnist"
    model: str = "lenet5"
    limit: int | None = None
    eps: float = 0.2
    far: float = 0.3
    steps: int = 5
    step: float = 0.08
    epochs: int = 6
    warmup: int = 1
    batch: int = 128
    rate: float = 0.003
    judged: int = 500
    queries: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)


Numbers = Mapping[str, list[float]]


def measure_strategies(settings: Strategies, strategy: str, seed: int, device: torch.device) -> dict[str, list[float]]:
    """One training run and what its network withstands, in per cent; ``nan`` where the run diverged.

    Args:
        settings: sizes.
        strategy: one of `STRATEGIES`.
        seed: of the run.
        device: where to compute.

    Returns:
        ``robust`` by epochs, under 20 steps of PGD on test images; and one number each for ``clean`` (all test images),
        ``train`` and ``test`` (20 steps of PGD), ``autoattack`` (at eps) and ``autoattack far``.
    """
    weights, examples = STRATEGIES[strategy]
    judge_text = f"pgd:eps={settings.eps!r},steps={_JUDGE_STEPS}"
    recipe = Recipe(
        data=settings.data,
        model=settings.model,
        normalize=False,
        limit=settings.limit,
        rule=(weights,),
        adversary=f"pgd:eps={settings.eps!r},steps={settings.steps},step={settings.step!r}",
        adversary_rule=examples,
        warmup=settings.warmup,
        optimizer="adam",
        lr=settings.rate,
        scheduler="linear",
        epochs=settings.epochs,
        batch_size=settings.batch,
        robust=judge_text,
        robust_images=settings.judged,
        seed=seed,
    )
    named, parts = complete(recipe), load_parts(settings.data, limit=settings.limit)
    trainer = assemble(named, parts, device=device, folder=None, report=None)
    result = trainer.fit()
    robust = [100 * record["robust"]["robust_accuracy"] for record in result.history]
    robust += [math.nan] * (settings.epochs - len(robust))
    if result.diverged is not None:
        return {"robust": robust, **{name: [math.nan] for name in _NUMBERS}}
    model = unwrap(trainer.model).eval()
    test, train = parts.test.images, parts.train.images
    some = (test.x[: settings.judged], test.y[: settings.judged])
    pgd = PGD(eps=settings.eps, step=2.5 * settings.eps / _JUDGE_STEPS, steps=_JUDGE_STEPS, restarts=1, seed=seed)
    auto = {
        name: AutoAttack(eps=eps, queries=settings.queries, seed=seed)
        for name, eps in (("autoattack", settings.eps), ("autoattack far", settings.far))
    }
    return {
        "robust": robust,
        "clean": [100 * result.history[-1]["evaluation"]["accuracy"]],
        "train": [_left(model, train.x[: settings.judged], train.y[: settings.judged], pgd)],
        "test": [_left(model, *some, pgd)],
        **{name: [_left(model, *some, attack)] for name, attack in auto.items()},
    }


_NUMBERS = ("clean", "train", "test", "autoattack", "autoattack far")


def _left(model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> float:
    """Accuracy under an attack, in per cent."""
    return 100 * evaluate(model, (x, y), attack).robust_accuracy


def _measure(settings: Strategies, bench: Bench) -> Outcome:
    found = {
        name: [
            bench.pieces.value(
                f"{name}, seed {seed}",
                partial(measure_strategies, settings, name, seed, bench.device),
                strategy=name,
                seed=seed,
                **{key: value for key, value in vars(settings).items() if key != "seeds"},
                device=bench.device.type,
            )
            for seed in settings.seeds
        ]
        for name in STRATEGIES
    }
    return Outcome(
        findings=_findings(settings, found),
        series=[
            Series(
                id="robust",
                title="Robust accuracy while training",
                description=f"Test images, {_JUDGE_STEPS} steps of PGD with plain gradients at eps {settings.eps:g}.",
                x_label="epochs",
                y_label="robust accuracy, %",
                curves=[
                    Curve(label=name, x=range(1, settings.epochs + 1), runs=[run["robust"] for run in runs])
                    for name, runs in found.items()
                ],
            )
        ],
        claims=_claims(settings, found),
        tables=[_table(settings, found)],
        data=f"{settings.data}, {settings.limit or 'all'} images to learn from, {settings.judged} judged under attack",
        seeds=settings.seeds,
        settings={"placement of LinBP": "the paper's, for this network"},
    )


def _table(settings: Strategies, found: Mapping[str, Sequence[Numbers]]) -> Table:
    rows: list[list[Cell]] = [
        [name, *(mean_interval(_of(runs, number)) for number in _NUMBERS)] for name, runs in found.items()
    ]
    titles = ["clean", f"PGD-{_JUDGE_STEPS}, training images", f"PGD-{_JUDGE_STEPS}", "AutoAttack"]
    return Table(
        id="strategies",
        title="Accuracy by strategy, %",
        columns=["Strategy", *titles, f"AutoAttack, eps {settings.far:g}"],
        rows=rows,
        note=f"Under attack at eps {settings.eps:g} unless another is named, on {settings.judged} images; over "
        f"{len(settings.seeds)} seeds, with 95 % intervals.",
    )


def _claims(settings: Strategies, found: Mapping[str, Sequence[Numbers]]) -> list[Claim]:
    plain, first, second, both = (found[name] for name in STRATEGIES)
    pgd = f"accuracy under {_JUDGE_STEPS} steps of PGD at eps {settings.eps:g}, points"

    def gap(runs: Sequence[Numbers]) -> list[float]:
        return [a - b for a, b in zip(_of(runs, "train"), _of(runs, "test"), strict=True)]

    compared = partial(judge, seeds=settings.seeds, published="in a plot")
    return [
        compared(
            "first-over-second",
            "LinBP for the weights gives a more robust network than LinBP for the examples",
            ours=_of(first, "test"),
            theirs=_of(second, "test"),
            direction="higher",
            quantity=pgd,
            reference=f"{_PAPER}: the first strategy is more beneficial than the second",
        ),
        compared(
            "second-overfits",
            "LinBP for the examples leads to a larger gap between training and test images than BP",
            ours=gap(second),
            theirs=gap(plain),
            direction="higher",
            quantity=f"training minus test {pgd}",
            reference=f"{_PAPER}: obviously larger generalization gap",
        ),
        compared(
            "second-worse",
            "and to a less robust network than BP",
            ours=_of(second, "test"),
            theirs=_of(plain, "test"),
            direction="lower",
            quantity=pgd,
            reference=f"{_PAPER}: degraded test robustness",
        ),
        compared(
            "first-over-plain",
            "LinBP for the weights gives a more robust network than BP",
            ours=_of(first, "test"),
            theirs=_of(plain, "test"),
            direction="higher",
            quantity=pgd,
            reference=f"{_PAPER}, Figure 11",
        ),
        compared(
            "both-over-plain",
            "LinBP for both gives a more robust network than BP, under AutoAttack",
            ours=_of(both, "autoattack"),
            theirs=_of(plain, "autoattack"),
            direction="higher",
            quantity=f"accuracy under AutoAttack at eps {settings.eps:g}, points",
            reference=f"{_PAPER}, Figure 12",
        ),
    ]


def _findings(settings: Strategies, found: Mapping[str, Sequence[Numbers]]) -> list[Finding]:
    words = [f"{name}: {interval_text(mean_interval(_of(runs, 'autoattack')))}" for name, runs in found.items()]
    return [
        Finding(
            "What is left under AutoAttack",
            f"Of {settings.judged} test images at eps {settings.eps:g}, in per cent. {'; '.join(words)}.",
        ),
        Finding(
            "What this cannot say",
            f"The paper trains MobileNetV2 and ResNet-50 on CIFAR-10; this is {settings.model} on {settings.data}, "
            "with one rate for all strategies.",
        ),
    ]


def _of(runs: Sequence[Numbers], number: str) -> list[float]:
    return [run[number][0] for run in runs]


EXPERIMENTS = (
    Experiment(
        name="linbp-fig11",
        title="Does LinBP help adversarial training?",
        question=(
            "The same network is trained against the same PGD adversary, with LinBP for the gradients of the weights "
            "(strategy 1), for those of the examples (2), for both, or not at all. Every strategy sees the same "
            "initial weights, order and random starts. Robustness is judged with plain gradients, and by AutoAttack."
        ),
        source=f"{_PAPER}, Figures 11 and 12",
        scales={
            "small": Strategies(limit=15_000, epochs=5, judged=150, queries=300),
            "paper": Strategies(seeds=(0, 1, 2, 3, 4), epochs=20, judged=2000, queries=5000),
        },
        measure=_measure,
        data=("mnist",),
    ),
)
