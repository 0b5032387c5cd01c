"""Tables I and II and the networks with SiLU: does LinBP fool more images in a white-box attack?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from backpass.lab.bench.experiment import Experiment
from backpass.lab.experiments.linbp.networks import LARGE, LARGE_SEEDS, SMALL_CNN, SMALL_RESNET, large
from backpass.lab.experiments.linbp.success import PAPER, Contest, Success, measure

__all__ = ["EXPERIMENTS"]

_LAST = "linbp:start=-1"
_SMALL = (
    Contest(
        training=SMALL_CNN,
        placements=(_LAST, "linbp:start=-2"),
        sweep=("-1", "-2", "-3", "-4"),
        counterpart="vgg16",
    ),
    Contest(
        training=SMALL_RESNET,
        placements=("linbp:start=layer3", _LAST),
        sweep=("-1", "-2", "-4", "-6"),
        counterpart="resnet50",
    ),
)
_PAPERS = tuple(
    Contest(
        training=training,
        placements=("linbp:start=paper", _LAST),
        sweep=("-1", "-3", "0.9", "0.8", "0.7", "0.5", "0.25"),
        counterpart=training.model,
    )
    for training in LARGE
)
_PAPER_SIZE = Success(contests=_PAPERS, seeds=LARGE_SEEDS, attacks=(), precision="bfloat16")
_FEW = 200  # images


def _silu(contest: Contest, model: str, counterpart: str) -> Contest:
    return replace(contest, training=replace(contest.training, model=model), sweep=(), counterpart=counterpart)


_SETTING = (
    " Both gradients see the same networks, images, starts and steps. The paper's protocol moves in normalised space, "
    "where a radius of 8/255 is about 3.2/255 in pixels and a step 0.4/255, so that 10 steps barely reach the ball's "
    "face; the standard protocol moves pixels."
)

EXPERIMENTS = (
    Experiment(
        name="linbp-table1",
        title="Does PGD fool more images with LinBP?",
        question="PGD with 10, 20 and 100 steps against networks for CIFAR-10." + _SETTING,
        source=f"{PAPER}, Table I",
        scales={
            "small": Success(
                contests=_SMALL,
                attacks=("pgd:steps=10,restarts=1", "pgd:steps=20,restarts=1", "pgd:steps=100,restarts=1"),
                images=_FEW,
            ),
            "paper": replace(
                _PAPER_SIZE,
                attacks=("pgd:steps=10,restarts=5", "pgd:steps=20,restarts=5", "pgd:steps=100,restarts=5"),
            ),
        },
        measure=partial(measure, reference="Table I"),
        data=("cifar10",),
    ),
    Experiment(
        name="linbp-table2",
        title="Does Auto-PGD?",
        question="Auto-PGD, which chooses its steps itself, with 100 steps." + _SETTING,
        source=f"{PAPER}, Table II",
        scales={
            "small": Success(
                contests=tuple(replace(contest, placements=contest.placements[:1], sweep=()) for contest in _SMALL),
                attacks=("apgd:steps=100,restarts=1",),
                images=_FEW,
            ),
            "paper": replace(
                _PAPER_SIZE,
                contests=tuple(replace(contest, sweep=()) for contest in _PAPERS),
                attacks=("apgd:steps=100,restarts=5",),
            ),
        },
        measure=partial(measure, reference="Table II"),
        data=("cifar10",),
    ),
    Experiment(
        name="linbp-silu",
        title="Does LinBP help where the activation is smooth?",
        question=(
            "A ResNet with SiLU in the place of ReLU; LinBP's derivative is 1 there too. The paper has two pairs of "
            "rates; that they belong to 10 steps and the two radii of Table I is our reading." + _SETTING
        ),
        source=f"{PAPER}, Section 4.2.1",
        scales={
            "small": Success(
                contests=(_silu(_SMALL[1], f"{SMALL_RESNET.model},activation=silu", "resnet50:activation=silu"),),
                attacks=("pgd:steps=10,restarts=1",),
                images=_FEW,
            ),
            "paper": replace(
                _PAPER_SIZE,
                contests=(
                    Contest(
                        training=large("resnet50:activation=silu"),
                        placements=("linbp:start=paper",),
                        counterpart="resnet50:activation=silu",
                    ),
                ),
                attacks=("pgd:steps=10,restarts=5", "pgd:steps=100,restarts=5"),
            ),
        },
        measure=partial(measure, reference="Section 4.2.1, two settings"),
        data=("cifar10",),
    ),
)
