"""Gradients of the two halves of a batch, and the curvature along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from backpass.errors import BackpassError
from backpass.preserved import preserved
from backpass.rules import attachments, unwrap
from backpass.sde import InnerLoop
from backpass.sde.derivative import value_and_along
from backpass.training.batches import Batch
from backpass.training.objective import Evaluated
from backpass.training.processes import summed, world

__all__ = ["AttackedHalf", "Measuring", "Products", "half_losses", "halves", "products"]


@runtime_checkable
class Measuring(Protocol):
    """Scheduler that measures the objective before a step.

    Attributes:
        due: True if the next step needs a measurement.

    A true optional attribute ``frozen_curvature`` accepts the curvature at fixed adversarial examples
    where they move with the parameters.
    """

    due: bool

    def measure(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Measure the objective on halves of the batch."""


class Products(NamedTuple):
    """Vectors over all parameters, in float32 at least, means over all processes.

    Attributes:
        first: gradient g1 of the first half.
        second: gradient g2 of the second half.
        curved: H2 (w g1 + scale d), the second half's curvature along the first half's step and a direction d; of an
            `AttackedHalf` through its adversary, otherwise of the loss as it is.
        scale: |w g1| / |d|, 0 where d is 0.
    """

    first: Tensor
    second: Tensor
    curved: Tensor
    scale: float


