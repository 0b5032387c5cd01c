"""Gram matrices of the rows that a linear layer sees: A A^T over pairs of rows, and A^T A over pairs of columns.

A is (groups, rows, columns); with ``ones`` a column of ones, the bias's, is thought to stand after the last column.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["bordered", "column_gram", "row_gram"]

_BLOCK = 256
"""From this size on a CPU computes a symmetric product by blocks: half of it is enough."""


def row_gram(rows: Tensor, ones: bool = False) -> Tensor:
    """A A^T.

    Args:
        rows: A, (groups, n, d).
        ones: whether A has a column of ones besides, which adds 1 to every entry.

    Returns:
        (groups, n, n), symmetric.
    """
    gram = _times_transpose(rows)
    return gram.add_(1.0) if ones else gram


def column_gram(rows: Tensor, ones: bool = False) -> Tensor:
    """A^T A.

    Args:
        rows: A, (groups, n, d).
        ones: whether A has a column of ones besides; the last row and column of the result are then its.

    Returns:
        (groups, d, d) or (groups, d + 1, d + 1), symmetric.
    """
    gram = _times_transpose(rows.mT)
    return bordered(gram, rows.sum(1), rows.shape[1]) if ones else gram


def bordered(gram: Tensor, sums: Tensor, count: int) -> Tensor:
    """The Gram matrix with the column of ones: ``gram`` (groups, d, d) between ``sums`` (groups, d) and ``count``."""
    gram = pad(gram, (0, 1, 0, 1), value=float(count))
    gram[:, -1, :-1] = sums
    gram[:, :-1, -1] = sums
    return gram


def _times_transpose(m: Tensor) -> Tensor:
    """M M^T of each (n, d) matrix; on a CPU the lower triangle is computed by blocks and mirrored."""
    n = m.shape[-2]
    if n < 2 * _BLOCK - 32 or m.device.type != "cpu":
        return m @ m.mT
    gram = m.new_empty(*m.shape[:-1], n)
    edges = [n * i // -(-n // _BLOCK) for i in range(-(-n // _BLOCK) + 1)]
    for product, matrix in zip(gram, m, strict=True):
        for start, stop in pairwise(edges):
            torch.mm(matrix[start:stop], matrix[:stop].mT, out=product[start:stop, :stop])
            product[:start, start:stop] = product[start:stop, :start].mT
    return gram
