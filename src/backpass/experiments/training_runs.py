"""Training run of an experiment: curves of loss, accuracy and the seconds of the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from backpass.data import Images
from backpass.data.augmentation import Augmentation
from backpass.data.normalisation import known_normalisation
from backpass.errors import BackpassError
from backpass.experiments.images import Parts, Source, load_parts
from backpass.lab.placements import parse_rule_for
from backpass.lab.training.optimizers import make_optimizer
from backpass.models import build
from backpass.training import Batch, Progress, Trainer

__all__ = ["DIVERGED_ABOVE", "Curves", "Run", "network", "train_run"]

DIVERGED_ABOVE = 100.0
"""A run has diverged where its training loss, in nats, is not finite or above this; guessing among ten has 2.3."""

_JUDGED_AT_ONCE = 1000
_SELDOM = 10**6  # steps between records that nobody reads

Curves = Mapping[str, list[float]]
"""By name, one number per evaluation: loss (nats) and accuracy (per cent) as ``train loss`` and ``train accuracy``, the
same for ``test`` and, if there are such images, ``held-out``; ``seconds`` of the steps so far. ``nan`` after a
divergence."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a training run, apart from its images.

    Attributes:
        model: text form of a network of the lab.
        rule: text form of a rule; ``linbp:start=paper`` is the paper's placement.
        optimizer: text form of an optimizer.
        rate: learning rate.
        schedule: text form of a scheduler; empty for a constant rate.
        batch: images per step; an incomplete last batch of an epoch is left out.
        marks: evaluation steps, ascending; the last ends the run.
        judged: maximum number of images of each part in an evaluation; None: all.
        seed: seed of initial weights and order.
        std: weights from N(0, std^2) with biases 0; None: PyTorch's own initial weights.
        unit: scale the gradient of every weight tensor to l2 norm 1.
        augment: random crops and mirror images.
        normalise: standardise the images by channel.
    """

    model: str
    rule: str = "bp"
    optimizer: str = "sgd"
    rate: float = 0.0
    schedule: str = ""
    batch: int
    marks: tuple[int, ...]
    judged: int | None = None
    seed: int = 0
    std: float | None = None
    unit: bool = False
    augment: bool = False
    normalise: bool = False


def network(run: Run, parts: Parts, data: str, *, seed: int | None = None) -> nn.Module:
    """Return the network with the initial weights of a seed, by default the run's.

    Raises:
        BackpassError: there is no such network, or it does not take such images.
    """
    normalisation = known_normalisation(data) if run.normalise else None
    seed = run.seed if seed is None else seed
    model = build(run.model, shape=parts.shape, classes=parts.classes, normalisation=normalisation, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if run.std is not None and isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=run.std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    return model


def train_run(run: Run, source: Source, device: torch.device) -> dict[str, list[float]]:
    """Train a network and return its `Curves`."""
    parts = load_parts(source)
    model = network(run, parts, source.data).to(device)
    optimizer = make_optimizer(run.optimizer, model.parameters(), run.rate)
    x, y = parts.train.pixels.to(device), parts.train.labels.to(device)
    per_epoch = len(y) // run.batch
    if not per_epoch:
        raise BackpassError(f"a batch of {run.batch} needs as many images to learn from, got {len(y)}.")
    curves, watch = _Curves(), _StopWatch(device)
    augmentation = Augmentation(crop=4 * run.augment, flip=run.augment, white=parts.train.white)

    def prepare(x: Tensor, batch: Batch) -> Tensor:
        watch.start()
        return augmentation(x, batch)

    def told(progress: Progress) -> str | None:
        if progress.record["kind"] != "evaluation":
            return None
        return curves.add(progress.record["evaluation"], watch.seconds)

    judged = {"train": parts.train, "held-out": parts.held_out, "test": parts.test}
    Trainer(
        model,
        optimizer,
        _in_seeded_order(x, y, run),
        epochs=-(-run.marks[-1] // per_epoch),
        max_steps=run.marks[-1],
        rules=(parse_rule_for(run.model, run.rule, use="training"),),
        scheduler=run.schedule or None,
        normalize_gradient="tensor" if run.unit else None,
        prepare=prepare,
        seed=run.seed,
        diverged_above=None,
        evaluation={name: _placed(part, run.judged, device) for name, part in judged.items() if len(part)},
        prepare_evaluation=lambda x: x.float() / parts.train.white,
        evaluate_every=None,
        evaluate_at=run.marks,
        log_every=_SELDOM,
        on_step=watch.stop,
        on_progress=told,
    ).fit()
    return curves.filled(len(run.marks))


class _Curves:
    """Numbers of each mark, ``nan`` from where the run has diverged."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def add(self, evaluation: Mapping[str, Mapping[str, float]], seconds: float) -> str | None:
        """Add the numbers of a mark; return why the run ends there, if it does."""
        if not evaluation["train"]["loss"] <= DIVERGED_ABOVE:
            return f"the training loss is {evaluation['train']['loss']:g}"
        for name, one in evaluation.items():
            known = math.isfinite(one["loss"])
            self._found.setdefault(f"{name} loss", []).append(one["loss"] if known else math.nan)
            self._found.setdefault(f"{name} accuracy", []).append(100 * one["accuracy"] if known else math.nan)
        self._found.setdefault("seconds", []).append(seconds)
        return None

    def filled(self, count: int) -> dict[str, list[float]]:
        """Return the curves, each with so many numbers."""
        return {name: [*some, *[math.nan] * (count - len(some))] for name, some in self._found.items()}


class _StopWatch:
    """Seconds of the steps alone: CPU seconds of this process, on another device those of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._began = device, 0.0
        self.seconds = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._began = _clock(self._device)

    def stop(self, step: int) -> None:
        """End a step."""
        self.seconds += _clock(self._device) - self._began


def _in_seeded_order(x: Tensor, y: Tensor, run: Run) -> DataLoader[tuple[Tensor, ...]]:
    """Return the images in an order that is drawn by one generator, epoch after epoch."""
    sampler = SubsetRandomSampler(range(len(y)), generator=torch.Generator().manual_seed(run.seed))
    return DataLoader(TensorDataset(x, y), batch_size=run.batch, sampler=sampler, drop_last=True)


def _placed(images: Images, count: int | None, device: torch.device) -> DataLoader[tuple[Tensor, ...]]:
    dataset = TensorDataset(images.pixels[:count].to(device), images.labels[:count].to(device))
    return DataLoader(dataset, batch_size=_JUDGED_AT_ONCE)


def _clock(device: torch.device) -> float:
    """Return CPU seconds of this process, or on another device seconds of the clock when its work is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