def half_losses(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    adversary: InnerLoop | None = None,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return the two functions that `ControlledLR.measure` takes: loss(model(x), y) on each half of a batch.

    Running statistics and random numbers are restored. Rules attached to the model are suspended: the plain loss is
    measured, and `ProxProp(solve="step")` collects nothing from it.

    With an adversary the gradient is d/dtheta loss(model(x + delta), y) at fixed delta = delta_K(theta, x), and its
    derivative includes that of delta: D g = d^2 L / dtheta^2 + d^2 L / (dtheta dx) d delta / dtheta, by forward-mode
    differentiation through the K steps. x must be clean then. A measurement computes the perturbations of both halves
    and costs as much as 3 to 6 training steps of K + 1 gradients, less on large batches. The derivative of sign steps
    is 0 almost everywhere.

    Args:
        model: in its training mode; wrappers for compilation or several processes are removed.
        loss: of the output and y, a scalar mean.
        x: (B, ...), B >= 2.
        y: (B, ...).
        adversary: the inner loop of adversarial training, on each sample's own loss; None for plain training. With
            adversarial examples as x and no adversary, the curvature is that at frozen perturbations, which can be
            several times too small.

    Raises:
        BackpassError: the batch cannot be halved.
    """
    if not all(isinstance(one, Tensor) and one.dim() for one in (x, y)) or len(x) < 2 or len(x) != len(y):
        got = " and ".join(str(tuple(one.shape)) if isinstance(one, Tensor) else type(one).__name__ for one in (x, y))
        raise BackpassError(f"a batch of at least 2 samples with as many labels is needed, got {got}.")
    if adversary is not None and not isinstance(adversary, InnerLoop):
        raise BackpassError(
            f"adversary must be an InnerLoop, for instance InnerLoop(steps=3, eta=0.1), or None; got {adversary!r}."
        )
    if adversary is None:
        return _on_halves(model, len(x), lambda inner, rows: loss(inner(x[rows]), y[rows]))
    first, second = (AttackedHalf(unwrap(model), loss, x[rows], y[rows], adversary) for rows in _halves(len(x)))
    return first, second


def halves(
    evaluated: Evaluated,
    batch: Batch,
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    frozen_curvature: bool = False,
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return two functions, each the scalar objective on one half of this process's batch, with graph.

    Adversarial examples are reused; rules are suspended; running statistics and random numbers are
    restored.

    Raises:
        BackpassError: the objective cannot be evaluated again, its examples move with the parameters, or there is no
            second half.
    """
    again = evaluated.again
    if again is None:
        raise BackpassError(
            "this scheduler measures on halves of a batch, so the objective has to give Evaluated(again=...), a "
            "function (model, rows) -> the mean loss on some rows of the batch."
        )
    if evaluated.moves and not frozen_curvature:
        raise BackpassError(
            "the adversarial examples of this objective move with the parameters: the curvature at fixed examples is "
            "not that of training, and the trainer cannot differentiate through the attack. Use an l_inf attack, whose "
            "steps are signs; or a loop with half_losses(model, loss, x, y, adversary=InnerLoop(...)); or accept the "
            "difference by ControlledLR(..., frozen_curvature=True)."
        )
    if len(batch) < 2:
        raise BackpassError("this scheduler measures on halves of a batch: batch_size must be at least 2 per process.")

    def evaluate(inner: nn.Module, rows: slice) -> Tensor:
        with autocast():
            return again(inner, rows)

    return _on_halves(model, len(batch), evaluate)


@dataclass(frozen=True, eq=False)
class AttackedHalf:
    """Loss on half of a batch under an adversary, and the curvature through the adversary.

    Args:
        model: without wrappers.
        loss: of the output and y, a scalar mean.
        x: clean samples.
        y: their labels.
        adversary: the inner loop.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    adversary: InnerLoop

    def __call__(self) -> Tensor:
        """Return the scalar loss at the perturbations for the current parameters, with graph."""
        with _plain(self.model), _without_running_statistics(self.model):
            parameters: dict[str, Tensor] = dict(self.model.named_parameters())
            at = self._attacked({name: p.detach() for name, p in parameters.items()})
            return self._mean(parameters, at)

    def product(self, along: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradient and its derivative along a direction, through the adversary, by one jvp.

        Args:
            along: pairs of a parameter and the direction's part in it, in the order of the results.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        moved = {names[id(p)]: (p.detach(), step) for p, step in along if id(p) in names}
        fixed = {name: p.detach() for name, p in self.model.named_parameters() if name not in moved}

        def field(*values: Tensor) -> tuple[Tensor, ...]:
            parameters = dict(zip(moved, values, strict=True))
            at = self._attacked({**fixed, **parameters})
            slopes: dict[str, Tensor] = grad(lambda inner: self._mean({**fixed, **inner}, at))(parameters)
            return tuple(slopes.values())

        with _plain(self.model), _without_running_statistics(self.model):
            primals, tangents = zip(*moved.values(), strict=True)
            found = value_and_along(field, primals, tangents)
        gradients, products = (dict(zip(moved, part, strict=True)) for part in found)
        return (
            [gradients[names[id(p)]] if id(p) in names else torch.zeros_like(p) for p, _ in along],
            [products[names[id(p)]] if id(p) in names else torch.zeros_like(p) for p, _ in along],
        )

    def _mean(self, parameters: dict[str, Tensor], at: Tensor) -> Tensor:
        value = self.loss(functional_call(self.model, parameters, (at,)), self.y)
        return _scalar(value)

    def _attacked(self, parameters: dict[str, Tensor]) -> Tensor:
        count = len(self.x)
        ascent = grad(lambda delta: count * self._mean(parameters, self.x + delta))
        return self.x + self.adversary.run(ascent, self.x)


def _halves(count: int) -> tuple[slice, slice]:
    return slice(0, count // 2), slice(count // 2, count)


def _on_halves(
    model: nn.Module, count: int, evaluate: Callable[[nn.Module, slice], Tensor]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return functions that call ``evaluate(model, rows)`` on the halves of ``count`` samples, without rules.

    The model is called without its wrappers: a schedule may differentiate twice, which compiled code cannot.
    """
    inner = unwrap(model)

    def on(rows: slice) -> Callable[[], Tensor]:
        def evaluated() -> Tensor:
            with _plain(inner):
                return evaluate(inner, rows)

        return evaluated

    first, second = map(on, _halves(count))
    return first, second


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Suspend the model's rules; restore its buffers and the generators."""
    with ExitStack() as stack:
        stack.enter_context(preserved(model, training=None, grad=None, graph=True))
        for attached in attachments(model):
            stack.enter_context(attached.suspended())
        yield


@contextmanager
def _without_running_statistics(model: nn.Module) -> Iterator[None]:
    """Remove running statistics, which `torch.func` cannot update, from normalisation layers in training mode."""
    layers = [one for one in model.modules() if one.training and "running_mean" in one._buffers]
    kept = [dict(layer._buffers) for layer in layers]
    for layer in layers:
        layer._buffers.update(dict.fromkeys(layer._buffers))
    try:
        yield
    finally:
        for layer, buffers in zip(layers, kept, strict=True):
            layer._buffers.update(buffers)


def products(
    parameters: Sequence[Tensor], losses: Sequence[Callable[[], Tensor]], metric: Tensor, direction: Tensor
) -> Products:
    """Compute two gradients and one curvature product, by differentiating the second half twice.

    The halves are independent, so g1 . g2 is an unbiased |grad|^2, and g1 . H2 g1 an unbiased grad . H grad +
    tr(H Cov g1). The curvature of a batch along its own gradient is not: each sample's gradient points where that
    sample's own curvature is large; in a perceptron on MNIST that makes it 14 times too large.

    Args:
        parameters: all of them, on one device; those that are frozen count as zeros.
        losses: each the scalar mean over one half, with graph.
        metric: w, a vector over all parameters.
        direction: d, likewise.

    Raises:
        BackpassError: a loss is no scalar.
    """
    wanted = [p for p in parameters if p.requires_grad]
    through = losses[1] if isinstance(losses[1], AttackedHalf) else None
    with torch.enable_grad():
        first = _vector(_gradients(losses[0](), wanted, twice=False), parameters)
        half = () if through else _gradients(losses[1](), wanted, twice=True)
    moved, length = metric * first, float(direction.norm())
    scale = float(moved.norm()) / length if length > 0 else 0.0
    parts = torch.split(torch.add(moved, direction, alpha=scale), [p.numel() for p in parameters])
    step = [part.view_as(p).to(p.dtype) for part, p in zip(parts, parameters, strict=True) if p.requires_grad]
    if through is not None:
        gradients, curved_along = through.product(list(zip(wanted, step, strict=True)))
        return Products(first, _vector(gradients, parameters), _vector(curved_along, parameters), scale)
    # A gradient that does not depend on the parameters has no graph, and no curvature.
    curved_ones = [(g, s) for g, s in zip(half, step, strict=True) if g.requires_grad]
    if curved_ones:
        outputs, seeds = zip(*curved_ones, strict=True)
        curved = torch.autograd.grad(outputs, wanted, seeds, materialize_grads=True)
    else:
        curved = tuple(torch.zeros_like(p) for p in wanted)
    return Products(first, _vector(half, parameters), _vector(curved, parameters), scale)


def _gradients(loss: Tensor, wanted: Sequence[Tensor], *, twice: bool) -> tuple[Tensor, ...]:
    loss = _scalar(loss)
    if not loss.requires_grad:
        raise BackpassError("each half's loss depends differentiably on the parameters; this one has no graph.")
    return torch.autograd.grad(loss, wanted, create_graph=twice, materialize_grads=True)


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BackpassError(f"each half's loss must be a scalar, the mean over it; got {got}.")
    return loss.reshape(())


@torch.no_grad()
def _vector(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return one vector over all parameters, averaged over processes, with zeros for frozen parameters."""
    left = iter(gradients)
    placed = [next(left) if p.requires_grad else torch.zeros_like(p) for p in parameters]
    vector = torch.cat([g.reshape(-1).to(torch.promote_types(g.dtype, torch.float32)) for g in placed])
    return summed(vector) / world()
