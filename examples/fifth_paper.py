"""Claims of a fifth paper as a table: When does label smoothing help? (Mueller, Kornblith, Hinton, NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from backpass.data import load_digits
from backpass.experiments.experiment import Arm, Comparison, Context, Design, Experiment, Measurement
from backpass.experiments.running import Done, run
from backpass.models import build
from backpass.training import PerSample, Trainer

PAPER = "Mueller et al., NeurIPS 2019, abstract"


@dataclass(frozen=True, kw_only=True)
class Smoothed:
    """Settings of one training on the first ``images`` digits."""

    smoothing: float
    images: int = 200
    epochs: int = 60
    lr: float = 0.1


def train(settings: Smoothed, seed: int, context: Context) -> Mapping[str, float]:
    """Train an MLP with smoothed labels; return how its confidence compares with its accuracy on held-out digits."""
    split = load_digits()
    x, y = split.train.x[: settings.images].to(context.device), split.train.y[: settings.images].to(context.device)
    model = build("mlp:widths=64-64", shape=(1, 8, 8), seed=seed).to(context.device)

    def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, labels, reduction="none", label_smoothing=settings.smoothing)

    sgd = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9)
    Trainer(model, sgd, (x, y), epochs=settings.epochs, batch_size=50, objective=PerSample(loss), seed=seed).fit()
    with torch.no_grad():
        confidence, prediction = model(split.test.x.to(context.device)).softmax(1).cpu().max(1)
    right = (prediction == split.test.y).float()
    bins = (10 * confidence).long().clamp(max=9)
    gaps = [(confidence - right)[bins == k].sum().abs().item() for k in range(10)]
    return {
        "accuracy": 100 * right.mean().item(),
        "overconfidence": 100 * (confidence - right).mean().item(),
        "calibration error": 100 * sum(gaps) / len(right),
    }


ACCURACY = Measurement(label="test accuracy", unit="%", key="accuracy")
OVERCONFIDENCE = Measurement(label="confidence less accuracy", unit="points", key="overconfidence")
ERROR = Measurement(label="expected calibration error, 10 bins", unit="points", key="calibration error")


def claim(id_: str, statement: str, measurement: Measurement, published: str) -> Comparison:
    """Compare the two arms in the direction that the paper claims."""
    return Comparison(id=id_, statement=statement, measurement=measurement, ours="smoothed labels",
                      theirs="hard labels", direction="lower", reference=PAPER, published=published)  # fmt: skip


SMALL = Design(
    arms=tuple(
        Arm(name=name, work=train, candidates={"": Smoothed(smoothing=smoothing)})
        for name, smoothing in (("hard labels", 0.0), ("smoothed labels", 0.05))
    ),
    seeds=tuple(range(5)),
    measurements=(ACCURACY, OVERCONFIDENCE, ERROR),
    comparisons=(
        claim("confidence", "smoothed labels make a network less over-confident", OVERCONFIDENCE,
              "prevents the network from becoming over-confident"),
        claim("calibration", "smoothed labels improve calibration", ERROR, "improves model calibration"),
    ),
    data=lambda: "scikit-learn's digits, the first 200 of the training part",
)  # fmt: skip
EXPERIMENTS = (
    Experiment(
        name="label-smoothing",
        title="Does label smoothing calibrate a small network?",
        question="An MLP learns 200 digits with hard labels and with labels smoothed by 0.05, from the same weights.",
        source="Mueller, Kornblith, Hinton: When does label smoothing help? NeurIPS 2019",
        scales={"small": SMALL},
    ),
)

if __name__ == "__main__":
    for done in run(EXPERIMENTS, scale="small", out=Path("runs/fifth-paper")):
        for one in done.result.claims if isinstance(done, Done) else ():
            print(f"{one.statement}: {one.verdict}, {one.estimate:+.2f} {one.quantity}")  # noqa: T201
