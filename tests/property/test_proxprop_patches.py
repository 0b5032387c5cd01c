"""Patches and their Gram matrices, for every geometry, against the convolution that torch computes."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from backpass.rules.implicit.convolution import (
    correlated_gram,
    patch_count,
    patch_gram,
    patch_rows,
    patch_sums,
    unfolded_gram,
)

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def geometries(draw):
    dims = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation = each(1, 4), each(1, 3), each(1, 2)
    sizes = tuple((k - 1) * d + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilation, strict=True))
    groups, channels = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    x = torch.randn(2, groups * channels, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(dims))
    return x, kernel, stride, dilation, groups


def dense_gram(x, kernel, stride, dilation, groups):
    a = patch_rows(x, kernel, stride, dilation, groups)
    return a.mT @ a


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_rows_times_weight_is_the_convolution(geometry):
    x, kernel, stride, dilation, groups = geometry
    weight = torch.randn(groups * 2, x.shape[1] // groups, *kernel, dtype=torch.float64)
    z = CONVOLUTIONS[len(kernel)](x, weight, None, stride, 0, dilation, groups)
    rows = patch_rows(x, kernel, stride, dilation, groups) @ weight.reshape(groups, 2, -1).mT
    rows = rows.reshape(groups, len(x), *patch_count(x, kernel, stride, dilation), 2).movedim((0, -1), (1, 2))
    torch.testing.assert_close(rows.reshape(z.shape), z)


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_both_exact_ways_give_the_gram_matrix_of_the_rows(geometry):
    x, kernel, _, _, groups = geometry
    expected = dense_gram(*geometry)
    torch.testing.assert_close(unfolded_gram(*geometry), expected, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(patch_gram(*geometry), expected, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(patch_sums(*geometry), patch_rows(*geometry).sum(1), rtol=1e-13, atol=1e-12)
    dense = dense_gram(x, kernel, (1,) * len(kernel), (1,) * len(kernel), groups)
    torch.testing.assert_close(correlated_gram(x, kernel, groups), dense, rtol=1e-13, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(geometries())
def test_without_the_border_s_windows_the_gram_matrix_is_larger_and_block_toeplitz(geometry):
    x, kernel, _, _, groups = geometry
    exact, larger = correlated_gram(x, kernel, groups), correlated_gram(x, kernel, groups, border=False)
    assert torch.linalg.eigvalsh(larger - exact).min() > -1e-11
    blocks = larger.reshape(groups, x.shape[1] // groups, *kernel, x.shape[1] // groups, *kernel)
    # One step along the first dimension in both indices changes nothing.
    here = blocks.narrow(2, 0, kernel[0] - 1).narrow(3 + len(kernel), 0, kernel[0] - 1)
    there = blocks.narrow(2, 1, kernel[0] - 1).narrow(3 + len(kernel), 1, kernel[0] - 1)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-11)


def test_a_batch_beyond_one_chunk_gives_the_same():
    x = torch.randn(40, 4, 40, 40, dtype=torch.float64)
    geometry = (x, (5, 5), (1, 1), (1, 1), 1)
    expected = dense_gram(*geometry)
    scale = expected.diagonal(dim1=1, dim2=2).max()
    assert (unfolded_gram(*geometry) - expected).abs().max() < 1e-13 * scale
    assert (correlated_gram(x, (5, 5), 1) - expected).abs().max() < 1e-13 * scale
