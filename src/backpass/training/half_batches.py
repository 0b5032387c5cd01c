"""Gradients of the two halves of a batch, and the curvature along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.rules import attachments, unwrap
from backpass.training.objective import Evaluated
from backpass.training.processes import summed, world

__all__ = ["Measuring", "Products", "half_losses", "halves", "products"]


@runtime_checkable
class Measuring(Protocol):
    """Scheduler that measures the objective before a step.

    Attributes:
        due: measure before the next step.
    """

    due: bool

    def measure(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Measure the objective on halves of the batch."""


class Products(NamedTuple):
    """Vectors over all parameters, in float32 at least, means over all processes.

    Attributes:
        first: g1, the gradient of the first half.
        second: g2, the gradient of the second half.
        gradient: g = (g1 + g2) / 2.
        curved: (Dg2) (w g1), the second half's curvature along the first half's step.
    """

    first: Tensor
    second: Tensor
    gradient: Tensor
    curved: Tensor


def half_losses(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return the two functions that `ControlledLR.measure` takes: loss(model(x), y) on each half of a batch.

    Running statistics and generators are restored. Rules in force on the model are suspended, so the loss itself is
    measured, and nothing is added to what `ProxProp(solve="step")` collects for the step.

    Args:
        model: model in training mode; wrappers for compilation or several processes are removed.
        loss: (output, y) -> scalar mean.
        x: (B, ...), B >= 2; adversarial examples for adversarial training.
        y: (B, ...).

    Raises:
        BackpassError: the batch cannot be halved.
    """
    if not all(isinstance(one, Tensor) and one.dim() for one in (x, y)) or len(x) < 2 or len(x) != len(y):
        got = " and ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else type(one).__name__ for one in (x, y))
        raise BackpassError(f"a batch of at least 2 samples with as many labels is needed, got {got}.")

    inner = unwrap(model)
    return _on_halves(inner, len(x), lambda rows: loss(inner(x[rows]), y[rows]))


def halves(
    evaluated: Evaluated, count: int, model: nn.Module, autocast: Callable[[], AbstractContextManager[object]]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return two functions, each the scalar objective on one half of this process's batch, with graph.

    Adversarial examples stay fixed, rules are suspended, and running statistics and generators are restored.

    Raises:
        BackpassError: the objective cannot be evaluated again, or there is no second half.
    """
    again = evaluated.again
    if again is None:
        raise BackpassError(
            "this scheduler measures on halves of a batch, so the objective has to return Evaluated(again=...), a "
            "function (model, rows) -> the mean loss on some rows of the batch."
        )
    if count < 2:
        raise BackpassError("this scheduler measures on halves of a batch: batch_size must be at least 2 per process.")
    inner = unwrap(model)  # a schedule may differentiate twice, which compiled code cannot

    def evaluate(rows: slice) -> Tensor:
        with autocast():
            return again(inner, rows)

    return _on_halves(inner, count, evaluate)


def _on_halves(
    model: nn.Module, count: int, evaluate: Callable[[slice], Tensor]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    def on(rows: slice) -> Callable[[], Tensor]:
        def evaluated() -> Tensor:
            with ExitStack() as stack:
                stack.enter_context(preserved(model, training=None, grad=None, graph=True))
                for attached in attachments(model):
                    stack.enter_context(attached.suspended())
                return evaluate(rows)

        return evaluated

    middle = count // 2
    return on(slice(0, middle)), on(slice(middle, count))


def products(
    parameters: Sequence[Tensor], losses: Sequence[Callable[[], Tensor]], weights: Sequence[Tensor]
) -> Products:
    """Return two gradients and one curvature product, by differentiating the second half twice.

    The halves are independent, so g1 . g2 is an unbiased |grad|^2, and g1 . H2 g1 an unbiased grad . H grad +
    tr(H Cov g1). The curvature of a batch along its own gradient is not: each sample's gradient points where that
    sample's own curvature is large; in a perceptron on MNIST that makes it 14 times too large.

    Args:
        parameters: all parameters, on one device; frozen ones count as zeros.
        losses: functions that return the scalar mean over one half, with graph.
        weights: w, one tensor per parameter, of its shape or a number.

    Raises:
        BackpassError: a loss is no scalar.
    """
    wanted = [p for p in parameters if p.requires_grad]
    with torch.enable_grad():
        first = _vector(_gradients(losses[0](), wanted, twice=False), parameters)
        half = _gradients(losses[1](), wanted, twice=True)
    second = _vector(half, parameters)
    parts = torch.split(first, [p.numel() for p in parameters])
    step = [
        (w * part.view_as(p)).to(p.dtype)
        for w, part, p in zip(weights, parts, parameters, strict=True)
        if p.requires_grad
    ]
    # A gradient that does not depend on the parameters has no graph, and no curvature.
    curved_ones = [(g, s) for g, s in zip(half, step, strict=True) if g.requires_grad]
    if curved_ones:
        outputs, seeds = zip(*curved_ones, strict=True)
        curved = torch.autograd.grad(outputs, wanted, seeds, materialize_grads=True)
    else:
        curved = tuple(torch.zeros_like(p) for p in wanted)
    return Products(first, second, (first + second) / 2, _vector(curved, parameters))


def _gradients(loss: Tensor, wanted: Sequence[Tensor], *, twice: bool) -> tuple[Tensor, ...]:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BackpassError(f"each half's loss is a scalar, the mean over it; got {got}.")
    if not loss.requires_grad:
        raise BackpassError("each half's loss depends differentiably on the parameters; this one has no graph.")
    return torch.autograd.grad(loss.reshape(()), wanted, create_graph=twice, materialize_grads=True)


@torch.no_grad()
def _vector(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return one vector over all parameters, zero for frozen ones, the mean over the processes."""
    left = iter(gradients)
    placed = [next(left) if p.requires_grad else torch.zeros_like(p) for p in parameters]
    vector = torch.cat([g.reshape(-1).to(torch.promote_types(g.dtype, torch.float32)) for g in placed])
    return summed(vector) / world()
