"""Learning rates on MNIST: a perceptron and a convolutional network, plain and adversarial, one run at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from backpass.training import Batch, ControlledLR, Evaluated, Trainer

__all__ = ["Run", "Task", "network", "train"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training task.

    Attributes:
        model: ``mlp`` or ``cnn``.
        attack_steps: K ascent steps of the adversary, 0 for none.
        eta_inner: its step.
        epochs: passes over the training images.
        batch: images per step.
        every: between measurements of `ControlledLR`.
    """

    model: str
    attack_steps: int
    eta_inner: float
    epochs: int
    batch: int
    every: int


@dataclass(frozen=True)
class Run:
    """Numbers on the test images: the effective loss E[L + K eta_I / 2 |L_x|^2], E L(x + delta_K), accuracy.

    ``accuracy`` is in per cent and under the adversary of training.
    """

    effective: float
    attacked: float
    accuracy: float


def network(name: str, seed: int) -> nn.Sequential:
    """A small network for 28 x 28 images."""
    torch.manual_seed(seed)
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(6, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(588, 10),
    )


def train(
    task: Task, schedule: str, rate: float, seed: int, images: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> list[Run]:
    """One run of SGD without momentum; the same seed gives the same initial weights and the same batches.

    Args:
        task: what is trained.
        schedule: ``fixed``, ``linear``, ``cosine`` or ``controlled``.
        rate: at the start.
        seed: of weights and batches.
        images: x (N, 1, 28, 28) and y (N,), for training.
        test: the same for judging.

    Returns:
        The last network's numbers, and those of the Polyak average over the second half of the steps.
    """
    model, (x, y) = network(task.model, seed), images
    steps = len(y) // task.batch * task.epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    controlled = schedule == "controlled"
    sampler = SubsetRandomSampler(range(len(y)), generator=torch.Generator().manual_seed(seed))
    result = Trainer(
        model,
        optimizer,
        DataLoader(TensorDataset(x, y), batch_size=task.batch, sampler=sampler, drop_last=True),
        epochs=task.epochs,
        objective=_Attacked(task),
        scheduler=ControlledLR(optimizer, every=task.every)
        if controlled
        else LambdaLR(optimizer, _factor(schedule, steps)),
        step_scheduler="step",
        average=f"polyak:{(steps - steps // 2) / steps!r}",
        seed=seed,
        diverged_above=None,
        log_every=steps,
    ).fit()
    average = network(task.model, seed)
    if result.averaged is not None:
        average.load_state_dict(result.averaged)
    return [_judge(model, test, task), _judge(average if result.averaged is not None else model, test, task)]


class _Attacked:
    """Cross-entropy at the end of the adversary's ascent."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, model: nn.Module, batch: Batch, plain: object) -> Evaluated:
        """Evaluate the objective on a batch."""
        at = _attacked(model, batch.x, batch.y, self.task)

        def again(model: nn.Module, rows: slice) -> Tensor:
            return F.cross_entropy(model(at[rows]), batch.y[rows])

        return Evaluated(loss=again(model, slice(None)), again=again)


def _factor(schedule: str, steps: int) -> Callable[[int], float]:
    return {
        "fixed": lambda k: 1.0,
        "linear": lambda k: 1 - k / steps,
        "cosine": lambda k: (1 + math.cos(math.pi * k / steps)) / 2,
    }[schedule]


def _slope(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each image's own loss in that image."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return gradient


def _attacked(model: nn.Module, x: Tensor, y: Tensor, task: Task) -> Tensor:
    for _ in range(task.attack_steps):
        x = x + task.eta_inner * _slope(model, x, y)
    return x


def _judge(model: nn.Module, test: tuple[Tensor, Tensor], task: Task) -> Run:
    x, y = test
    squares = _slope(model, x, y).flatten(1).square().sum(1).mean()
    at = _attacked(model, x, y, task)
    with torch.no_grad():
        clean, logits = F.cross_entropy(model(x), y), model(at)
        effective = clean + task.attack_steps * task.eta_inner / 2 * squares
        right = (logits.argmax(1) == y).float().mean()
        return Run(float(effective), float(F.cross_entropy(logits, y)), 100 * float(right))
