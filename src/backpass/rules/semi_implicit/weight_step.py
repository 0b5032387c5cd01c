"""Weight step of semi-implicit back propagation (Liu & Zhang 2020, arXiv 2002.03516).

A layer z = A w, y = s(z) gets the gradient g at y. With the targets T = y - eta g, its step is, per unit,
argmin_d |s(z + A d) - T|^2 + lam |d|^2,
with lam_bias for the bias entry of d. The increment d is the unknown, not w + d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from backpass.rules.semi_implicit.elementwise import Elementwise
from backpass.rules.semi_implicit.unit_systems import UnitSystem

if TYPE_CHECKING:
    from backpass.rules.sibp import SIBP

__all__ = ["Curved", "increment"]


class Curved(NamedTuple):
    """Activation at a layer's output.

    Attributes:
        s: the activation.
        z: the layer's output.
        grad: g, the gradient at s(z).
    """

    s: Elementwise
    z: Tensor
    grad: Tensor


def increment(
    system: UnitSystem,
    of_z: Tensor,
    weighting: Tensor | None,
    curved: Curved | None,
    scale: float,
    step: SIBP,
) -> Tensor:
    """Return the increments d of all units.

    With D = diag s'(z) a Gauss-Newton step from d = 0 solves (A^T D^2 A + lam I) d = -eta A^T D g.

    Args:
        system: A and the coordinates of d.
        of_z: D g, in the arrangement of `UnitSystem.arrange`, like the other tensors.
        weighting: diagonal of D^2, overwritten; None for the identity, which needs one direct solve.
        curved: the activation; None for the identity.
        scale: eta for the given scaling of the loss, so that -eta D g = -scale * ``of_z``.
        step: the rule; its ``eta`` is not used.

    Returns:
        d in the system's coordinates.
    """
    if weighting is None:
        return system.solve(of_z * -scale, step.lam)
    descents = 0 if curved is None else _descents(curved.s, step)
    iterations = [step.cg_steps] * (step.newton_steps - 1) + [step.cg_steps - descents]
    right = system.adjoint(of_z * (-scale / step.lam))
    found = _conjugate_gradients(system, weighting.div_(step.lam), right, iterations[0])
    if curved is None or (step.newton_steps == 1 and not step.descent_steps):
        return found
    targets = curved.s.value(curved.z).sub_(curved.grad, alpha=scale)
    if step.newton_steps > 1:
        found *= _length(system, curved, targets, torch.zeros_like(found), found, step.lam)
    for steps in iterations[1:]:
        moved = curved.z + system.apply(found)
        slope = curved.s.derivative(moved)
        right = system.adjoint((slope * (curved.s.value(moved) - targets)).div_(-step.lam)).sub_(found)
        further = _conjugate_gradients(system, slope.square().div_(step.lam), right, steps)
        found += further.mul_(_length(system, curved, targets, found, further, step.lam))
    if step.descent_steps:
        _descend(system, curved, targets, found, scale, step)
    return found


def _descents(s: Elementwise, step: SIBP) -> int:
    """Return the number of descent iterations on the sub-problem itself; the first one is always Gauss-Newton."""
    return min(step.descent_steps, step.cg_steps - 1) if s.has_kinks else 0


def _descend(system: UnitSystem, curved: Curved, targets: Tensor, found: Tensor, scale: float, step: SIBP) -> None:
    """Reject ``found`` for units whose objective it raises, then take steepest-descent steps on the sub-problem.

    The Gauss-Newton model ignores the kinks that A d crosses. For distant targets it can overshoot without bound, which
    over several layers makes a network diverge. Each further step minimises the Gauss-Newton model along the gradient
    at the present point of the unit, and is taken if it does not raise the objective.
    """
    s, lam, at = curved.s, step.lam, system.apply(found)
    descents = _descents(s, step)
    moved = curved.z + at
    misfit = s.value(moved).sub_(targets)
    before = system.square(misfit) / lam
    helps = before + system.inner(found, found, at) <= system.square(curved.grad) * (scale**2 / lam)
    if not bool(helps.all()):
        # `where` instead of a product also removes overflowed values. Units without a step continue from zero.
        descents = max(descents, 1)
        found.copy_(torch.where(helps, found, 0.0))
        at = torch.where(system.over_outputs(helps), at, 0.0)
        moved = curved.z + at
        misfit = s.value(moved).sub_(targets)
        before = system.square(misfit) / lam
    for left in reversed(range(descents)):
        pulled = system.adjoint(s.backward(misfit, moved))
        gradient = torch.add(found, pulled, alpha=1 / lam, out=pulled)
        to = system.apply(gradient, misfit)
        steepness = system.inner(gradient, gradient, to)
        length = _ratio(steepness, steepness + system.square(s.backward(to, moved)) / lam)
        misfit = s.value(moved.addcmul_(to, system.over_outputs(length), value=-1)).sub_(targets)
        # |d - length * gradient|^2 - |d|^2
        longer = length * (length * steepness - 2 * system.inner(gradient, found, at))
        length = torch.where(system.square(misfit) / lam + longer <= before, length, 0.0)
        found.addcmul_(gradient, length, value=-1)
        if left:
            at.addcmul_(to, system.over_outputs(length), value=-1)
            moved = curved.z + at
            misfit = s.value(moved).sub_(targets)
            before = system.square(misfit) / lam


def _length(system: UnitSystem, curved: Curved, targets: Tensor, start: Tensor, further: Tensor, lam: float) -> Tensor:
    """Return step lengths per unit by backtracking: 1, halved at most four times until the objective does not rise."""
    at, to = system.apply(start), system.apply(further)

    def objective(length: Tensor) -> Tensor:
        moved = at + to * system.over_outputs(length)
        unknown = start + further * length
        misfit = system.square(curved.s.value(curved.z + moved).sub_(targets))
        return misfit + lam * system.inner(unknown, unknown, moved)

    length = torch.ones_like(system.inner(further, further, to))
    before = objective(torch.zeros_like(length))
    for _ in range(4):
        length = torch.where(objective(length) > before, length / 2, length)
    return length


def _conjugate_gradients(system: UnitSystem, weighting: Tensor, residual: Tensor, steps: int) -> Tensor:
    """Return the ``steps``-th conjugate-gradient iterate for (A^T diag(weighting) A + I) d = residual, per unit.

    The start is d = 0. Inner products are those of the weights in both coordinates, so that every iterate lowers the
    quadratic model of the sub-problem and the coordinates differ by rounding only. ``residual`` is overwritten.
    """
    direction = residual.clone()
    applied = system.apply(direction)
    square = system.inner(residual, residual, applied)
    scratch, of_residual = torch.empty_like(applied), torch.empty_like(applied)
    solution = direction
    for iteration in range(steps):
        image = system.damped(weighting, applied, direction, scratch)
        # The matrix is at least I. At convergence rounding can violate this, and the step would blow up.
        length = _ratio(square, system.inner(image, direction, applied)).clamp_(0, 1)
        solution = solution.addcmul_(direction, length) if iteration else direction * length
        if iteration == steps - 1:
            break
        residual.addcmul_(image, length, value=-1)
        of_residual = system.apply(residual, of_residual)
        before, square = square, system.inner(residual, residual, of_residual)
        turn = _ratio(square, before).clamp_(min=0)
        torch.addcmul(residual, direction, turn, out=direction)
        torch.addcmul(of_residual, applied, system.over_outputs(turn), out=applied)
    return solution


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the quotient with 0 / 0 = 0 for converged units; inf and NaN are kept."""
    return above / (below + torch.finfo(below.dtype).tiny)
