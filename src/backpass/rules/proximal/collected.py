"""What one weight's uses leave for the solve before the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backpass.errors import BackpassError
from backpass.rules.gram import column_gram
from backpass.rules.layers.linear_layer import Gradients, LinearLayer
from backpass.rules.proximal.contributions import Named, Use
from backpass.rules.proximal.direction import ProximalStep, as_tensors, by_columns, by_rows, joined

__all__ = ["Collected"]


class Collected:
    """The rows of one weight's uses while they are at most as many as the columns, or their Gram matrix A^T A.

    Attributes:
        layer: the layer; all uses must agree in what its matrix looks like.
        ones: whether the bias is solved for together with the weight.
        count: how many rows there are.
        last_pass: the backward pass of the last use.
        rows: A and g of each use, (blocks, n, columns) and (blocks, n, outputs); None once ``gram`` is used.
        gram: A^T A, (blocks, columns, columns), None while ``rows`` is used.
    """

    def __init__(self, use: Use, parameter: Callable[[Tensor], Named | None], step: ProximalStep) -> None:
        self.layer: LinearLayer = use.layer
        self.ones = use.wants[1]
        self.count = 0
        self.last_pass = -1
        self.rows: list[tuple[Tensor, Tensor]] | None = []
        self.gram: Tensor | None = None
        self._versions: list[int] = []
        self._step = step
        self._dtype = use.grad.dtype
        self._of = parameter
        self._weight = self._learning(use.weight) if use.wants[0] else None
        self._bias = self._learning(use.bias) if self.ones else None

    def add(self, use: Use, now: int) -> None:
        """Collect one use.

        Raises:
            BackpassError: the same weight was used in another way before.
        """
        bias = self._learning(use.bias) if use.wants[1] else None
        same = type(use.layer) is type(self.layer) and use.layer.blocks == self.layer.blocks
        if not same or bias is not self._bias or use.wants[0] != (self._weight is not None):
            raise BackpassError(
                f"{self._name(use)!r} is shared by {type(self.layer).__name__} and {type(use.layer).__name__}, or with "
                "and without the same bias, so its uses have no common Gram matrix: leave one out by `where`."
            )
        self.last_pass = now
        count = use.layer.count(use.x)
        self.count += count
        few = use.layer.has_rows and use.wants[0] and self.count <= use.layer.columns(self.ones)
        if self.rows is not None and few:
            rows = use.layer.rows(use.x)
            if use.borrowed and rows.data_ptr() == use.x.data_ptr():
                rows = rows.clone()
            self.rows.append((rows, use.layer.output_rows(use.grad)))
            self._versions.append(rows._version)
            return
        self.to_gram()
        assert self.gram is not None  # noqa: S101  to_gram made it
        if use.wants[0]:
            x = use.x.to(self._dtype) if use.x.is_floating_point() else use.x
            self.gram += use.layer.gram(x, self.ones, border=self._step.solver != "toeplitz")
        else:
            self.gram += float(count)

    def to_gram(self) -> None:
        """Give up the rows for their Gram matrix."""
        if self.gram is not None:
            return
        columns = self.layer.columns(self.ones) if self._weight is not None else 1
        device = (self._weight if self._weight is not None else self._bias).device  # type: ignore[union-attr]
        self.gram = torch.zeros(self.layer.blocks, columns, columns, dtype=self._dtype, device=device)
        for rows, _ in self._unchanged():
            self.gram += column_gram(rows.to(self._dtype), self.ones)
        self.rows = None

    def whole(self) -> tuple[Tensor, Tensor]:
        """A and g of all uses, where rows were kept."""
        rows, outputs = zip(*self._unchanged(), strict=True)
        return torch.cat(rows, 1), torch.cat(outputs, 1)

    def replace_rows(self, rows: Tensor, outputs: Tensor) -> None:
        """Go on with these rows instead of the ones collected here."""
        self.rows, self._versions = [(rows, outputs)], [rows._version]

    def solve(self) -> None:
        """Put D in the place of the plain gradient in ``.grad``."""
        learning = (self._weight, self._bias)
        plain = tuple(None if p is None else p.grad for p in learning)
        if any(p is not None and g is None for p, g in zip(learning, plain, strict=True)):
            return  # zeroed after the backward pass: the optimizer passes it over
        for gradient, value in zip(plain, self._direction((plain[0], plain[1])), strict=True):
            if gradient is not None and value is not None and value.data_ptr() != gradient.data_ptr():
                gradient.copy_(value.view_as(gradient))

    def _direction(self, plain: Gradients) -> Gradients:
        if self.rows is None:
            assert self.gram is not None  # noqa: S101  it is the one or the other
            gram = self.gram
            return self._from_plain(lambda dtype: gram.to(dtype, copy=True), self._dtype, plain)
        rows, outputs = self.whole()
        scale = self._common_scale(rows, outputs, plain)
        if scale is not None:
            assert plain[0] is not None  # noqa: S101  there are rows
            weight, bias = by_rows(rows, outputs * scale, self.ones, self._step, out=self.layer.matrix(plain[0]))
            return self.layer.weight(weight), None if bias is None else bias.flatten()
        # The gradient was changed entry by entry (clip_grad_value_, a term of the loss), so g no longer says it. The
        # solve from P alone loses tau |A|^2 in precision, hence float64.
        return self._from_plain(lambda dtype: column_gram(rows.to(dtype), self.ones), torch.float64, plain)

    def _from_plain(self, gram: Callable[[torch.dtype], Tensor], dtype: torch.dtype, plain: Gradients) -> Gradients:
        def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            return gram(dtype), joined(self.layer, plain).mT.to(dtype)

        matrix = by_columns(system, self.count, dtype, self._step).mT
        return as_tensors(self.layer, matrix, self.ones, self._weight is not None)

    def _common_scale(self, rows: Tensor, outputs: Tensor, plain: Gradients) -> Tensor | None:
        """The c with P = c g^T A, which unscaling, clipping by norm and averaging leave; None if none fits.

        Both sides are compared on one fixed vector of random signs.
        """
        signs = torch.full((rows.shape[-1] + 1, 1), 0.5).bernoulli(generator=torch.Generator().manual_seed(0))
        signs = (2 * signs - 1).to(outputs)
        of_rows, (weight, bias) = rows.to(outputs.dtype) @ signs[:-1], plain
        assert weight is not None  # noqa: S101  there are rows
        found = self.layer.matrix(weight).to(outputs.dtype) @ signs[:-1]
        if bias is not None:
            of_rows, found = of_rows + signs[-1], found + self.layer.bias_matrix(bias) * signs[-1]
        expected = outputs.mT @ of_rows
        scale = (found * expected).sum() / expected.square().sum()
        misfit = torch.linalg.vector_norm(found - scale * expected)
        tolerance = torch.finfo(weight.dtype).eps ** 0.5
        return scale if bool(misfit <= tolerance * torch.linalg.vector_norm(found)) else None

    def _learning(self, tensor: Tensor | None) -> nn.Parameter | None:
        named = self._of(tensor) if tensor is not None else None
        return named.parameter if named is not None else None

    def _name(self, use: Use) -> str:
        named = self._of(use.weight)
        return named.name if named is not None else "a weight"

    def _unchanged(self) -> list[tuple[Tensor, Tensor]]:
        """The rows kept.

        Raises:
            BackpassError: something was written into them since the backward pass.
        """
        kept = self.rows or []
        if [rows._version for rows, _ in kept] != self._versions[: len(kept)]:
            raise BackpassError(
                "the input of a layer was overwritten between the backward pass and the optimizer's step, and "
                "union=True still needs it: write into a copy."
            )
        return kept
