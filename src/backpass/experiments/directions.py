"""Measurement of proximal directions: relative error to the exact direction, and cosine with the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from backpass.experiments.experiment import Context, Outcome
from backpass.experiments.images import Parts, Source, load_parts
from backpass.experiments.training_runs import Run, network
from backpass.lab.training.optimizers import make_optimizer
from backpass.rules import Rule, parse_rule
from backpass.training import Trainer

__all__ = ["Directions", "directions", "measure_directions"]


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Settings of `measure_directions`.

    Attributes:
        run: plain training before the measurement; its own seed is ignored.
        source: source of the images.
        rule: text form of the measured rule, with ``{tau}`` as the placeholder of tau.
        exact: text form of the reference rule, likewise.
        taus: values of tau to measure at.
        warm: number of training steps before the measurement.
    """

    run: Run
    source: Source
    rule: str
    exact: str
    taus: tuple[float, ...]
    warm: int = 5


def measure_directions(settings: Directions, seed: int, context: Context) -> Outcome:
    """Measure the directions of a rule after `Directions.warm` steps of plain training.

    Returns:
        ``cosine`` and ``error`` of `directions`, each a list with one number per tau.
    """
    parts, run = load_parts(settings.source), settings.run
    model = network(run, parts, settings.source.data, seed=seed).to(context.device)
    optimizer = make_optimizer(run.optimizer, model.parameters(), run.rate)
    batches = _batches(parts, run.batch, seed, context.device)
    x, y = map(torch.cat, zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=run.batch)  # without shuffling: in the order of `batches`
    Trainer(model, optimizer, loader, epochs=settings.warm, max_steps=settings.warm).fit()
    x, y = batches[settings.warm % len(batches)]
    found = []
    for tau in settings.taus:
        texts = {"exact": settings.exact, "own": settings.rule}
        rules = {name: parse_rule(text.replace("{tau}", f"{tau:g}")) for name, text in texts.items()}
        found.append(directions(model, x, y, rules)["own"])
    return {name: [at[name] for at in found] for name in ("cosine", "error")}


def _batches(parts: Parts, size: int, seed: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(parts.train), generator=torch.Generator().manual_seed(seed))
    train = parts.train
    rows = torch.split(order[: len(order) // size * size], size)
    return [((train.pixels[r].float() / train.white).to(device), train.labels[r].to(device)) for r in rows[:32]]


def directions(model: nn.Module, x: Tensor, y: Tensor, rules: Mapping[str, Rule]) -> dict[str, dict[str, float]]:
    """Compare the direction of each rule with the gradient G and with the direction D of the first rule.

    Args:
        model: model of linear and convolutional layers; the last one is not compared.
        x: (N, C, H, W), images in [0, 1].
        y: (N,), labels.
        rules: rules by name; the first one gives D.

    Returns:
        By rule: ``cosine``, the smallest cosine with G over all layers (weight and bias of a layer as one vector), and
        ``error``, the largest |direction - D| / |D| over all layers.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][:-1]

    def vectors() -> list[Tensor]:
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        return [
            torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]).double() for one in layers
        ]

    plain = vectors()
    found: dict[str, list[Tensor]] = {}
    for name, rule in rules.items():
        with rule.attach(model):
            found[name] = vectors()
    first = next(iter(found.values()))
    return {
        name: {
            "cosine": min(float(torch.cosine_similarity(d, g, dim=0)) for d, g in zip(own, plain, strict=True)),
            "error": max(float((d - e).norm() / e.norm()) for d, e in zip(own, first, strict=True)),
        }
        for name, own in found.items()
    }
