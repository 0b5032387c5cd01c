"""Rows or Gram matrix of a weight's uses, for the solve at the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from backpass.errors import BackpassError
from backpass.rules.implicit.attached import Named
from backpass.rules.implicit.layers import Gradients, LinearLayer, in_parts
from backpass.rules.implicit.proximal import ProximalStep, Rows, from_gradient, from_rows, gram, samples
from backpass.rules.implicit.systems import column_gram
from backpass.rules.implicit.uses import Use

__all__ = ["Collected", "Parameters", "gather"]

Parameters = tuple[Named | None, Named | None]


class Collected:
    """Rows of one weight's uses, or their Gram matrix A^T A once there are more rows than columns.

    Attributes:
        parameters: weight and bias, those that learn.
        name: the name of the first of them.
        layer: the layer; all uses must have the same weight matrix.
        last_pass: the backward pass of the last use.
        gram: A^T A, (blocks, columns, columns), None while rows are kept.
    """

    def __init__(self, use: Use, parameters: Parameters, step: ProximalStep, keep_rows: bool) -> None:
        self.text, self.layer, self.parameters = use.text, use.layer, parameters
        self.wants = (parameters[0] is not None, parameters[1] is not None)
        self.count = self.samples = 0
        self.last_pass = -1
        self.gram: Tensor | None = None
        self._rows: list[tuple[Tensor, Tensor, int]] = []
        self.name = next(p.name for p in parameters if p is not None)
        self._step, self._keep_rows = step, keep_rows
        self._dtype = use.grad.dtype

    @property
    def has_rows(self) -> bool:
        """True if rows are kept, and not their Gram matrix."""
        return self.gram is None

    def add(self, use: Use, parameters: Parameters, now: int) -> None:
        """Collect one use.

        Raises:
            BackpassError: the same weight was used in another way before.
        """
        layer = use.layer
        if use.text != self.text and not _same_matrix(layer, self.layer):
            raise BackpassError(
                f"{self.name!r} is shared by {self.text.split()[0]} and {use.text.split()[0]} layers that differ, or "
                "used as itself and transposed, so its uses have no common Gram matrix: leave one out by `where`."
            )
        if parameters != self.parameters:
            raise BackpassError(
                f"{self.name!r} is shared by layers with different biases, so its uses have no common Gram matrix: "
                "leave one out by `where`."
            )
        self.last_pass = now
        self.count += layer.count(use.x)
        self.samples += samples(use.x)
        few = self.count <= layer.columns(self.wants[1]) and layer.has_rows and self.wants[0]
        if few and self._keep_rows and self.has_rows:
            rows = layer.rows(use.x)
            if use.borrowed and rows.data_ptr() == use.x.data_ptr():
                rows = rows.clone()
            self._rows.append((rows, layer.output_rows(use.grad), rows._version))
            return
        x = use.x.to(self._dtype) if use.x.is_floating_point() else use.x
        more = gram(layer, x, self.wants, self._step, self._dtype)
        self.to_gram()
        self.gram = more if self.gram is None else self.gram.add_(more)

    def to_gram(self) -> None:
        """Replace the rows by their Gram matrix."""
        if self.has_rows and self._rows:
            a, parts = self.rows().a.to(self._dtype), self.layer.parts(self._step.max_side)
            self._rows = []
            self.gram = column_gram(in_parts(a, parts), self.wants[1] and parts == 1)

    def rows(self) -> Rows:
        """Return A and g of all uses.

        Raises:
            BackpassError: a layer's input was modified in place since the backward pass.
        """
        if any(rows._version != version for rows, _, version in self._rows):
            raise BackpassError(
                f"the input of the layer of {self.name!r} was overwritten between the backward pass and the "
                'optimizer\'s step, and solve="step" still needs it: write into a copy.'
            )
        if len(self._rows) == 1:
            return Rows(self._rows[0][0], self._rows[0][1], self.samples)
        a, g, _ = zip(*self._rows, strict=True)
        return Rows(torch.cat(a, 1), torch.cat(g, 1), self.samples)

    def replace_rows(self, rows: Rows) -> None:
        """Replace the rows collected here."""
        self._rows = [(rows.a, rows.g, rows.a._version)]

    def direction(self, plain: Gradients) -> Gradients:
        """Return D for the plain gradients in ``.grad``, whose memory may be overwritten with it."""
        if not self.has_rows:
            assert self.gram is not None  # noqa: S101  it is the one or the other
            kernel = self.gram
            return self._from_plain(lambda dtype: kernel.to(dtype, copy=True), self._dtype, plain)
        rows = self.rows()
        scale = self._common_scale(rows, plain)
        if scale is not None:
            assert plain[0] is not None  # noqa: S101  there are rows
            scaled = rows if scale == 1.0 else Rows(rows.a, rows.g * scale, rows.samples)
            return from_rows(self.layer, scaled, self.wants[1], self._step, out=self.layer.matrix(plain[0]))
        # The gradient was changed entry by entry (clip_grad_value_, a term of the loss), so g no longer gives it. The
        # solve from P alone loses tau |A|^2 in precision, hence float64.
        return self._from_plain(lambda dtype: column_gram(rows.a.to(dtype), self.wants[1]), torch.float64, plain)

    def _from_plain(self, kernel: Callable[[torch.dtype], Tensor], dtype: torch.dtype, plain: Gradients) -> Gradients:
        def system(dtype: torch.dtype) -> tuple[Tensor, Gradients]:
            weight, bias = (None if one is None else one.to(dtype) for one in plain)
            return kernel(dtype), (weight, bias)

        return from_gradient(self.layer, system, self.wants, (self.count, self.samples), dtype, self._step)

    def _common_scale(self, rows: Rows, plain: Gradients) -> float | None:
        """Return the c with P = c g^T A, which unscaling, clipping by norm and averaging leave; None if none fits.

        Both sides are compared on one fixed vector of random signs. A c that rounding cannot tell from 1 is 1.
        """
        a, g = rows.a, rows.g
        signs = torch.full((a.shape[-1] + 1, 1), 0.5).bernoulli(generator=torch.Generator().manual_seed(0))
        signs = (2 * signs - 1).to(g)
        of_rows, (weight, bias) = a.to(g.dtype) @ signs[:-1], plain
        assert weight is not None  # noqa: S101  there are rows
        found = self.layer.matrix(weight).to(g.dtype) @ signs[:-1]
        if bias is not None:
            of_rows, found = of_rows + signs[-1], found + self.layer.bias_matrix(bias) * signs[-1]
        expected = g.mT @ of_rows
        scale = float((found * expected).sum() / expected.square().sum())
        misfit = torch.linalg.vector_norm(found - scale * expected)
        eps = torch.finfo(weight.dtype).eps
        if not bool(misfit <= eps**0.5 * torch.linalg.vector_norm(found)):
            return None
        return 1.0 if abs(scale - 1) < eps**0.7 else scale


def _same_matrix(one: LinearLayer, other: LinearLayer) -> bool:
    """Return True if two layers of one weight have the same outputs and columns, and so a common Gram matrix."""
    positions = torch.arange(torch.Size(one.shape).numel()).reshape(one.shape)
    return torch.equal(one.matrix(positions), other.matrix(positions))


def gather(names: Sequence[str], collected: dict[str, Collected]) -> None:
    """Sum the contributions of all processes; each must call this with the same names in the same order.

    Gram matrices are summed. Where the rows of all processes together are few, the rows are exchanged.

    Raises:
        BackpassError: a weight was used in some processes only.
    """
    here = [collected.get(name) for name in names]
    table = [[one.count, one.samples, int(not one.has_rows)] if one else [0, 0, 0] for one in here]
    everywhere: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, table)
    for position, name in enumerate(names):
        counts = [process[position][0] for process in everywhere]
        if not any(counts):
            continue
        one = here[position]
        if one is None or not all(counts):
            unused = [rank for rank, count in enumerate(counts) if not count]
            raise BackpassError(
                f'{name!r} was used in some processes but not in {unused}: solve="step" needs each process to use the '
                "same layers in each step."
            )
        has_gram = any(process[position][2] for process in everywhere)
        if has_gram or sum(counts) > one.layer.columns(one.wants[1]):
            one.to_gram()
            dist.all_reduce(one.gram)
        else:
            rows = one.rows()
            one.replace_rows(Rows(_exchange(rows.a, counts), _exchange(rows.g, counts), rows.samples))
        one.count = sum(counts)
        one.samples = sum(process[position][1] for process in everywhere)


def _exchange(tensor: Tensor, counts: list[int]) -> Tensor:
    """Gather the (blocks, n, columns) tensors of all processes along n."""
    longest = max(counts)
    padded = tensor.new_zeros(tensor.shape[0], longest, tensor.shape[2])
    padded[:, : tensor.shape[1]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], 1)
