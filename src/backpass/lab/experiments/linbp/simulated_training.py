"""Figures 3 and 4: a one-layer student learns from a teacher, with fresh Gaussian inputs at every step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.experiments.linbp.draws import LABELS, PAPER, column
from backpass.report.claims import Claim, judge
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import mean_interval, paired_interval
from backpass.report.wording import interval_text
from backpass.rules import parse_rule

__all__ = ["EXPERIMENTS", "Training", "simulate"]

_PLAIN_STEP = 1e-3


@dataclass(frozen=True, kw_only=True)
class Training:
    """The simulation's settings; the weights have d entries, a step sees n inputs.

    Attributes:
        step: multiplies the gradient.
        unit: whether the gradient is scaled to l2 norm 1 first.
        runs: how often teacher, start and inputs are drawn.
        steps: updates of each run.
        recorded: the steps after which distance and loss are recorded.
        early: how many first steps count as early for the gradient's length.
        inputs: n.
        width: d.
        seed: of the draws.
    """

    step: float = _PLAIN_STEP
    unit: bool = False
    runs: int = 40
    steps: int = 10_000
    recorded: tuple[int, ...] = (0, 10, 30, 100, 300, 1000, 2000, 3000, 5000, 7000, 10_000)
    early: int = 100
    inputs: int = 100
    width: int = 10
    seed: int = 0


class Student(nn.Module):
    """R students side by side: y = relu(X w), with w (R, d)."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        """(R, n, d) to (R, n)."""
        return torch.relu(torch.einsum("rnd,rd->rn", x, self.w))


Found = dict[str, dict[str, list[list[float]]]]
"""By rule: ``distance`` and ``loss`` (R, recorded), ``norm`` (R, 2)."""


def simulate(settings: Training, device: torch.device) -> Found:
    r"""SGD on :math:`\frac1{2n}|\mathrm{relu}(Xw) - \mathrm{relu}(Xw^\star)|^2`, X standard normal and fresh each step.

    w* ~ N(1, 3^2), the start w0 ~ N(0, 1). All rules see the same teachers, starts and inputs.

    Args:
        settings: sizes and seed; the draws depend on nothing else, but on CUDA differ from those on the CPU.
        device: where to compute.

    Returns:
        By rule, the l1 distance of w to w* and the loss on that step's inputs, where they are recorded; and the mean l1
        norm of the gradient over the early steps, and over all.
    """
    n, d = settings.inputs, settings.width
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(settings.seed), dtype=torch.float64)
    best, start = (1 + 3 * draw(settings.runs, d)).to(device), draw(settings.runs, d).to(device)
    pupils = {rule: _Pupil(start, rule) for rule in LABELS}
    inputs = torch.Generator(device).manual_seed(settings.seed + 1)
    for step in range(settings.steps + 1):
        x = torch.randn(settings.runs, n, d, generator=inputs, dtype=torch.float64, device=device)
        aim = torch.relu(torch.einsum("rnd,rd->rn", x, best))
        for pupil in pupils.values():
            loss = (pupil.student(x) - aim).square().sum(1) / 2
            if step in settings.recorded:
                pupil.distances.append((pupil.student.w.detach() - best).abs().sum(1))
                pupil.losses.append(loss.detach())
            if step < settings.steps:
                pupil.learn(loss / n, settings, early=step < settings.early)
    return {rule: pupil.told(settings) for rule, pupil in pupils.items()}


class _Pupil:
    """The students of one rule, and what was recorded of them."""

    def __init__(self, start: Tensor, rule: str) -> None:
        self.student = Student(start.clone())
        self.attached = parse_rule(rule).attach(self.student)
        self.distances: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.early = torch.zeros_like(start[:, 0])
        self.all = torch.zeros_like(start[:, 0])

    def learn(self, losses: Tensor, settings: Training, *, early: bool) -> None:
        """One step on losses (R,)."""
        (gradient,) = torch.autograd.grad(losses.sum(), self.student.w)
        length = gradient.abs().sum(1)
        self.all += length
        if early:
            self.early += length
        if settings.unit:
            gradient = gradient / gradient.norm(dim=1, keepdim=True)
        with torch.no_grad():
            self.student.w.sub_(gradient, alpha=settings.step)

    def told(self, settings: Training) -> dict[str, list[list[float]]]:
        """What was recorded, as numbers."""
        norms = torch.stack([self.early / settings.early, self.all / settings.steps], 1)
        return {
            "distance": torch.stack(self.distances, 1).tolist(),
            "loss": torch.stack(self.losses, 1).tolist(),
            "norm": norms.tolist(),
        }


def _measure(settings: Training, bench: Bench) -> Outcome:
    found = _simulated(settings, bench)
    claims = _normalised_claims(settings, bench, found) if settings.unit else _plain_claims(settings, found)
    rows: list[list[Cell]] = [
        [LABELS[rule], *map(mean_interval, zip(*found[rule]["distance"], strict=True))] for rule in LABELS
    ]
    return Outcome(
        findings=[_finding(settings, found)],
        series=[
            _curves(settings, found, "distance", "Distance to the teacher", "l1 distance to w*"),
            _curves(settings, found, "loss", "Training loss", "half the squared error, summed over a step's inputs"),
        ],
        claims=claims,
        tables=[
            Table(
                id="distance",
                title="Distance to the teacher's weights",
                columns=["Gradients", *(f"after {step:,}" for step in _places(settings))],
                rows=rows,
                note=f"Means over {settings.runs} draws, with 95 % intervals.",
            )
        ],
        data=f"made: {settings.runs} draws of teachers, starts and inputs",
        seeds=[settings.seed],
        plots_note="Lines are means over the draws, bands their 95 % intervals.",
        claims_note="Every pair shares its teacher, its start and all its inputs; n counts the draws.",
    )


def _simulated(settings: Training, bench: Bench) -> Found:
    """Kept among the shared pieces: the second experiment compares itself with the first."""
    return bench.shared.value(
        f"teacher and student, {'unit' if settings.unit else 'plain'} steps",
        partial(simulate, settings, bench.device),
        **asdict(settings),
        device=bench.device.type,  # the inputs are drawn there
    )


def _places(settings: Training) -> tuple[int, ...]:
    return tuple(step for step in settings.recorded if step <= settings.steps)


def _plain_claims(settings: Training, found: Found) -> list[Claim]:
    ours, theirs = found["linbp"], found["bp"]
    places = _places(settings)
    made = []
    for step in (100, 1000, 5000, 10_000):
        if step not in places:
            continue
        made.append(
            judge(
                f"nearer-{step}",
                f"LinBP's weights are nearer to the teacher's after {step:,} steps",
                ours=column(ours["distance"], places.index(step)),
                theirs=column(theirs["distance"], places.index(step)),
                direction="lower",
                quantity="l1 distance to w*",
                reference=f"{PAPER}, Figure 3 and Theorem 2",
                published="nearer, in a plot",
            )
        )
        made.append(
            judge(
                f"loss-{step}",
                f"and the training loss is lower after {step:,} steps",
                ours=column(ours["loss"], places.index(step)),
                theirs=column(theirs["loss"], places.index(step)),
                direction="lower",
                quantity="loss on the step's inputs",
                reference=f"{PAPER}, Figure 3",
                published="lower, in words",
            )
        )
    for place, when in enumerate((f"over the first {settings.early} steps", "over all steps")):
        made.append(
            judge(
                f"longer-{'early' if place == 0 else 'all'}",
                f"LinBP's gradient is longer {when}",
                ours=column(ours["norm"], place),
                theirs=column(theirs["norm"], place),
                direction="higher",
                quantity="mean l1 norm of the gradient",
                reference=f"{PAPER}, section 4.1.2",
            )
        )
    return made


def _normalised_claims(settings: Training, bench: Bench, found: Found) -> list[Claim]:
    """With steps of one length: nearer in the end, and by how much less than without."""
    last = len(_places(settings)) - 1
    plain = _simulated(replace(settings, unit=False, step=_PLAIN_STEP), bench)

    def gains(of: Found) -> list[float]:
        ours, theirs = (column(of[rule]["distance"], last) for rule in ("linbp", "bp"))
        return [math.log(b / a) for a, b in zip(ours, theirs, strict=True)]

    return [
        judge(
            "nearer-unit",
            f"LinBP's weights are nearer to the teacher's after {settings.steps:,} steps of one length",
            ours=column(found["linbp"]["distance"], last),
            theirs=column(found["bp"]["distance"], last),
            direction="lower",
            quantity="l1 distance to w*",
            reference=f"{PAPER}, Figure 4",
        ),
        judge(
            "smaller-gain",
            "the gain is smaller than without normalisation",
            ours=gains(found),
            theirs=gains(plain),
            direction="lower",
            quantity="log of BP's distance over LinBP's",
            reference=f"{PAPER}, section 4.1.2",
            published="drops a lot, in words",
        ),
    ]


def _curves(settings: Training, found: Found, what: str, title: str, y_label: str) -> Series:
    return Series(
        id=what,
        title=title,
        description=f"Mean over {settings.runs} draws, against the number of steps.",
        x_label="steps",
        y_label=y_label,
        curves=[
            Curve(
                label=LABELS[rule],
                x=_places(settings),
                runs=found[rule][what],
            )
            for rule in LABELS
        ],
        log_y=True,
    )


def _finding(settings: Training, found: Found) -> Finding:
    ours, theirs = (column(found[rule]["distance"], -1) for rule in ("linbp", "bp"))
    nearer = 100 * sum(map(float.__lt__, ours, theirs)) / len(ours)
    early, overall = (
        mean_interval(
            [100 * (a[place] / b[place] - 1) for a, b in zip(found["linbp"]["norm"], found["bp"]["norm"], strict=True)]
        )
        for place in (0, 1)
    )
    return Finding(
        "Steps of one length" if settings.unit else "Plain steps",
        f"After {settings.steps:,} steps LinBP is nearer to the teacher in {nearer:.0f} % of the draws, by "
        f"{interval_text(paired_interval(ours, theirs), signed=True)} on average; BP's distance is then "
        f"{interval_text(mean_interval(theirs))}. LinBP's gradient is longer by {interval_text(early, signed=True)} % "
        f"over the first {settings.early} steps, and by {interval_text(overall, signed=True)} % over all (l1 norm).",
    )


_QUESTION = (
    "A student y = relu(X w) learns a teacher's weights w* by SGD on half the mean squared error, with fresh standard "
    "normal inputs at every step; w* is drawn from N(1, 9) and the start from N(0, 1), 10 weights each. Both rules see "
    "the same teachers, starts and inputs. "
)

EXPERIMENTS = (
    Experiment(
        name="linbp-fig3",
        title="Does LinBP teach a one-layer network faster?",
        question=_QUESTION + "The step is 0.001 times the gradient.",
        source=f"{PAPER}, Figure 3, Theorem 2",
        scales={"small": Training(), "paper": Training(runs=200)},
        measure=_measure,
    ),
    Experiment(
        name="linbp-fig4",
        title="Does it still, when the steps have equal length?",
        question=_QUESTION + "Every gradient is scaled to l2 norm 1; the step is 0.0015.",
        source=f"{PAPER}, Figure 4",
        scales={"small": Training(step=0.0015, unit=True), "paper": Training(step=0.0015, unit=True, runs=200)},
        measure=_measure,
    ),
)
