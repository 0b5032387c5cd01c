"""One training run by plain SGD, and the gradient at one place, under a rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from backpass.data import Split
from backpass.rules import Rule
from backpass.training import Progress, Trainer

__all__ = ["DIVERGED_ABOVE", "Run", "accuracy", "fit", "gradient"]

DIVERGED_ABOVE = 10.0
"""A run has diverged where its training loss is not finite, or above this many times its first value."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one training run left behind.

    Attributes:
        losses: the mean loss over all training images before the first epoch and after each, (epochs + 1,);
            ``nan`` from where the run diverged.
        accuracy: on the held-out images at the end, in per cent; ``nan`` where the run diverged.
    """

    losses: list[float]
    accuracy: float

    @property
    def diverged(self) -> bool:
        """Whether the run diverged, and was stopped there."""
        return not math.isfinite(self.losses[-1])


def fit(
    model: nn.Module,
    split: Split,
    rule: Rule,
    *,
    rate: float,
    epochs: int,
    batch: int,
    seed: int,
    unit_steps: bool = False,
) -> Run:
    r"""Train by SGD without momentum: :math:`\theta \leftarrow \theta - \eta\,g` on the cross-entropy.

    Args:
        model: trained in place; images (N, C, H, W) in [0, 1] to logits (N, classes).
        split: what to learn from, and what to judge on.
        rule: its backward gives g.
        rate: the learning rate, the same number for every rule.
        epochs: passes over the training images.
        batch: images per step; an incomplete last batch is left out.
        seed: of the order of the images.
        unit_steps: use g / |g|, so that every rule takes steps of the same length ``rate``.
    """
    x, y = split.train.x, split.train.y
    sampler = SubsetRandomSampler(range(len(y)), generator=torch.Generator().manual_seed(seed))
    losses: list[float] = []

    def told(progress: Progress) -> str | None:
        if "evaluation" in progress.record:
            losses.append(progress.record["evaluation"]["loss"])
            return None if losses[-1] <= DIVERGED_ABOVE * losses[0] else "the loss is above ten times its first value"
        return None

    Trainer(
        model,
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate),
        DataLoader(TensorDataset(x, y), batch_size=batch, sampler=sampler, drop_last=True),
        epochs=epochs,
        rules=(rule,),
        normalize_gradient="model" if unit_steps else None,
        seed=seed,
        diverged_above=None,
        evaluation=DataLoader(TensorDataset(x, y), batch_size=len(y)),
        evaluate_at=(0,),
        log_every=len(y),
        on_progress=told,
    ).fit()
    if len(losses) <= epochs or not losses[-1] <= DIVERGED_ABOVE * losses[0]:
        whole = [loss for loss in losses if loss <= DIVERGED_ABOVE * losses[0]]
        return Run(losses=[*whole, *[math.nan] * (epochs + 1 - len(whole))], accuracy=math.nan)
    return Run(losses=losses, accuracy=accuracy(model, split.test.x, split.test.y))


def gradient(model: nn.Module, rule: Rule, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy in all weights under a rule, as one vector."""
    weights = [p for p in model.parameters() if p.requires_grad]
    with rule.attach(model):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    return torch.cat([g.flatten() for g in grads])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The part of the images (N, C, H, W) that the model classifies as ``y``, in per cent."""
    with torch.no_grad():
        right: Tensor = model(x).argmax(1) == y
    return 100 * right.double().mean().item()
