"""Methods of training side by side, each at the rate that is best on held-out training images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from backpass.errors import BackpassError
from backpass.lab.bench.experiment import Bench
from backpass.lab.bench.images import Source, load_parts
from backpass.lab.bench.training import Curves, Run, curves
from backpass.report.result import Cell, Curve, Series, Table
from backpass.report.statistics import mean_interval

__all__ = ["Method", "Protocol", "Tuned", "curves_of", "loss_after", "table_of", "tune"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Attributes:
        rule: the text form of a rule; ``{rate}`` in it is where the rate goes, and the optimizer's rate is 1 then.
        optimizer: the text form of an optimizer.
        rates: to choose from.
    """

    rule: str = "bp"
    optimizer: str
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rates:
            raise BackpassError(f"a method needs at least one rate, got none for {self.rule} with {self.optimizer}.")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one network is trained by all methods.

    Attributes:
        model: the text form of a network of the lab.
        source: of the images; some of them held out, to choose rates on.
        batch: images per step.
        marks: the numbers of steps after which the network is judged, ascending.
        judged: at most so many images of each part are judged; ``None``: all.
        seeds: how many runs at every rate.
        std: weights from N(0, std^2) with biases 0; ``None``: PyTorch's own initial weights.
        normalise: whether the images are standardised by channel.
    """

    model: str
    source: Source
    batch: int
    marks: tuple[int, ...]
    judged: int | None = None
    seeds: int = 3
    std: float | None = None
    normalise: bool = False


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The runs of a method.

    Attributes:
        rate: the chosen one.
        by_rate: the curves of every seed, by rate.
    """

    rate: float
    by_rate: Mapping[float, Sequence[Curves]]

    @property
    def runs(self) -> Sequence[Curves]:
        """At the chosen rate."""
        return self.by_rate[self.rate]

    def at(self, what: str, place: int) -> list[float]:
        """A curve's value at a mark, for every seed at the chosen rate."""
        return [one[what][place] for one in self.runs]


def tune(bench: Bench, protocol: Protocol, methods: Mapping[str, Method]) -> dict[str, Tuned]:
    """Run every method at every rate with every seed, and choose each method's rate.

    The chosen rate has the highest mean accuracy on the held-out images at the last mark, of the rates at which fewest
    runs diverged.

    Raises:
        BackpassError: the source holds no images out.
    """
    if not len(load_parts(protocol.source).held_out):
        raise BackpassError("rates are chosen on held-out images: the source must have held_out above 0.")
    found = {}
    for name, method in methods.items():
        by_rate = {
            rate: [curves(bench, _run(protocol, method, rate, seed), protocol.source) for seed in range(protocol.seeds)]
            for rate in method.rates
        }
        found[name] = Tuned(rate=max(by_rate, key=lambda rate: _merit(by_rate[rate])), by_rate=by_rate)
    return found


def _run(protocol: Protocol, method: Method, rate: float, seed: int) -> Run:
    run = Run(
        model=protocol.model,
        rule=method.rule,
        optimizer=method.optimizer,
        rate=rate,
        batch=protocol.batch,
        marks=protocol.marks,
        judged=protocol.judged,
        seed=seed,
        std=protocol.std,
        normalise=protocol.normalise,
    )
    if "{rate}" in method.rule:
        return replace(run, rule=method.rule.replace("{rate}", f"{rate:g}"), rate=1.0)
    return run


def _merit(runs: Sequence[Curves]) -> tuple[int, float]:
    kept = [one["held-out accuracy"][-1] for one in runs if math.isfinite(one["train loss"][-1])]
    return len(kept) - len(runs), math.fsum(kept) / max(len(kept), 1)


def loss_after(ours: Tuned, theirs: Tuned) -> tuple[list[float], list[float]]:
    """The training losses of both after the same seconds, pair by pair: those that the quicker of the two took.

    Between marks the logarithm of the loss is interpolated.
    """
    pairs = []
    for a, b in zip(ours.runs, theirs.runs, strict=True):
        seconds = min(a["seconds"][-1], b["seconds"][-1])
        pairs.append((_loss_at(a, seconds), _loss_at(b, seconds)))
    return [a for a, _ in pairs], [b for _, b in pairs]


def _loss_at(one: Curves, seconds: float) -> float:
    times, losses = one["seconds"], one["train loss"]
    if not math.isfinite(losses[-1]):
        return math.nan
    place = next((i for i, time in enumerate(times) if time >= seconds), len(times) - 1)
    if place == 0 or losses[place] <= 0 or losses[place - 1] <= 0:
        return losses[place]
    part = min(1.0, (seconds - times[place - 1]) / (times[place] - times[place - 1]))
    return math.exp((1 - part) * math.log(losses[place - 1]) + part * math.log(losses[place]))


def curves_of(name: str, what: str, tuned: Mapping[str, Tuned], marks: Sequence[int], *, by: str = "steps") -> Series:
    """A plot of all methods at their chosen rates.

    Args:
        name: of the network.
        what: which curve, for instance ``train loss``.
        tuned: the methods.
        marks: the numbers of steps.
        by: ``steps``, or ``seconds``, then at the mean seconds over the seeds.
    """
    label = what.replace("train", "training")
    loss = what.endswith("loss")
    lines = []
    for method, one in tuned.items():
        x: Sequence[float] = marks
        if by == "seconds":
            x = [mean_interval([run["seconds"][i] for run in one.runs]).mean for i in range(len(marks))]
            if not all(map(math.isfinite, x)):
                continue  # a run diverged, so there is no place for its points
        lines.append(Curve(label=f"{method}, {one.rate:g}", x=x, runs=[run[what] for run in one.runs], geometric=loss))
    return Series(
        id=f"{name}-{what}-{by}".lower().replace(" ", "-"),
        title=f"{name}: {label} against {by}",
        description=f"The {label} of {name} against {by}, by each method at its chosen rate.",
        x_label=by,
        y_label=label + (", nats" if loss else ", %"),
        curves=lines,
        log_y=loss,
    )


def table_of(name: str, tuned: Mapping[str, Tuned]) -> Table:
    """All rates of all methods, at the last mark."""
    rows: list[list[Cell]] = []
    for method, one in tuned.items():
        for rate, runs in one.by_rate.items():
            inside = min(one.by_rate) < rate < max(one.by_rate) or len(one.by_rate) == 1
            chosen = "" if rate != one.rate else "chosen" if inside else "chosen, at the edge"
            lost = sum(not math.isfinite(run["train loss"][-1]) for run in runs)
            last = ("train loss", "test accuracy", "held-out accuracy", "seconds")
            values = [mean_interval([run[what][-1] for run in runs]) for what in last]
            rows.append([method, rate, chosen, *values, f"{lost} of {len(runs)}"])
    return Table(
        id=f"{name}-rates".lower().replace(" ", "-"),
        title=f"{name}: every rate",
        columns=[
            "method",
            "rate",
            "",
            "training loss",
            "test accuracy, %",
            "held-out accuracy, %",
            "seconds",
            "diverged",
        ],
        rows=rows,
        note="At the last mark. A rate is chosen by its accuracy on training images of which nothing is learned. "
        "Seconds are those of the training steps alone: CPU seconds of the process on a CPU.",
    )
