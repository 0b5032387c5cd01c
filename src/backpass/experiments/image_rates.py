"""Learning rates on MNIST as one outcome: a perceptron or a convolutional network, plain or adversarial."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from backpass.data import load_data
from backpass.experiments.experiment import Context, Outcome
from backpass.training import Batch, ControlledLR, Evaluated, Trainer

__all__ = ["Images", "network", "train_images"]


RATES = 10
"""The grid: the largest rate, halved from one to the next."""

_METRICS = ("", " attacked", " accuracy")


@dataclass(frozen=True, kw_only=True)
class Images:
    """Settings of the comparison.

    Attributes:
        model: ``mlp`` or ``cnn``.
        attack_steps: K ascent steps of the adversary, 0 for none.
        eta_inner: its step.
        images: for training, the first of the training set.
        test: for judging, the first of the test set.
        epochs: passes over the training images.
        batch: images per step.
        rate: the largest of the grid, where all schedules start.
        every: between measurements of `ControlledLR`.
    """

    model: str
    attack_steps: int
    eta_inner: float = 0.1
    images: int = 5000
    test: int = 1000
    epochs: int = 4
    batch: int = 50
    rate: float = 0.5
    every: int = 5


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


def train_images(settings: Images, seed: int, context: Context) -> Outcome:
    """Train under all schedules from the same weights on the same batches of MNIST, by SGD without momentum.

    Returns:
        By schedule, a number per rate of the grid for ``fixed`` and for its ``Polyak`` average over the second half of
        the steps, one for the others: the effective test loss E[L + K eta_I / 2 |L_x|^2], and under the same name with
        `` attacked`` E L(x + delta_K) and with `` accuracy`` the accuracy under the adversary of training, in per cent.
    """
    sizes = {"train": settings.images, "test": settings.test}
    parts = (load_data("mnist", split=split).first(size).images for split, size in sizes.items())
    images, test = ((part.x.to(context.device), part.y.to(context.device)) for part in parts)
    found: dict[str, list[float]] = {}
    plans = [("fixed", settings.rate * 0.5**k) for k in range(RATES)]
    for schedule, rate in (*plans, *((name, settings.rate) for name in ("linear", "cosine", "controlled"))):
        averaged = {"fixed": "Polyak", "controlled": "controlled, Polyak"}.get(schedule, f"{schedule}, Polyak")
        ends = _train(settings, schedule, rate, seed, images, test)
        for name, numbers in zip((schedule, averaged), ends, strict=True):
            for metric, number in zip(_METRICS, numbers, strict=True):
                found.setdefault(name + metric, []).append(number)
    return found


def _train(
    task: Images, schedule: str, rate: float, seed: int, images: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> list[tuple[float, float, float]]:
    """Return the last network's numbers, and those of the Polyak average."""
    x, y = images
    model = network(task.model, seed).to(x.device)
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
    average = network(task.model, seed).to(x.device)
    if result.averaged is not None:
        average.load_state_dict(result.averaged)
    return [_judge(model, test, task), _judge(average if result.averaged is not None else model, test, task)]


class _Attacked:
    """Cross-entropy at the end of the adversary's ascent."""

    def __init__(self, task: Images) -> None:
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


def _attacked(model: nn.Module, x: Tensor, y: Tensor, task: Images) -> Tensor:
    for _ in range(task.attack_steps):
        x = x + task.eta_inner * _slope(model, x, y)
    return x


def _judge(model: nn.Module, test: tuple[Tensor, Tensor], task: Images) -> tuple[float, float, float]:
    x, y = test
    squares = _slope(model, x, y).flatten(1).square().sum(1).mean()
    at = _attacked(model, x, y, task)
    with torch.no_grad():
        clean, logits = F.cross_entropy(model(x), y), model(at)
        effective = clean + task.attack_steps * task.eta_inner / 2 * squares
        right = (logits.argmax(1) == y).float().mean()
        return float(effective), float(F.cross_entropy(logits, y)), 100 * float(right)
