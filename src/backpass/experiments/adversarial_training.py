"""Adversarial training as arms: one backward rule for the weights, one for the examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from backpass.attacks import PGD, AutoAttack, evaluate
from backpass.experiments.experiment import Context, Outcome
from backpass.lab.training.assembly import assemble, complete
from backpass.lab.training.parts import load_parts
from backpass.lab.training.recipe import Recipe
from backpass.rules import unwrap

__all__ = ["JUDGE_STEPS", "Adversarial", "train_adversarially"]

JUDGE_STEPS = 20
"""Of the PGD that measures robustness."""


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Settings of an arm that trains on the examples of PGD.

    Attributes:
        weights: text form of the rule for the gradients of the weights.
        examples: text form of the rule for those of the examples.
        data: the data set.
        model: text form of a network of the lab.
        limit: number of images to learn from; None: all.
        eps: l_inf radius of training, at which robustness is measured.
        far: a larger radius, reported too.
        steps: of PGD in training.
        step: its step size.
        epochs: passes over the images.
        warmup: epochs until eps is reached.
        batch: images per step.
        rate: of Adam, falling to 0 linearly.
        judged: test images for AutoAttack, and images of each part for PGD.
        queries: of AutoAttack's Square, which has 5,000 in its standard version.
    """

    weights: str = "bp"
    examples: str = "bp"
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


def train_adversarially(settings: Adversarial, seed: int, context: Context) -> Outcome:
    """Train a network and measure its accuracy under attacks with plain gradients, in per cent.

    Returns:
        ``robust`` by epochs, under PGD on test images; ``clean`` on all test images; ``train`` and ``test`` under PGD;
        ``autoattack`` at eps and ``autoattack far`` on test images. ``nan`` where the run diverged.
    """
    recipe = Recipe(
        data=settings.data,
        model=settings.model,
        normalize=False,
        limit=settings.limit,
        rule=(settings.weights,),
        adversary=f"pgd:eps={settings.eps!r},steps={settings.steps},step={settings.step!r}",
        adversary_rule=settings.examples,
        warmup=settings.warmup,
        optimizer="adam",
        lr=settings.rate,
        scheduler="linear",
        epochs=settings.epochs,
        batch_size=settings.batch,
        robust=f"pgd:eps={settings.eps!r},steps={JUDGE_STEPS}",
        robust_images=settings.judged,
        seed=seed,
    )
    parts = load_parts(settings.data, limit=settings.limit)
    trainer = assemble(complete(recipe), parts, device=context.device, folder=None, report=None)
    result = trainer.fit()
    robust = [100 * record["robust"]["robust_accuracy"] for record in result.history]
    robust += [math.nan] * (settings.epochs - len(robust))
    if result.diverged is not None:
        names = ("clean", "train", "test", "autoattack", "autoattack far")
        return {"robust": robust, **dict.fromkeys(names, math.nan)}
    model = unwrap(trainer.model).eval()

    def left(x: Tensor, y: Tensor, attack: PGD | AutoAttack) -> float:
        return 100 * evaluate(model, (x[: settings.judged], y[: settings.judged]), attack).robust_accuracy

    test, train = parts.test.images, parts.train.images
    pgd = PGD(eps=settings.eps, step=2.5 * settings.eps / JUDGE_STEPS, steps=JUDGE_STEPS, restarts=1, seed=seed)
    near, far = (AutoAttack(eps=eps, queries=settings.queries, seed=seed) for eps in (settings.eps, settings.far))
    return {
        "robust": robust,
        "clean": 100 * result.history[-1]["evaluation"]["accuracy"],
        "train": left(train.x, train.y, pgd),
        "test": left(test.x, test.y, pgd),
        "autoattack": left(test.x, test.y, near),
        "autoattack far": left(test.x, test.y, far),
    }
