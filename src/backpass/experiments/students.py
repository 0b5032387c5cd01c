"""Teacher-student simulations as arms: students that are attacked, and students that learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from backpass.experiments.experiment import Context, Outcome
from backpass.rules import parse_rule

__all__ = ["Attacked", "Taught", "attack_students", "teach_students"]


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """Settings of an attack on two-layer students; x has d entries, the hidden layer m, the output k.

    Attributes:
        rule: text form; its backward pass gives the gradient.
        norm: ``none``, ``l2`` to scale the gradient to norm 1, or ``sign``.
        step: multiplies the gradient.
        runs: number of draws of networks and examples.
        steps: updates of each run.
        eps: radius of the l_inf ball around the start.
        widths: d, m and k.
    """

    rule: str
    norm: str = "none"
    step: float = 1e-3
    runs: int = 500
    steps: int = 100
    eps: float = 0.25
    widths: tuple[int, int, int] = (100, 20, 10)


class TwoLayers(nn.Module):
    """R networks side by side: y = V relu(W x), with W (R, m, d) and V (R, k, m)."""

    def __init__(self, w: Tensor, v: Tensor) -> None:
        super().__init__()
        self.w, self.v = w, v

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, d) to (R, k)."""
        hidden = torch.relu(torch.einsum("rmd,rd->rm", self.w, x))
        return torch.einsum("rkm,rm->rk", self.v, hidden)


def attack_students(settings: Attacked, seed: int, context: Context) -> Outcome:
    r"""Descend :math:`\frac1{2d}|V\,\mathrm{relu}(Wx) - V\,\mathrm{relu}(Wx^\star)|^2` within the ball.

    W and V are standard normal, x* ~ N(1, 2^2), the start x0 ~ N(0, 1). The draws depend on sizes and seed only.

    Returns:
        For each draw, ``distance``, the l1 distances to x* after 0, 1, ... steps; ``loss``, d times the loss in the
        end; ``norm``, the gradient's l2 norm at the first step.
    """
    d, m, k = settings.widths
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w, v = draw(settings.runs, m, d).to(context.device), draw(settings.runs, k, m).to(context.device)
    best, start = (1 + 2 * draw(settings.runs, d)).to(context.device), draw(settings.runs, d).to(context.device)
    student = TwoLayers(w, v)
    with torch.no_grad():
        aim: Tensor = student(best)
    x, distances, norms = start, [(start - best).abs().sum(1)], []

    def losses(x: Tensor) -> Tensor:
        outputs: Tensor = student(x)
        return (outputs - aim).square().sum(1) / 2

    with parse_rule(settings.rule).attach(student):
        for _ in range(settings.steps):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(losses(x).sum() / d, x)
            norms.append(gradient.norm(dim=1))
            x = x.detach() - settings.step * _normalised(gradient, settings.norm)
            x = start + (x - start).clamp(-settings.eps, settings.eps)
            distances.append((x - best).abs().sum(1))
    return {"distance": torch.stack(distances, 1).tolist(), "loss": losses(x).tolist(), "norm": norms[0].tolist()}


def _normalised(gradient: Tensor, norm: str) -> Tensor:
    if norm == "l2":
        gradient = gradient / gradient.norm(dim=1, keepdim=True)
    return gradient.sign() if norm == "sign" else gradient


@dataclass(frozen=True, kw_only=True)
class Taught:
    """Settings of one-layer students that learn; the weights have d entries, a step sees n inputs.

    Attributes:
        rule: text form; its backward pass gives the gradient.
        norm: ``none``, or ``l2`` to scale the gradient to norm 1.
        step: multiplies the gradient.
        runs: number of draws of teacher, start and inputs.
        recorded: the steps after which distance and loss are recorded, in order; training ends with the last.
        early: number of first steps that count as early for the gradient's length.
        inputs: n.
        width: d.
    """

    rule: str
    norm: str = "none"
    step: float = 1e-3
    runs: int = 40
    recorded: tuple[int, ...] = (0, 10, 30, 100, 300, 1000, 2000, 3000, 5000, 7000, 10_000)
    early: int = 100
    inputs: int = 100
    width: int = 10


class OneLayer(nn.Module):
    """R students side by side: y = relu(X w), with w (R, d), and the records of their training."""

    def __init__(self, w: Tensor, rule: str) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())
        self.attached = parse_rule(rule).attach(self)
        self.distances: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.early = self.all = torch.zeros_like(w[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, n, d) to (R, n)."""
        return torch.relu(torch.einsum("rnd,rd->rn", x, self.w))

    def learn(self, losses: Tensor, settings: Taught, *, early: bool) -> None:
        """Take one step on losses (R,)."""
        (gradient,) = torch.autograd.grad(losses.sum(), self.w)
        length = gradient.abs().sum(1)
        self.all = self.all + length
        if early:
            self.early = self.early + length
        with torch.no_grad():
            self.w.sub_(_normalised(gradient, settings.norm), alpha=settings.step)


def teach_students(settings: Taught, seed: int, context: Context) -> Outcome:
    r"""Train on :math:`\frac1{2n}|\mathrm{relu}(Xw) - \mathrm{relu}(Xw^\star)|^2`, X standard normal, fresh each step.

    w* ~ N(1, 3^2), the start w0 ~ N(0, 1). The draws depend on sizes and seed only, but on CUDA the inputs differ from
    those on the CPU. Students of plain backpropagation learn beside them.

    Returns:
        For each draw, ``distance``, the l1 distances of w to w*, and ``loss``, n times the losses on that step's
        inputs, after the recorded steps; ``norm``, the mean l1 norms of the gradient over the early steps and over all;
        ``gain``, the logarithm of plain backpropagation's last distance over this one.
    """
    n, d, steps = settings.inputs, settings.width, settings.recorded[-1]
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best, start = (1 + 3 * draw(settings.runs, d)).to(context.device), draw(settings.runs, d).to(context.device)
    students = {rule: OneLayer(start, rule) for rule in dict.fromkeys(("bp", settings.rule))}
    inputs = torch.Generator(context.device).manual_seed(seed + 1)
    for step in range(steps + 1):
        x = torch.randn(settings.runs, n, d, generator=inputs, dtype=torch.float64, device=context.device)
        aim = torch.relu(torch.einsum("rnd,rd->rn", x, best))
        for student in students.values():
            loss = (student(x) - aim).square().sum(1) / 2
            if step in settings.recorded:
                student.distances.append((student.w.detach() - best).abs().sum(1))
                student.losses.append(loss.detach())
            if step < steps:
                student.learn(loss / n, settings, early=step < settings.early)
    ours, plain = students[settings.rule], students["bp"].distances[-1].tolist()
    return {
        "distance": torch.stack(ours.distances, 1).tolist(),
        "loss": torch.stack(ours.losses, 1).tolist(),
        "norm": torch.stack([ours.early / settings.early, ours.all / steps], 1).tolist(),
        "gain": [math.log(b / a) for a, b in zip(ours.distances[-1].tolist(), plain, strict=True)],
    }
