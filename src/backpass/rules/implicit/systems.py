"""Gram matrices of a layer's rows, and damped systems (K + damping I) S = R with them.

A is (groups, rows, columns); with ``ones`` a column of ones, the bias's, follows the last column.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from backpass.errors import BackpassError

__all__ = ["NotFiniteError", "bordered", "column_gram", "conjugate_gradients", "row_gram", "solve"]

_BLOCK = 64
"""Size of the blocks in which a CPU computes a symmetric product: little more than half of it is enough."""

# On a CPU a product with the inverse is several times as fast as substitution with many right sides. Its error is about
# as large as long as the condition number is moderate.
_FEW = 0.25
_INVERTIBLE = {torch.float32: 3e-5, torch.float64: 1e-6}

Damping = Callable[[Tensor], float]


class NotFiniteError(BackpassError):
    """Error: the inputs of a layer hold inf or NaN, so the layer has no proximal step."""


def row_gram(rows: Tensor, ones: bool = False) -> Tensor:
    """Return A A^T, (groups, n, n); a column of ones adds 1 to every entry."""
    gram = _times_transpose(rows, rows.new_empty(*rows.shape[:2], rows.shape[1]))
    return gram.add_(1.0) if ones else gram


def column_gram(rows: Tensor, ones: bool = False) -> Tensor:
    """Return A^T A, (groups, d, d), or (groups, d + 1, d + 1) with the column of ones last."""
    groups, count, d = rows.shape
    if not ones:
        return _times_transpose(rows.mT, rows.new_empty(groups, d, d))
    gram = rows.new_empty(groups, d + 1, d + 1)
    _times_transpose(rows.mT, gram[:, :d, :d])
    gram[:, d, :d] = gram[:, :d, d] = rows.sum(1)
    gram[:, d, d] = count
    return gram


def bordered(gram: Tensor, sums: Tensor, count: int) -> Tensor:
    """Return ``gram`` (groups, d, d) with the column of ones: bordered by ``sums`` (groups, d) and ``count``."""
    gram = pad(gram, (0, 1, 0, 1), value=float(count))
    gram[:, -1, :-1] = sums
    gram[:, :-1, -1] = sums
    return gram


def _times_transpose(m: Tensor, out: Tensor) -> Tensor:
    """Return M M^T of each (n, d) matrix; a CPU computes the lower triangle by blocks and mirrors it."""
    n = m.shape[-2]
    if n <= 2 * _BLOCK or m.device.type != "cpu":
        return torch.bmm(m, m.mT, out=out)
    edges = [n * i // -(-n // _BLOCK) for i in range(-(-n // _BLOCK) + 1)]
    for product, matrix in zip(out, m, strict=True):
        for start, stop in pairwise(edges):
            torch.mm(matrix[start:stop], matrix[:stop].mT, out=product[start:stop, :stop])
            product[:start, start:stop] = product[start:stop, :start].mT
    return out


def solve(
    system: Callable[[torch.dtype], tuple[Tensor, Tensor | None]],
    damping: Damping,
    dtype: torch.dtype,
    pivot_floor: float,
) -> tuple[Tensor, float]:
    """Return S = (K + damping I)^{-1} R in float32, float64 or by eigenvalues, the first that is good enough.

    Args:
        system: (K, R) computed in a given dtype, K (groups, n, n) positive semi-definite, R (groups, n, m) or None for
            the identity. K is overwritten. It is computed anew in float64: rounding a float32 K up would not mend it.
        damping: what is added to the diagonal of K, positive.
        dtype: the first precision to try.
        pivot_floor: smallest ratio of the Cholesky factor's squared pivots with which float32 is good enough; about
            1 / condition number.

    Returns:
        S (groups, n, m), in the dtype that was needed, and the damping.

    Raises:
        NotFiniteError: K is not finite.
    """
    for precision in [dtype] if dtype == torch.float64 else [dtype, torch.float64]:
        gram, right = system(precision)
        added = damping(gram)
        gram.diagonal(dim1=-2, dim2=-1).add_(added)
        factor, info = torch.linalg.cholesky_ex(gram, upper=True)  # no copy by LAPACK's order
        low, high = map(float, torch.aminmax(factor.diagonal(dim1=-2, dim2=-1)))
        floor = pivot_floor if precision != torch.float64 else 0.0
        if low > 0 and low**2 > floor * high**2 and not bool(info.any()):
            if right is None:
                return torch.cholesky_inverse(factor, upper=True), added
            if right.shape[-1] > _FEW * gram.shape[-1] and low**2 > _INVERTIBLE[precision] * high**2:
                return torch.bmm(torch.cholesky_inverse(factor, upper=True), right), added
            return torch.cholesky_solve(right, factor, upper=True), added
    gram, right = system(torch.float64)
    if not bool(gram.isfinite().all()):
        raise NotFiniteError("a Gram matrix is not finite: the inputs of its layer are not, or they overflow.")
    return _solve_by_eigenvalues(gram, right, added), added


def _solve_by_eigenvalues(gram: Tensor, right: Tensor | None, damping: float) -> Tensor:
    """Pseudo-inverse solve for damping below float64 resolution; components of R in the null space of K are dropped."""
    values, vectors = torch.linalg.eigh(gram)
    noise = values.amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    inverse = torch.where(values > noise, 1 / (values + damping), 0.0)
    solution: Tensor = vectors @ (inverse.unsqueeze(-1) * (vectors.mT if right is None else vectors.mT @ right))
    return solution


def conjugate_gradients(gram: Tensor, right: Tensor, damping: float, steps: int, by_column: bool, rows: bool) -> Tensor:
    """Return the ``steps``-th iterate of conjugate gradients on (K + damping I) S = R from S = 0.

    No epsilon is added anywhere: scaling R scales S.

    Args:
        gram: K, (groups, n, n).
        right: R, (groups, n, m).
        damping: positive.
        steps: at least 1; one product with K each.
        by_column: one step length per column of R, as in the paper's linear layers; else one for all of R.
        rows: K is A A^T, and S such that A^T S is the iterate on (A^T A + damping I) D = A^T R: inner products of
            D are inner products with K of S, so that n x n products are enough.
    """
    dims = (-2,) if by_column else (0, 1, 2)

    def inner(first: Tensor, second: Tensor) -> Tensor:
        return (first * second).sum(dims, keepdim=True)

    solution = torch.zeros_like(right)
    residual = direction = right
    # With ``rows`` K times each vector is carried along, which leaves one product per step.
    k_residual = k_direction = gram @ right if rows else right
    square = inner(residual, k_residual)
    for _ in range(steps):
        image = (k_direction if rows else gram @ direction) + damping * direction
        step = _ratio(square, inner(k_direction, image))
        solution = solution + step * direction
        residual = residual - step * image
        k_residual = k_residual - step * (gram @ k_direction + damping * k_direction) if rows else residual
        before, square = square, inner(residual, k_residual)
        turn = _ratio(square, before)
        direction = residual + turn * direction
        k_direction = k_residual + turn * k_direction if rows else direction
    return solution


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return the quotient, and 0 after convergence."""
    return torch.where(below > 0, above / below, 0.0)
