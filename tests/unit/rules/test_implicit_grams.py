"""Gram matrices: the products that they are, on small matrices and on those computed by blocks."""

import pytest
import torch

from backpass.rules.implicit.systems import column_gram, row_gram


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 3, 7), (4, 5, 2), (1, 600, 9), (2, 700, 3)])
def test_row_gram_is_a_times_its_transpose(shape):
    a = rows(*shape)
    torch.testing.assert_close(row_gram(a), torch.einsum("bnd,bmd->bnm", a, a), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 7, 3), (4, 2, 5), (1, 9, 600)])
def test_column_gram_is_the_transpose_times_a(shape):
    a = rows(*shape)
    torch.testing.assert_close(column_gram(a), torch.einsum("bnd,bne->bde", a, a), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 3, 5)])
def test_ones_are_a_last_column_of_ones(shape):
    a = rows(*shape)
    wide = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    torch.testing.assert_close(column_gram(a, ones=True), wide.mT @ wide)
    torch.testing.assert_close(row_gram(a, ones=True), wide @ wide.mT)


def test_the_result_is_symmetric_to_the_bit():
    gram = row_gram(rows(1, 777, 20).float())
    assert torch.equal(gram, gram.mT)
