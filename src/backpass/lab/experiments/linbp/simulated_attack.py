"""Figures 1 and 2: an attack on a two-layer student, whose best adversarial example the teacher gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backpass.lab.bench.experiment import Bench, Experiment, Outcome
from backpass.lab.experiments.linbp.draws import LABELS, PAPER, column
from backpass.report.claims import Claim, judge
from backpass.report.result import Cell, Curve, Finding, Series, Table
from backpass.report.statistics import Interval, mean_interval, paired_interval
from backpass.report.wording import interval_text
from backpass.rules import Rule, parse_rule

__all__ = ["EXPERIMENTS", "Attack", "Update", "simulate"]


@dataclass(frozen=True, kw_only=True)
class Update:
    """A way to turn a gradient into a step.

    Attributes:
        norm: ``none``, ``l2`` or ``sign``.
        step: the length that multiplies it.
    """

    norm: str
    step: float

    def __call__(self, gradient: Tensor) -> Tensor:
        """The step (R, d) against a gradient (R, d)."""
        if self.norm == "l2":
            gradient = gradient / gradient.norm(dim=1, keepdim=True)
        elif self.norm == "sign":
            gradient = gradient.sign()
        return -self.step * gradient


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The simulation's settings; x has d entries, the hidden layer m, the output k.

    Attributes:
        updates: by name, how a gradient becomes a step.
        runs: how often the networks and the two examples are drawn.
        steps: updates of each run.
        eps: radius of the l_inf ball around the start.
        widths: d, m and k.
        seed: of the draws.
    """

    updates: dict[str, Update]
    runs: int = 500
    steps: int = 100
    eps: float = 0.25
    widths: tuple[int, int, int] = (100, 20, 10)
    seed: int = 0


class Student(nn.Module):
    """R networks side by side: y = V relu(W x), with W (R, m, d) and V (R, k, m)."""

    def __init__(self, w: Tensor, v: Tensor) -> None:
        super().__init__()
        self.w, self.v = w, v

    def forward(self, x: Tensor) -> Tensor:
        """(R, d) to (R, k)."""
        hidden = torch.relu(torch.einsum("rmd,rd->rm", self.w, x))
        return torch.einsum("rkm,rm->rk", self.v, hidden)


def simulate(settings: Attack, rule: Rule, update: Update, device: torch.device) -> dict[str, list[list[float]]]:
    r"""Descends :math:`\frac1{2d}|V\,\mathrm{relu}(Wx) - V\,\mathrm{relu}(Wx^\star)|^2` within the ball.

    W and V are standard normal, x* ~ N(1, 2^2), the start x0 ~ N(0, 1).

    Args:
        settings: sizes and seed; the draws depend on nothing else.
        rule: its backward gives the gradient.
        update: from gradient to step.
        device: where to compute.

    Returns:
        ``distance`` (R, steps + 1), the mean absolute distance of the entries to x* times d; ``loss`` alike; ``norm``
        (R, steps), the gradient's l2 norm at each step.
    """
    d, m, k = settings.widths
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(settings.seed), dtype=torch.float64)
    w, v = draw(settings.runs, m, d).to(device), draw(settings.runs, k, m).to(device)
    best, start = (1 + 2 * draw(settings.runs, d)).to(device), draw(settings.runs, d).to(device)
    student = Student(w, v)
    with torch.no_grad():
        aim = student(best)
    x = start
    distances, losses, norms = [], [], []
    with rule.attach(student):
        for step in range(settings.steps + 1):
            x = x.detach().requires_grad_()
            loss = (student(x) - aim).square().sum(1) / 2
            distances.append((x.detach() - best).abs().sum(1))
            losses.append(loss.detach())
            if step < settings.steps:
                (gradient,) = torch.autograd.grad(loss.sum() / d, x)
                norms.append(gradient.norm(dim=1))
                x = start + (x.detach() + update(gradient) - start).clamp(-settings.eps, settings.eps)
    found = {"distance": distances, "loss": losses, "norm": norms}
    return {name: torch.stack(values, 1).tolist() for name, values in found.items()}


