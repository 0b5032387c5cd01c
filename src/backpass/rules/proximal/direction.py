"""The proximal direction of one linear layer (Frerix et al., ICLR 2018, Section 3).

With Z = A Theta and g = dL/dZ it is, in the place of the gradient A^T g,
D = Theta - argmin_T 1/2 |A T - (A Theta - g)|^2 + 1/(2 tau) |T - Theta|^2
  = (A^T A + I/tau)^{-1} A^T g = A^T (A A^T + I/tau)^{-1} g.
The increment D is solved for itself: an argmin minus Theta would lose it in the rounding of Theta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from backpass.rules.damped import conjugate_gradients, conjugate_gradients_by_rows, solve
from backpass.rules.gram import row_gram
from backpass.rules.layers.linear_layer import Gradients, LinearLayer

__all__ = ["ProximalStep", "as_tensors", "by_columns", "by_rows", "direction", "joined", "solve_dtype"]

# Below this ratio of the smallest to the largest squared pivot of the Cholesky factor a system is computed anew in
# float64. The relative error in float32 is at most near 1e-7 over that ratio, where rows repeat each other, and much
# less where they do not; to compute a Gram matrix of columns anew costs more.
_ROWS_FLOOR = 3e-4
_COLUMNS_FLOOR = 3e-5


@dataclass(frozen=True)
class ProximalStep:
    """How large the step is, and how it is solved for.

    Attributes:
        tau: step size, positive.
        solver: ``"exact"``, ``"cg"`` or ``"toeplitz"``.
        cg_steps: iterations of ``"cg"``.
        mean: whether A^T A is divided by the number of rows.
    """

    tau: float
    solver: str
    cg_steps: int
    mean: bool

    def damping(self, count: int) -> tuple[float, float]:
        """(damping, scale) with D = scale (A^T A + damping I)^{-1} A^T g for ``count`` rows."""
        return (count / self.tau, float(count)) if self.mean else (1 / self.tau, 1.0)


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision to solve in for weights of this dtype: a bfloat16 Gram matrix is not positive definite."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def direction(layer: LinearLayer, x: Tensor, grad: Tensor, wants: tuple[bool, bool], step: ProximalStep) -> Gradients:
    """D for weight and bias of one use of a layer, whichever are wanted, on the cheaper side.

    Args:
        layer: the layer.
        x: its input.
        grad: dL/dZ, in the precision to solve in.
        wants: whether D is wanted for the weight, and for the bias; what is not wanted is held fixed.
        step: the step.

    Returns:
        (D of the weight, D of the bias), each None if not wanted.

    Raises:
        NotFiniteError: ``x`` is not finite.
    """
    ones = wants[1]
    if layer.has_rows and wants[0] and layer.count(x) <= layer.columns(ones):
        weight, bias = by_rows(layer.rows(x), layer.output_rows(grad), ones, step)
        return layer.weight(weight), None if bias is None else bias.flatten()

    def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inputs = x if not x.is_floating_point() else x.to(dtype)
        gradients = layer.gradients(inputs, grad.to(dtype), *wants)
        if not wants[0]:
            bias = gradients[1]
            assert bias is not None  # noqa: S101  one of the two is wanted
            gram = grad.new_full((layer.blocks, 1, 1), float(layer.count(x)), dtype=dtype)
            return gram, layer.bias_matrix(bias).mT
        return layer.gram(inputs, ones, border=step.solver != "toeplitz").to(dtype), joined(layer, gradients).mT

    solution = by_columns(system, layer.count(x), grad.dtype, step)
    return as_tensors(layer, solution.mT, ones, weight=wants[0])


def joined(layer: LinearLayer, gradients: Gradients) -> Tensor:
    """Weight and bias as one matrix (blocks, outputs, columns), the bias last."""
    parts = [layer.matrix(gradients[0])] if gradients[0] is not None else []
    if gradients[1] is not None:
        parts.append(layer.bias_matrix(gradients[1]))
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def as_tensors(layer: LinearLayer, matrix: Tensor, ones: bool, weight: bool = True) -> Gradients:
    """The inverse of `joined`."""
    bias = matrix[..., -1].flatten() if ones else None
    return layer.weight(matrix[..., :-1] if ones else matrix) if weight else None, bias


def by_rows(
    rows: Tensor, outputs: Tensor, ones: bool, step: ProximalStep, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """D = A^T S, S = (A A^T + I/tau)^{-1} g: the plain weight gradient with S in the place of g.

    Args:
        rows: A without the column of ones, (blocks, n, d).
        outputs: g in the precision to solve in, (blocks, n, o).
        ones: whether A has the column of ones.
        step: the step.
        out: where D of the weight may be written, if its dtype fits.

    Returns:
        D of the weight as a matrix (blocks, o, d), and with ``ones`` that of the bias, (blocks, o, 1), else None.
    """
    count, columns = rows.shape[1:]
    damping, scale = step.damping(count)
    outputs = outputs if scale == 1.0 else outputs * scale

    def all_columns(dtype: torch.dtype) -> Tensor:
        a = rows.to(dtype)
        return pad(a, (0, 1), value=1.0) if ones else a

    if step.solver == "cg":
        gram = row_gram(rows.to(outputs.dtype), ones)
        factor = conjugate_gradients_by_rows(gram, outputs, damping, step.cg_steps)
    else:
        # The solve costs as many right sides as there are; A itself may be the fewer: D^T = ((..)^{-1} A)^T g.
        of_inputs = columns + ones < outputs.shape[-1]

        def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            gram = row_gram(rows.to(dtype), ones)
            return gram, all_columns(dtype) if of_inputs else outputs.to(dtype)

        factor = solve(system, damping, outputs.dtype, _ROWS_FLOOR)
        if of_inputs:
            outputs = outputs.to(factor.dtype).mT
            weight = _product(outputs, factor[..., :columns], out)
            return weight, outputs @ factor[..., columns:] if ones else None
    weight = _product(factor.mT, rows.to(factor.dtype), out)
    return weight, factor.sum(1).unsqueeze(-1) if ones else None


def by_columns(
    system: Callable[[torch.dtype], tuple[Tensor, Tensor]], count: int, dtype: torch.dtype, step: ProximalStep
) -> Tensor:
    """D = (A^T A + I/tau)^{-1} P.

    Args:
        system: A^T A (blocks, k, k) and P (blocks, k, o), the plain gradient, in a given precision.
        count: the number of rows of A.
        dtype: the precision to solve in.
        step: the step.

    Returns:
        D, (blocks, k, o).
    """
    damping, scale = step.damping(count)
    if step.solver == "cg":
        return _scaled(conjugate_gradients(*system(dtype), damping, step.cg_steps), scale)
    return _scaled(solve(system, damping, dtype, _COLUMNS_FLOOR), scale)


def _product(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """A product per block; a batch of one is slower than a plain product."""
    if len(left) > 1:
        return left @ right
    fits = out is not None and out.dtype == left.dtype
    return torch.mm(left[0], right[0], out=out[0] if out is not None and fits else None).unsqueeze(0)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale
