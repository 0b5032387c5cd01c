"""Proximal directions (Frerix et al., ICLR 2018, Section 3), and `ProxProp` in force that solves in the backward pass.

With Z = A Theta and g = dL/dZ it is, in the place of the gradient A^T g,
D = Theta - argmin_T 1/2 |A T - (A Theta - g)|^2 + 1/(2 tau) |T - Theta|^2
  = (A^T A + I/tau)^{-1} A^T g = A^T (A A^T + I/tau)^{-1} g.
The increment D is solved for itself: an argmin minus Theta would lose it in the rounding of Theta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import pad

from backpass.errors import BackpassError
from backpass.rules import torch_internals
from backpass.rules.attaching.override import TorchFunction
from backpass.rules.implicit.attached import LayerAttached
from backpass.rules.implicit.calls import NORMALIZATIONS, LinearCall
from backpass.rules.implicit.interception import LayerInterception
from backpass.rules.implicit.layers import Gradients, LinearLayer
from backpass.rules.implicit.systems import NotFiniteError, conjugate_gradients, row_gram, solve
from backpass.rules.implicit.uses import Found, Use

__all__ = [
    "ProximalAttached",
    "ProximalStep",
    "Rows",
    "as_gradients",
    "as_matrix",
    "direction",
    "diverged",
    "from_gradient",
    "from_rows",
    "gram",
    "samples",
    "solve_dtype",
]

# Below this ratio of the smallest to the largest squared pivot of the Cholesky factor a system is computed anew in
# float64. The relative error in float32 is at most near 1e-7 over that ratio, where rows repeat each other, and much
# less where they do not; computing a Gram matrix of columns anew costs more.
_ROWS_FLOOR = 3e-4
_COLUMNS_FLOOR = 3e-5


@dataclass(frozen=True)
class ProximalStep:
    """Size of the step, and how it is solved for: settings of `ProxProp`, with the defaults filled in."""

    tau: float
    damping: str
    solver: str
    cg_steps: int
    max_side: int

    def added(self, count: float, samples: float, rank: float = math.inf) -> Callable[[Tensor], float]:
        """Return the damping added to the diagonal of a Gram matrix, as a function of it.

        Relative damping counts no more eigenvalues than the ``rank``, so that A^T A and A A^T get the same damping.
        """
        if self.damping != "relative":
            number = {"sum": 1, "mean": count, "sample_mean": samples}[self.damping] / self.tau
            return lambda gram: number

        def relative(gram: Tensor) -> float:
            eigenvalues = gram.shape[0] * min(gram.shape[-1], rank)
            trace = float(gram.diagonal(dim1=-2, dim2=-1).sum())
            return trace / (eigenvalues * self.tau) or 1.0  # a layer whose inputs are zero

        return relative

    def scale(self, count: float, samples: float, added: float) -> float:
        """Return the c with D = c (A^T A + added I)^{-1} A^T g."""
        return {"sum": 1.0, "mean": float(count), "sample_mean": float(samples), "relative": added}[self.damping]


class Rows(NamedTuple):
    """A without the column of ones (blocks, n, d), dL/dZ in the precision to solve in (blocks, n, o), samples."""

    a: Tensor
    g: Tensor
    samples: int


def solve_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the solve for weights of a dtype: a bfloat16 Gram matrix is not positive definite."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def samples(x: Tensor) -> int:
    """Number of samples in a layer's input."""
    return x.shape[0] if x.dim() > 1 else 1


def direction(layer: LinearLayer, x: Tensor, grad: Tensor, wants: tuple[bool, bool], step: ProximalStep) -> Gradients:
    """Return D for weight and bias of one use of a layer, on the cheaper side; what is not wanted is fixed.

    Raises:
        NotFiniteError: ``x`` is not finite.
    """
    count = layer.count(x)
    if layer.has_rows and wants[0] and count <= layer.columns(wants[1]):
        return from_rows(layer, Rows(layer.rows(x), layer.output_rows(grad), samples(x)), wants[1], step)

    def system(dtype: torch.dtype) -> tuple[Tensor, Gradients]:
        inputs = x.to(dtype) if x.is_floating_point() else x
        return gram(layer, inputs, wants, step, dtype), layer.gradients(inputs, grad.to(dtype), *wants)

    return from_gradient(layer, system, wants, (count, samples(x)), grad.dtype, step)