def _measure(settings: Attack, bench: Bench) -> Outcome:
    claims: list[Claim] = []
    series: list[Series] = []
    rows: list[list[Cell]] = []
    findings: list[Finding] = []
    for name, update in settings.updates.items():
        found = {
            rule: bench.pieces.value(
                f"{name} update, {rule}",
                partial(simulate, settings, parse_rule(rule), update, bench.device),
                rule=rule,
                norm=update.norm,
                step=update.step,
                runs=settings.runs,
                steps=settings.steps,
                eps=settings.eps,
                widths=settings.widths,
                seed=settings.seed,
            )
            for rule in LABELS
        }
        claims += _claims(name, update, settings, found)
        series.append(_curves(name, settings, found))
        for rule in LABELS:
            at = [column(found[rule]["distance"], step) for step in (0, 10, settings.steps // 2, settings.steps)]
            last = mean_interval(column(found[rule]["loss"], settings.steps))
            rows.append([f"{name}, {LABELS[rule]}", *map(mean_interval, at), last])
        findings.append(_finding(name, settings, found))
    return Outcome(
        findings=findings,
        series=series,
        claims=claims,
        tables=[
            Table(
                id="distance",
                title="Distance to the teacher's adversarial example, and loss",
                columns=[
                    "Update and gradients",
                    *(f"distance after {n}" for n in (0, 10, settings.steps // 2, settings.steps)),
                    f"loss after {settings.steps}",
                ],
                rows=rows,
                note=f"Means over {settings.runs} draws, with 95 % intervals.",
            )
        ],
        data=f"made: {settings.runs} draws of networks and examples",
        seeds=[settings.seed],
        plots_note="Lines are means over the draws, bands their 95 % intervals.",
        claims_note="Every pair shares its networks, its start and its aim; n counts the draws.",
    )


def _claims(name: str, update: Update, settings: Attack, found: dict[str, dict[str, Any]]) -> list[Claim]:
    ours, theirs = found["linbp"], found["bp"]
    figure = "Figure 1" if update.norm == "none" else "Figure 2"
    made = [
        judge(
            f"nearer-{name}-{step}",
            f"LinBP's example is nearer to the best one after {step} steps ({name} update)",
            ours=column(ours["distance"], step),
            theirs=column(theirs["distance"], step),
            direction="lower",
            quantity="l1 distance to x*",
            reference=f"{PAPER}, {figure} and Theorem 1",
            published="nearer, in a plot",
        )
        for step in ((10, settings.steps // 2, settings.steps) if update.norm == "none" else (settings.steps,))
    ]
    made.append(
        judge(
            f"loss-{name}",
            f"and it has the lower loss, so that it is the stronger attack ({name} update)",
            ours=column(ours["loss"], settings.steps),
            theirs=column(theirs["loss"], settings.steps),
            direction="lower",
            quantity="loss, half the squared distance of the outputs",
            reference=f"{PAPER}, section 4.1.1: \N{LEFT DOUBLE QUOTATION MARK}more powerful adversarial "
            "examples\N{RIGHT DOUBLE QUOTATION MARK}",
        )
    )
    if update.norm == "none":
        made.append(
            judge(
                "longer-first",
                "LinBP's gradient is longer at the first step",
                ours=column(ours["norm"], 0),
                theirs=column(theirs["norm"], 0),
                direction="higher",
                quantity="l2 norm of the gradient",
                reference=f"{PAPER}, section 4.1.1",
            )
        )
    return made


def _curves(name: str, settings: Attack, found: dict[str, dict[str, Any]]) -> Series:
    return Series(
        id=name,
        title=f"Distance to the best example, {name} update",
        description=f"Mean l1 distance to x* over {settings.runs} draws, against the number of steps.",
        x_label="steps",
        y_label="l1 distance to x*",
        curves=[
            Curve(
                label=LABELS[rule],
                x=range(settings.steps + 1),
                # Every step of every draw would be megabytes.
                given=[mean_interval(values) for values in zip(*found[rule]["distance"], strict=True)],
            )
            for rule in LABELS
        ],
    )


def _finding(name: str, settings: Attack, found: dict[str, dict[str, Any]]) -> Finding:
    def compared(what: str) -> tuple[Interval, float]:
        ours, theirs = (column(found[rule][what], settings.steps) for rule in ("linbp", "bp"))
        return paired_interval(ours, theirs), 100 * sum(map(float.__lt__, ours, theirs)) / len(ours)

    distance, nearer = compared("distance")
    loss, lower = compared("loss")
    start = mean_interval(column(found["bp"]["distance"], 0)).mean
    return Finding(
        f"The {name} update",
        f"After {settings.steps} steps LinBP's example is nearer to the best one in {nearer:.0f} % of the draws, by "
        f"{interval_text(distance, signed=True)} on average, of a distance of about {start:.0f} at the start. Its loss "
        f"is lower in {lower:.0f} % of the draws; the difference is {interval_text(loss, signed=True)}. To be nearer "
        "to the teacher's example and to fool the student are not the same thing.",
    )


_PLAIN = {"plain": Update(norm="none", step=1e-3)}
_NORMALISED = {"l2": Update(norm="l2", step=0.05), "sign": Update(norm="sign", step=0.005)}
_QUESTION = (
    "A student network y = V relu(W x) with random weights is attacked: gradient descent moves an example from x0 "
    "towards the output that the student has at x*, inside an l_inf ball of radius 0.25. Both rules see the same "
    "networks, starts and aims. "
)

EXPERIMENTS = (
    Experiment(
        name="linbp-fig1",
        title="Does LinBP attack a two-layer network faster?",
        question=_QUESTION + "The step is 0.001 times the gradient.",
        source=f"{PAPER}, Figure 1, Theorem 1",
        scales={"small": Attack(updates=_PLAIN), "paper": Attack(updates=_PLAIN, runs=2000)},
        measure=_measure,
    ),
    Experiment(
        name="linbp-fig2",
        title="Does it still, when the steps have equal length?",
        question=_QUESTION + "The gradient is scaled to l2 norm 1, or replaced by its sign.",
        source=f"{PAPER}, Figure 2",
        scales={"small": Attack(updates=_NORMALISED), "paper": Attack(updates=_NORMALISED, runs=2000)},
        measure=_measure,
    ),
)
