"""Li et al., arXiv 2112.11018, figures 11 and 12: LinBP in adversarial training, on a smaller network."""

from __future__ import annotations

from dataclasses import replace

from backpass.experiments.adversarial_training import JUDGE_STEPS, Adversarial, train_adversarially
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot, Runs
from backpass.report.result import Finding

__all__ = ["EXPERIMENTS", "strategies"]

_PAPER = "Li et al., arXiv 2112.11018, Section 4.2.3"
_LINBP = "linbp:start=paper"
_PLAIN, _FIRST, _SECOND, _BOTH = "BP", "1, LinBP for the weights", "2, LinBP for the examples", "both"
_RULES = {_PLAIN: ("bp", "bp"), _FIRST: (_LINBP, "bp"), _SECOND: ("bp", _LINBP), _BOTH: (_LINBP, _LINBP)}


def _gap(runs: Runs) -> list[float]:
    return [one["train"] - one["test"] for one in runs.runs]


def strategies(settings: Adversarial, seeds: int) -> Design:
    """Return the table of LinBP for the weights, the examples, both or neither."""
    points, pgd = "percentage points", f"accuracy under {JUDGE_STEPS} steps of PGD at eps {settings.eps:g}"
    clean = Measurement(label="clean accuracy", unit=points, key="clean")
    test = Measurement(label=pgd, unit=points, key="test")
    train = Measurement(label=f"{pgd}, training images", unit=points, key="train")
    auto, far = (
        Measurement(label=f"accuracy under AutoAttack at eps {eps:g}", unit=points, key=key)
        for key, eps in (("autoattack", settings.eps), ("autoattack far", settings.far))
    )
    gap = Measurement(label=f"training minus test {pgd}", unit=points, derive=_gap)
    return Design(
        arms=tuple(
            Arm(name=name, work=train_adversarially,
                candidates={"": replace(settings, weights=weights, examples=examples)})
            for name, (weights, examples) in _RULES.items()
        ),
        seeds=tuple(range(seeds)),
        measurements=(clean, train, test, auto, far),
        comparisons=tuple(
            Comparison(
                id=key, statement=statement, measurement=measurement, ours=ours, theirs=theirs,
                direction="lower" if key == "second-worse" else "higher", reference=f"{_PAPER}{where}",
                published="in a plot",
            )
            for key, statement, measurement, ours, theirs, where in (
                ("first-over-second", "LinBP for the weights gives a more robust network than LinBP for the examples",
                 test, _FIRST, _SECOND, ": the first strategy is more beneficial than the second"),
                ("second-overfits",
                 "LinBP for the examples leads to a larger gap between training and test images than BP",
                 gap, _SECOND, _PLAIN, ": obviously larger generalization gap"),
                ("second-worse", "and to a less robust network than BP",
                 test, _SECOND, _PLAIN, ": degraded test robustness"),
                ("first-over-plain", "LinBP for the weights gives a more robust network than BP",
                 test, _FIRST, _PLAIN, ", Figure 11"),
                ("both-over-plain", "LinBP for both gives a more robust network than BP, under AutoAttack",
                 auto, _BOTH, _PLAIN, ", Figure 12"),
            )
        ),
        plots=(
            Plot(title=f"robust accuracy of test images under {JUDGE_STEPS} steps of PGD at eps {settings.eps:g}",
                 key="robust", x=range(1, settings.epochs + 1), x_label="epochs", y_label="robust accuracy, %"),
        ),
        data=lambda: f"{settings.data}, {settings.limit or 'all'} images to learn from, {settings.judged} judged "
        "under attack",
    )  # fmt: skip


EXPERIMENTS = (
    Experiment(
        name="linbp-fig11",
        title="Does LinBP help adversarial training?",
        question="LeNet-5 is trained on MNIST against the same PGD adversary, with LinBP at the paper's placement for "
        "the gradients of the weights (strategy 1), for those of the examples (2), for both, or not at all. Every "
        "strategy has the same initial weights, order, random starts and rate. Robustness is measured with plain "
        "gradients, and by AutoAttack.",
        source=f"{_PAPER}, Figures 11 and 12",
        scales={
            "small": strategies(Adversarial(limit=15_000, epochs=5, judged=150, queries=300), 3),
            "paper": strategies(Adversarial(epochs=20, judged=2000, queries=5000), 5),
        },
        data=("mnist",),
        remarks=(Finding("The paper's networks", "The paper trains MobileNetV2 and ResNet-50 on CIFAR-10."),),
    ),
)