def gram(layer: LinearLayer, x: Tensor, wants: tuple[bool, bool], step: ProximalStep, dtype: torch.dtype) -> Tensor:
    """Return A^T A of what is wanted, in pieces of at most the step's ``max_side``."""
    if not wants[0]:
        return torch.full((layer.blocks, 1, 1), float(layer.count(x)), dtype=dtype, device=x.device)
    parts = layer.parts(step.max_side)
    return layer.gram(x, wants[1] and parts == 1, step.solver != "toeplitz", parts).to(dtype)


def from_rows(layer: LinearLayer, rows: Rows, ones: bool, step: ProximalStep, out: Tensor | None = None) -> Gradients:
    """Return D = A^T S, S = (A A^T + I/tau)^{-1} g: the plain weight gradient with S in the place of g.

    With ``ones`` A has the column of ones, and D of the bias is wanted too. ``out`` is memory for D of the weight as a
    matrix, used if its dtype fits.
    """
    a, g = rows.a, rows.g
    count, columns = a.shape[1:]
    added = step.added(count, rows.samples)
    if step.solver == "cg":
        kernel = row_gram(a.to(g.dtype), ones)
        damping = added(kernel)
        factor = conjugate_gradients(kernel, g, damping, step.cg_steps, layer.is_product, rows=True)
    else:
        # The solve costs as many right sides as there are; A itself may be the fewer: D^T = ((..)^{-1} A)^T g.
        of_inputs = columns + ones < g.shape[-1]

        def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            inputs = a.to(dtype)
            right = (pad(inputs, (0, 1), value=1.0) if ones else inputs) if of_inputs else g.to(dtype)
            return row_gram(inputs, ones), right

        factor, damping = solve(system, added, g.dtype, _ROWS_FLOOR)
        if of_inputs:
            g = g.to(factor.dtype).mT
            factor = _scaled(factor, step.scale(count, rows.samples, damping))
            weight = _product(g, factor[..., :columns], out)
            return layer.weight(weight), (g @ factor[..., columns:]).flatten() if ones else None
    factor = _scaled(factor, step.scale(count, rows.samples, damping))
    weight = _product(factor.mT, a.to(factor.dtype), out)
    return layer.weight(weight), factor.sum(1).flatten() if ones else None


