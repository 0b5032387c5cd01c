"""Arms that train a network, and measurements on their training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from backpass.experiments.experiment import Arm, Context, Measurement, Outcome, Runs
from backpass.experiments.images import Source, load_parts
from backpass.experiments.training_runs import Run, train_run

__all__ = ["Training", "at", "at_equal_time", "described", "largest_usable_rate", "train", "training_arm"]

_NAMES = {
    "train loss": ("training loss", "nats"),
    "train accuracy": ("training accuracy", "percentage points"),
    "test loss": ("test loss", "nats"),
    "test accuracy": ("test accuracy", "percentage points"),
    "held-out accuracy": ("accuracy on held-out training images", "percentage points"),
    "seconds": ("seconds of the training steps", ""),
}
_USABLE_WITHIN = 3.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of an arm that trains a network.

    Attributes:
        run: training settings; its seed is replaced by that of the arm.
        source: source of the images.
    """

    run: Run
    source: Source


def train(settings: Training, seed: int, context: Context) -> Outcome:
    """Train a network and return its `Curves` as the outcome."""
    return train_run(replace(settings.run, seed=seed), settings.source, context.device)


def training_arm(
    name: str, training: Training, rates: Sequence[float], *, rule: str = "bp", optimizer: str, group: str = ""
) -> Arm:
    """Return an arm with one candidate for each learning rate.

    Args:
        name: name of the arm.
        training: other settings.
        rates: learning rates, one candidate each.
        rule: text form of a rule. If it contains ``{rate}``, the rate is inserted there and the optimizer's rate is 1.
        optimizer: text form of an optimizer.
        group: group of the arm.
    """
    candidates = {}
    for rate in rates:
        in_rule = "{rate}" in rule
        text = rule.replace("{rate}", f"{rate:g}")
        run = replace(training.run, rule=text, optimizer=optimizer, rate=1.0 if in_rule else rate)
        candidates[f"{rate:g}"] = replace(training, run=run)
    return Arm(name=name, work=train, candidates=candidates, group=group)


def at(key: str, place: int = -1, when: str = "") -> Measurement:
    """Return the measurement of a curve at index `place`, by default the last; `when` describes that point."""
    label, unit = _NAMES[key]
    return Measurement(label=f"{label} {when}".strip(), unit=unit, key=key, at=place)


def described(*sources: Source) -> Callable[[], str]:
    """Return a function that describes the data of these sources in one line."""
    return lambda: " ".join(dict.fromkeys(load_parts(source).line for source in sources))


def largest_usable_rate(scales: Mapping[str, float]) -> Measurement:
    """Return the measurement of the largest usable learning rate.

    A rate is usable if the training loss falls and the accuracy on the held-out images ends within 3 percentage points
    of the best of all rates. 0 if no rate is usable.

    Args:
        scales: factor of the rate by name of the arm; 1 for other arms.
    """

    def derive(runs: Runs) -> list[float]:
        scale = scales.get(runs.arm.name, 1.0)
        by_seed = zip(*runs.by_candidate.values(), strict=True)
        return [scale * _usable(dict(zip(map(float, runs.by_candidate), one, strict=True))) for one in by_seed]

    return Measurement(label="largest usable rate", derive=derive)


def _usable(runs: Mapping[float, Outcome]) -> float:
    ends = {
        rate: run["held-out accuracy"][-1] for rate, run in runs.items() if run["train loss"][-1] < run["train loss"][0]
    }
    return max((rate for rate, end in ends.items() if end >= max(ends.values()) - _USABLE_WITHIN), default=0.0)


def at_equal_time(key: str) -> Measurement:
    """Return the paired measurement of a loss at equal wall-clock time: the duration of the faster run of each pair.

    The logarithm of the loss is interpolated linearly between the points of the curve.
    """

    def pair(ours: Runs, theirs: Runs) -> tuple[list[float], list[float]]:
        pairs = []
        for a, b in zip(ours.runs, theirs.runs, strict=True):
            seconds = min(a["seconds"][-1], b["seconds"][-1])
            pairs.append((_after(a, key, seconds), _after(b, key, seconds)))
        return [a for a, _ in pairs], [b for _, b in pairs]

    label, unit = _NAMES[key]
    return Measurement(label=f"{label} after the same seconds", unit=unit, pair=pair)


def _after(one: Outcome, key: str, seconds: float) -> float:
    times, losses = one["seconds"], one[key]
    if not math.isfinite(losses[-1]):
        return math.nan
    place = next((i for i, time in enumerate(times) if time >= seconds), len(times) - 1)
    if place == 0 or losses[place] <= 0 or losses[place - 1] <= 0:
        return float(losses[place])
    part = min(1.0, (seconds - times[place - 1]) / (times[place] - times[place - 1]))
    return math.exp((1 - part) * math.log(losses[place - 1]) + part * math.log(losses[place]))
