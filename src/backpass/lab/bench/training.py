"""One training run of an experiment: curves of loss and accuracy, with the seconds that the steps took."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench
from backpass.lab.bench.images import Parts, Source, load_parts
from backpass.lab.data import Images
from backpass.lab.data.augmentation import Augmentation
from backpass.lab.models import build
from backpass.lab.normalisation import known_normalisation
from backpass.lab.placements import parse_rule_for
from backpass.lab.training.optimizers import make_optimizer
from backpass.training.batches import Batch
from backpass.training.schedules import make_schedule

__all__ = ["DIVERGED_ABOVE", "Curves", "Run", "curves", "network"]

DIVERGED_ABOVE = 100.0
"""A run has diverged where its training loss, in nats, is not finite or above this; guessing among ten has 2.3."""

_JUDGED_AT_ONCE = 1000

Curves = Mapping[str, list[float]]
"""By name, a number per mark: ``train loss``, ``train accuracy`` (per cent), the same of ``test`` and, where there are
such images, of ``held-out``, and ``seconds`` of the steps until then; ``nan`` from where a run diverged."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a training run depends on beside its images.

    Attributes:
        model: the text form of a network of the lab.
        rule: the text form of a rule; ``linbp:start=paper`` is the paper's placement.
        optimizer: the text form of an optimizer.
        rate: its learning rate.
        schedule: the text form of a scheduler; empty for a constant rate.
        batch: images per step; an incomplete last batch of an epoch is left out.
        marks: the numbers of steps after which the network is judged, ascending; the last ends the run.
        judged: at most so many images of each part are judged; ``None``: all.
        seed: of weights and order.
        std: weights from N(0, std^2) with biases 0; ``None``: PyTorch's own initial weights.
        unit: scale the gradient of every weight tensor to l2 norm 1.
        augment: random crops and mirror images.
        normalise: whether the images are standardised by channel.
    """

    model: str
    rule: str
    optimizer: str = "sgd"
    rate: float
    schedule: str = ""
    batch: int
    marks: tuple[int, ...]
    judged: int | None = None
    seed: int
    std: float | None = None
    unit: bool = False
    augment: bool = False
    normalise: bool = False


def curves(bench: Bench, run: Run, source: Source) -> Curves:
    """The curves of a run, from disk where it was finished before; experiments share them."""
    return bench.shared.value(
        f"{run.model}, {run.rule}, {run.optimizer} {run.rate:g}, seed {run.seed}",
        lambda: _train(run, load_parts(source), source.data, bench.device),
        **asdict(run),
        source=asdict(source),
        device=bench.device.type,
    )


def network(run: Run, parts: Parts, data: str) -> nn.Module:
    """The network with the initial weights of the run's seed.

    Raises:
        BackpassError: there is no such network, or it does not take such images.
    """
    normalisation = known_normalisation(data) if run.normalise else None
    model = build(run.model, shape=parts.shape, classes=parts.classes, normalisation=normalisation, seed=run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        for module in model.modules():
            if run.std is not None and isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=run.std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    return model


def _train(run: Run, parts: Parts, data: str, device: torch.device) -> dict[str, list[float]]:
    model = network(run, parts, data).to(device)
    rule = parse_rule_for(run.model, run.rule, use="training")
    optimizer = make_optimizer(run.optimizer, model.parameters(), run.rate)
    schedule = make_schedule(run.schedule, optimizer, run.marks[-1]) if run.schedule else None
    prepare = Augmentation(crop=4 * run.augment, flip=run.augment, white=parts.train.white)
    x, y = parts.train.pixels.to(device), parts.train.labels.to(device)
    judged = {"train": parts.train, "held-out": parts.held_out, "test": parts.test}
    images = {name: _placed(part, run.judged, device) for name, part in judged.items() if len(part)}
    generator = torch.Generator().manual_seed(run.seed)
    per_epoch = len(y) // run.batch
    if not per_epoch:
        raise BackpassError(f"a batch of {run.batch} needs as many images to learn from, got {len(y)}.")
    order = torch.empty(0, dtype=torch.int64)
    found: dict[str, list[float]] = {}
    seconds, diverged = 0.0, False
    with rule.attach(model):
        for step in range(run.marks[-1] + 1):
            if step in run.marks:
                told = _judge(model, images, diverged)
                diverged = not math.isfinite(told["train loss"])
                for name, value in {**told, "seconds": math.nan if diverged else seconds}.items():
                    found.setdefault(name, []).append(value)
            if diverged or step == run.marks[-1]:
                continue
            epoch, within = divmod(step, per_epoch)
            if within == 0:
                order = torch.randperm(len(y), generator=generator)
            rows = order[within * run.batch : (within + 1) * run.batch].to(device)
            began = _clock(device)
            batch = Batch(x=x[rows], y=y[rows], index=rows, epoch=epoch, step=step, seed=run.seed)
            loss = F.cross_entropy(model(prepare(batch.x, batch)), batch.y)
            optimizer.zero_grad()
            try:
                torch.autograd.backward(loss)
            except BackpassError:
                if step == 0:  # a network that the rule refuses, not one that has diverged
                    raise
                diverged = True
                continue
            if run.unit:
                _scale_to_unit(model)
            optimizer.step()
            if schedule is not None and (schedule.after == "step" or within + 1 == per_epoch):
                schedule.scheduler.step()
            seconds += _clock(device) - began
    return found


def _placed(images: Images, count: int | None, device: torch.device) -> tuple[Tensor, Tensor, int]:
    return images.pixels[:count].to(device), images.labels[:count].to(device), images.white


@torch.no_grad()
def _judge(model: nn.Module, images: Mapping[str, tuple[Tensor, Tensor, int]], diverged: bool) -> dict[str, float]:
    """Loss and accuracy of every part, all ``nan`` where the run has diverged."""
    told: dict[str, float] = {}
    model.eval()
    for name, (pixels, y, white) in images.items():
        loss = right = math.nan
        if not diverged:
            logits = torch.cat([model(x.float() / white) for x in torch.split(pixels, _JUDGED_AT_ONCE)])
            loss, right = F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()
            diverged = name == "train" and not loss <= DIVERGED_ABOVE
        lost = diverged or not math.isfinite(loss)
        told |= {f"{name} loss": math.nan if lost else loss, f"{name} accuracy": math.nan if lost else 100 * right}
    model.train()
    return told


def _scale_to_unit(model: nn.Module) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    tiny = torch.finfo(torch.float32).tiny
    torch._foreach_div_(gradients, [norm.clamp(min=tiny) for norm in torch._foreach_norm(gradients)])


def _clock(device: torch.device) -> float:
    """CPU seconds of this process, or on another device seconds of the clock with its work done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