def from_gradient(
    layer: LinearLayer,
    system: Callable[[torch.dtype], tuple[Tensor, Gradients]],
    wants: tuple[bool, bool],
    counts: tuple[int, int],
    dtype: torch.dtype,
    step: ProximalStep,
) -> Gradients:
    """Return D = (A^T A + I/tau)^{-1} P from the plain gradient P.

    ``system`` gives `gram` and P in a given precision, both of which may be overwritten. ``counts`` are the numbers of
    rows of A and of samples.
    """
    ones = wants[0] and wants[1]

    def joined(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kernel, gradients = system(dtype)
        return kernel, as_matrix(layer, gradients, kernel.shape[-1])

    added = step.added(*counts, rank=counts[0])
    if step.solver == "cg":
        kernel, right = joined(dtype)
        damping = added(kernel)
        by_column = layer.is_product
        found = conjugate_gradients(kernel, right, damping, step.cg_steps, by_column, rows=False)
    else:
        found, damping = solve(joined, added, dtype, _COLUMNS_FLOOR)
    weight, bias = as_gradients(layer, _scaled(found, step.scale(*counts, damping)), wants)
    if ones and bias is None:  # in pieces: the bias is a system of its own
        plain = system(found.dtype)[1][1]
        assert plain is not None  # noqa: S101  it is wanted
        bias = plain * (step.scale(*counts, damping) / (counts[0] + damping))
    return weight, bias


def as_matrix(layer: LinearLayer, gradients: Gradients, side: int) -> Tensor:
    """Return weight and bias gradient as the right side (blocks, side, outputs) of a system with A^T A."""
    weight, bias = gradients
    if weight is None:
        assert bias is not None  # noqa: S101  one of the two is wanted
        return layer.bias_matrix(bias).mT
    matrix = layer.matrix(weight)
    columns = matrix.shape[-1]
    if side < columns:
        return matrix.reshape(len(matrix), -1, columns // side, side).transpose(1, 2).flatten(0, 1).mT
    if side > columns and bias is not None:
        matrix = torch.cat([matrix, layer.bias_matrix(bias)], -1)
    return matrix.mT


def as_gradients(layer: LinearLayer, solution: Tensor, wants: tuple[bool, bool]) -> Gradients:
    """Return the inverse of `as_matrix`; in pieces the bias is None."""
    matrix = solution.mT
    if not wants[0]:
        return None, matrix.flatten()
    columns, side = layer.columns(False), matrix.shape[-1]
    if side < columns:
        pieces = matrix.reshape(-1, columns // side, *matrix.shape[1:])
        return layer.weight(pieces.transpose(1, 2).flatten(2)), None
    return layer.weight(matrix[..., :columns]), matrix[..., -1].flatten() if side > columns else None


def _product(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    return torch.bmm(left, right, out=out if out is not None and out.dtype == left.dtype else None)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor.mul_(scale)


class ProximalInterception(LayerInterception):
    """An interception that gives linear layers proximal weight gradients."""

    rule: Any
    attached: ProximalAttached

    def is_site(self, func: TorchFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a call is a layer; embeddings and normalizations on request."""
        if func in NORMALIZATIONS and not self.rule.norms:
            return False
        if func is F.embedding and not self.rule.embeddings:
            return False
        return super().is_site(func, args, kwargs)

    def accepts(self, call: LinearCall) -> bool:
        """Return whether the step needs a layer's rows.

        Raises:
            BackpassError: a compiled transform, of which Dynamo does not say what gradients are asked for.
        """
        if not is_dynamo_compiling():
            return bool(torch_internals.transforms()) or self.attached.is_due(call.weight, call.bias)
        if torch_internals.transforms():
            raise BackpassError(
                "ProxProp does not work in a compiled torch.func.grad: take torch.func.grad of the compiled model, or "
                "leave out torch.compile."
            )
        return True


class ProximalAttached(LayerAttached):
    """`ProxProp` in force on a model; it solves in the backward pass, which is exact for one use of each weight."""

    step_name = "proximal"
    way_out = (
        'to accumulate gradients, share a weight or use several processes, use ProxProp(solve="step").attach(model, '
        "optimizer=optimizer)"
    )
    interception = ProximalInterception
    settable = ("tau", "cg_steps")

    def is_due(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Return whether the backward pass needs the rows of a layer; else its calls can stay plain."""
        return True

    def set(self, **settings: Any) -> None:
        """Change settings of the solve; see `LayerAttached.set`."""
        self.rule = replace(self.rule, damping=self.rule.step.damping)
        super().set(**settings)
        self.step = self.rule.step

    def start(self) -> None:
        """Initialise the state, also in a copy of the model."""
        super().start()
        self.step = self.rule.step

    def gradients(self, use: Use) -> Found:
        """Return the plain input gradient, and the directions of weight and bias.

        Raises:
            BackpassError: the weight has another contribution already, or several processes contribute.
        """
        use = use._replace(grad=use.grad.to(solve_dtype(use.weight.dtype)))
        of_x = use.layer.input_gradient(use.x, use.grad, use.weight.to(use.grad.dtype)) if use.wants[0] else None
        return of_x, *(self.directions(use) if use.asked else (None, None))

    def directions(self, use: Use) -> Gradients:
        """Return what ``.grad`` of weight and bias gets."""
        if not use.functional:
            self.admit(use)
        try:
            return direction(use.layer, use.x, use.grad, use.wants[1:], self.step)
        except NotFiniteError:
            raise diverged(self.describe(use.weight)) from None


def diverged(layer: str) -> NotFiniteError:
    """Return the error of a layer whose inputs are not finite."""
    return NotFiniteError(
        f"the inputs of {layer} are not finite, so it has no proximal step: the network has diverged. Lower the "
        "learning rate or tau, and look at the losses of the steps before."
    )
