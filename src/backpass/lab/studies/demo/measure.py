"""The demo: the same network, from the same weights, learns and is attacked with another backward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from backpass.attacks import PGD
from backpass.data import Split, load_digits
from backpass.errors import BackpassError
from backpass.lab.studies.demo.fit import Run, fit, gradient
from backpass.lab.threads import one_thread
from backpass.models import MODELS, build
from backpass.models.text import read_model
from backpass.report.statistics import geometric_interval
from backpass.rules import parse_rule

__all__ = ["SCALES", "Demo", "Measured", "measure"]

Progress = Callable[[str, float], None]
"""Called with what is going on and with the part that is done, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The demo's settings.

    Attributes:
        scale: the name of this size.
        model: a network of the lab that takes 8x8 images.
        seeds: how many runs of each kind; run i uses seed i for weights, batches and attack starts.
        rules: text forms; the first is what the others are compared with.
        rates: learning rates, each used with every rule.
        unit_step: the step length of the runs whose gradients are scaled to norm 1.
        epochs: passes over the training images.
        batch: images per step.
        early: the epoch at which the early training loss is read.
        eps: l_inf radii of the attacks, in units of the pixel range.
        attack_steps: PGD steps, each of a quarter of the radius, from one random start.
    """

    scale: str = "standard"
    model: str = "mlp:widths=128-128-128"
    seeds: int = 5
    rules: tuple[str, ...] = ("bp", "linbp:start=-2", "linbp")
    rates: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
    unit_step: float = 0.05
    epochs: int = 20
    batch: int = 64
    early: int = 2
    eps: tuple[float, ...] = (0.03, 0.05, 0.1, 0.15, 0.2)
    attack_steps: int = 20

    def __post_init__(self) -> None:
        read_model(self.model, MODELS)
        if self.seeds < 2:
            raise BackpassError(f"an interval needs at least 2 seeds, got {self.seeds}; 3 are needed for a verdict.")


SCALES = {
    "standard": Demo(),
    "quick": replace(Demo(), scale="quick", seeds=3, epochs=6, rates=(0.01, 0.1), eps=(0.1, 0.2)),
}
"""The sizes that the demo comes in, by name."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the demo measured; lists run over the seeds.

    Attributes:
        demo: the settings.
        data: one line about the data.
        runs: by (rule, rate), and by (rule, None) for steps of unit length times ``unit_step``.
        best_rates: by rule, the rate at which no run diverged and the interval of the final training loss has the
            lowest upper end; ``None`` where some run diverged at every rate.
        lengths: by rule, the length of the gradient at the initial weights.
        cosines: by rule, its cosine with the first rule's gradient there.
        attacked: how many held-out images each attacked network classifies correctly.
        fooled: by (rule, eps), the part of these images that the attack fools, in per cent.
        seconds: how long it took.
        threads: of torch's CPU operations.
    """

    demo: Demo
    data: str
    runs: dict[tuple[str, float | None], list[Run]]
    best_rates: dict[str, float | None]
    lengths: dict[str, list[float]]
    cosines: dict[str, list[float]]
    attacked: list[int]
    fooled: dict[tuple[str, float], list[float]]
    seconds: float
    threads: int


@dataclass
class _Clock:
    """Counts the pieces of work that are done and reports them."""

    total: float
    progress: Progress
    done: float = field(default=0.0)

    def tick(self, what: str) -> None:
        self.done += 1
        self.progress(what, min(self.done / self.total, 1.0))


def measure(demo: Demo, progress: Progress = lambda what, part: None) -> Measured:
    """Run the demo on one CPU thread; the numbers depend on nothing but the settings and the versions.

    Raises:
        BackpassError: the first rule diverged at every rate, so that there is no network to attack.
    """
    began = time.perf_counter()
    with one_thread():
        return _measure(demo, progress, began)


def _measure(demo: Demo, progress: Progress, began: float) -> Measured:
    split = load_digits()
    plain = demo.rules[0]
    steps: list[float | None] = [*demo.rates, None]
    clock = _Clock(demo.seeds * len(demo.rules) * (len(steps) + 0.2 * len(demo.eps)), progress)
    runs: dict[tuple[str, float | None], list[Run]] = {(rule, r): [] for rule in demo.rules for r in steps}
    trained: dict[float, list[torch.nn.Module]] = {rate: [] for rate in demo.rates}
    lengths: dict[str, list[float]] = {rule: [] for rule in demo.rules}
    cosines: dict[str, list[float]] = {rule: [] for rule in demo.rules}
    for seed in range(demo.seeds):
        initial = build(demo.model, shape=split.train.pixels.shape[1:], seed=seed)
        base = gradient(initial, parse_rule(plain), split.train.x, split.train.y)
        for rule in demo.rules:
            g = gradient(initial, parse_rule(rule), split.train.x, split.train.y)
            lengths[rule].append(g.norm().item())
            cosines[rule].append(torch.cosine_similarity(g, base, dim=0).item())
            for rate in steps:
                model = build(demo.model, shape=split.train.pixels.shape[1:], seed=seed)
                run = fit(
                    model,
                    split,
                    parse_rule(rule),
                    rate=demo.unit_step if rate is None else rate,
                    epochs=demo.epochs,
                    batch=demo.batch,
                    seed=seed,
                    unit_steps=rate is None,
                )
                runs[rule, rate].append(run)
                if rule == plain and rate is not None:
                    trained[rate].append(model)
                clock.tick(f"training, seed {seed}: {rule}")
    best = {rule: _best_rate(demo, rule, runs) for rule in demo.rules}
    rate = best[plain]
    if rate is None:
        raise BackpassError(f"{plain} diverged at every rate of {demo.rates}: choose smaller rates.")
    attacked, fooled = _attack(demo, split, trained[rate], clock)
    return Measured(
        demo=demo,
        data=split.description,
        runs=runs,
        best_rates=best,
        lengths=lengths,
        cosines=cosines,
        attacked=attacked,
        fooled=fooled,
        seconds=time.perf_counter() - began,
        threads=1,
    )


def _best_rate(demo: Demo, rule: str, runs: dict[tuple[str, float | None], list[Run]]) -> float | None:
    """By the interval's upper end, not the mean: one lucky run at an unstable rate does not make it the best."""
    ends = {rate: geometric_interval([run.losses[-1] for run in runs[rule, rate]]).high for rate in demo.rates}
    finite = {rate: loss for rate, loss in ends.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)


def _attack(
    demo: Demo, split: Split, models: Sequence[torch.nn.Module], clock: _Clock
) -> tuple[list[int], dict[tuple[str, float], list[float]]]:
    """Attack the correctly classified held-out images of each model with every rule's gradients."""
    attacked: list[int] = []
    fooled: dict[tuple[str, float], list[float]] = {(rule, eps): [] for rule in demo.rules for eps in demo.eps}
    for seed, model in enumerate(models):
        x, y = _correct(model, split.test.x, split.test.y)
        attacked.append(len(y))
        for rule in demo.rules:
            for eps in demo.eps:
                attack = PGD(eps=eps, step=eps / 4, steps=demo.attack_steps, seed=seed)
                with parse_rule(rule).attach(model):
                    result = attack(model, x, y)
                fooled[rule, eps].append(100 * result.success.double().mean().item())
                clock.tick(f"attack, seed {seed}: {rule}")
    return attacked, fooled


def _correct(model: torch.nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        right = model(x).argmax(1) == y
    return x[right], y[right]
