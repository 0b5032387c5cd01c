"""Damped symmetric systems (K + damping I) S = R: direct with escalating precision, and conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backpass.errors import BackpassError

__all__ = ["NotFiniteError", "conjugate_gradients", "conjugate_gradients_by_rows", "solve"]


class NotFiniteError(BackpassError):
    """The inputs of a layer hold inf or NaN, so the layer has no proximal step."""


System = Callable[[torch.dtype], tuple[Tensor, Tensor]]


def solve(system: System, damping: float, dtype: torch.dtype, pivot_floor: float) -> Tensor:
    """S = (K + damping I)^{-1} R, in the first of float32, float64 and float64 by eigenvalues that is good enough.

    Args:
        system: (K, R) computed in a given dtype, K (groups, n, n) positive semi-definite, R (groups, n, m); K is
            overwritten. It is computed anew in float64: rounding a float32 K up would not mend it.
        damping: what is added to the diagonal, positive.
        dtype: the first precision to try.
        pivot_floor: smallest ratio of the Cholesky factor's squared pivots with which float32 is good enough; about
            1 / condition number.

    Returns:
        (groups, n, m), in the dtype that was needed.

    Raises:
        NotFiniteError: K is not finite.
    """
    for precision in [dtype] if dtype == torch.float64 else [dtype, torch.float64]:
        gram, right = system(precision)
        gram.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor, info = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        floor = pivot_floor if precision != torch.float64 else 0.0
        good = (info == 0) & (pivots.amin(-1) > floor * pivots.amax(-1))
        if bool(good.all()):
            solution: Tensor = torch.cholesky_solve(right, factor)
            return solution
    return _solve_by_eigenvalues(*system(torch.float64), damping)


def _solve_by_eigenvalues(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """The same where damping / |K| is below float64's resolution: parts of R in the null space of K count as zero."""
    if not bool(gram.isfinite().all()):
        raise NotFiniteError("a Gram matrix is not finite: the inputs of its layer are not, or they overflow.")
    values, vectors = torch.linalg.eigh(gram)
    noise = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > noise, 1 / (values + damping), 0.0)
    solution: Tensor = vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ right))
    return solution


def conjugate_gradients(gram: Tensor, right: Tensor, damping: float, steps: int) -> Tensor:
    """The ``steps``-th iterate of conjugate gradients on (K + damping I) S = R from S = 0, as one long vector.

    No epsilon is added anywhere: scaling R scales S.

    Args:
        gram: K, (groups, n, n).
        right: R, (groups, n, m).
        damping: positive.
        steps: at least 1; one product with K each.
    """
    solution = torch.zeros_like(right)
    residual = direction = right
    square = residual.square().sum()
    for _ in range(steps):
        image = torch.baddbmm(direction, gram, direction, beta=damping)
        step = _ratio(square, (direction * image).sum())
        solution = solution + step * direction
        residual = residual - step * image
        before, square = square, residual.square().sum()
        direction = residual + _ratio(square, before) * direction
    return solution


def conjugate_gradients_by_rows(gram: Tensor, right: Tensor, damping: float, steps: int) -> Tensor:
    """S such that A^T S is the ``steps``-th iterate on (A^T A + damping I) D = A^T R from D = 0.

    All inner products of the iteration in D are inner products with K = A A^T in S, so that n x n products are
    enough; carrying K times each vector along leaves one of them per step.

    Args:
        gram: K, (groups, n, n).
        right: R, (groups, n, m).
        damping: positive.
        steps: at least 1.
    """
    solution = torch.zeros_like(right)
    residual = direction = right
    k_residual = k_direction = gram @ right
    square = (residual * k_residual).sum()
    for _ in range(steps):
        image = k_direction + damping * direction
        step = _ratio(square, (k_direction * image).sum())
        solution = solution + step * direction
        residual = residual - step * image
        k_residual = k_residual - step * torch.baddbmm(k_direction, gram, k_direction, beta=damping)
        before, square = square, (residual * k_residual).sum()
        turn = _ratio(square, before)
        direction = residual + turn * direction
        k_direction = k_residual + turn * k_direction
    return solution


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient, and 0 where the iteration has already arrived."""
    return torch.where(below > 0, above / below, 0.0)
