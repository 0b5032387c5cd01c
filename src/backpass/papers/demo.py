"""Demo: the methods of four papers on scikit-learn's digits, as one experiment with a group per paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backpass.data import load_digits
from backpass.experiments.digit_sde import DigitSDE, relative_difference, run_digits
from backpass.experiments.digit_transfer import DigitTransfer, attack_digits
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot
from backpass.experiments.images import Source
from backpass.experiments.training import Training, at, at_equal_time, training_arm
from backpass.experiments.training_runs import Run
from backpass.report.result import Finding

__all__ = ["DEMO"]

_TRANSFER = "Attacks that transfer"
_IMPLICIT = "Implicit steps"
_INITIAL = "Bad initial weights"
_SDE = "The SDE of adversarial training"
_RULES = {
    "plain gradients": ("bp", ""),
    "LinBP": ("linbp:start=layer2,residual=renormalized", "Guo, Li, Chen, NeurIPS 2020; Li et al., arXiv 2112.11018"),
    "SGM": ("sgm:decay=0.5", "Wu et al., ICLR 2020"),
    "BPA": ("bpa", "Wang, Tong, He, NeurIPS 2023"),
}
_PROCESSES = {"plain training": "plain", "adversarial training": "adversarial", "its SDE": "sde"}
_LEARNED, _HELD_OUT = 1147, 200
_DIGITS = Source(data="digits", held_out=_HELD_OUT)
_GRADIENT = Measurement(label="squared input gradient", key="gradient", at=-1)
_UNDER_ATTACK = Measurement(label="loss under attack", unit="nats", key="loss", at=-1)
_TOLERANCE = 10


def _scale(
    seeds: int,
    transfer: DigitTransfer,
    implicit: Training,
    initial: Training,
    rates: Sequence[Sequence[float]],
    sde: DigitSDE,
) -> Design:
    """Return the four groups: transfer, implicit steps, initial weights and the SDE.

    Args:
        seeds: number of seeds.
        transfer: settings of the attacks that transfer.
        implicit: training by AdamW, plain and with ProxProp.
        initial: training from small weights, by SIBP and by SGD.
        rates: candidate learning rates of AdamW and of SGD.
        sde: settings of adversarial training and its SDE.
    """
    eps = transfer.eps[-1]
    fooled = Measurement(label=f"images fooled at eps {eps:g}", unit="percentage points", key="fooled", at=-1)
    adamw, sgd = rates
    steps = initial.run.marks[-1]
    return Design(
        arms=(
            *(Arm(name=name, work=attack_digits, candidates={"": replace(transfer, rule=rule)}, group=_TRANSFER)
              for name, (rule, _) in _RULES.items()),
            training_arm("AdamW", implicit, adamw, optimizer="adamw", group=_IMPLICIT),
            training_arm("ProxProp + AdamW", implicit, adamw, rule="proxprop", optimizer="adamw", group=_IMPLICIT),
            training_arm("SGD", initial, sgd, optimizer="sgd", group=_INITIAL),
            training_arm("SIBP", initial, (1.0,), rule="sibp", optimizer="sgd", group=_INITIAL),
            *(Arm(name=name, work=run_digits, candidates={"": replace(sde, process=process)}, group=_SDE)
              for name, process in _PROCESSES.items()),
        ),
        seeds=tuple(range(seeds)),
        measurements=(fooled, at("train loss"), at("test accuracy"), at("seconds"), _GRADIENT, _UNDER_ATTACK),
        comparisons=(
            *(Comparison(id=f"transfer-{name.lower()}", ours=name, theirs="plain gradients", group=_TRANSFER,
                         statement=f"images made with {name} fool the other network more often than those of plain "
                         "gradients", measurement=fooled, reference=reference)
              for name, (_, reference) in _RULES.items() if reference),
            Comparison(id="implicit-steps", ours="ProxProp + AdamW", theirs="AdamW", group=_IMPLICIT,
                       statement="after the same time, implicit steps have the lower training loss",
                       measurement=at_equal_time("train loss"), direction="lower", diverged="worse",
                       reference="Frerix et al., ICLR 2018, Section 4"),
            Comparison(id="initial-weights", ours="SIBP", theirs="SGD", group=_INITIAL,
                       statement=f"from weights of N(0, {initial.run.std:g}^2), SIBP's test accuracy is higher after "
                       f"{steps} steps", measurement=at("test accuracy"), diverged="worse",
                       reference="Liu and Zhang, arXiv 2002.03516, abstract"),
            *(Comparison(id=f"prediction-{key}", ours="its SDE", theirs="adversarial training", group=_SDE,
                         statement=f"the SDE predicts the {label} of adversarial training within {_TOLERANCE} %",
                         measurement=relative_difference(key, label), low=-_TOLERANCE, high=_TOLERANCE,
                         reference="setting of Gu and Guo, arXiv 2105.08037v1")
              for key, label in (("gradient", "squared input gradient"), ("loss", "loss under attack"))),
        ),
        plots=(
            Plot(title="success less that of plain gradients", key="fooled", x=transfer.eps, less=("plain gradients",),
                 arms=tuple(_RULES)[1:], x_label="eps (pixels in [0, 1])", y_label="images fooled, difference (points)",
                 groups=(_TRANSFER,)),
            Plot(title="training loss", key="train loss", x="seconds", x_label="CPU seconds of the steps",
                 y_label="training loss, nats", log_y=True, groups=(_IMPLICIT,)),
            Plot(title="test accuracy", key="test accuracy", x=initial.run.marks, x_label="steps",
                 y_label="test accuracy, %", groups=(_INITIAL,)),
            Plot(title="input gradient", key="gradient", x="time", x_label="time", y_label="squared input gradient",
                 groups=(_SDE,)),
        ),
        choice=at("held-out accuracy"),
        data=lambda: load_digits().description,
    )  # fmt: skip


def _marks(epochs: int, batch: int) -> tuple[int, ...]:
    per_epoch = _LEARNED // batch
    return tuple(per_epoch * epoch for epoch in range(epochs + 1))


def _training(model: str, epochs: int, batch: int, std: float | None = None) -> Training:
    return Training(run=Run(model=model, batch=batch, marks=_marks(epochs, batch), std=std), source=_DIGITS)


DEMO = Experiment(
    name="demo",
    title="Four papers, one backward pass each",
    question="Each rule changes only the backward pass of a network. Four small experiments on real handwritten digits "
    "compare it with plain backpropagation: attacks that transfer, implicit steps, bad initial weights, and the SDE of "
    "adversarial training.",
    source="",
    scales={
        "standard": _scale(
            5,
            DigitTransfer(),
            _training("mlp:widths=512-512-512", 4, 128),
            _training("mlp:widths=100-100-100-100", 6, 100, std=0.05),
            ((1e-3, 3e-3, 1e-2), (0.01, 0.1, 1.0)),
            DigitSDE(process="sde"),
        ),
        "quick": _scale(
            3,
            DigitTransfer(source="resnet:width=4", epochs=1, eps=(0.2,), steps=3, images=50),
            _training("mlp:widths=64", 2, 128),
            _training("mlp:widths=50-50-50", 2, 100, std=0.05),
            ((3e-3,), (0.1,)),
            DigitSDE(process="sde", paths=8, samples=16, steps=10, records=2),
        ),
    },
    data=("digits",),
    remarks=(
        Finding(
            "Limits",
            "Small networks on images of 8x8 pixels, few seeds. It shows what the rules do, and is no evidence about "
            "the networks of the papers.",
        ),
    ),
)
