"""Interpolation and differentiation on Chebyshev nodes: exact for the polynomials that the nodes carry."""

import pytest
import torch

from backpass import BackpassError
from backpass.sde.chebyshev import ChebyshevGrid
from support.sde import D


def cubic(p):
    return p[..., 0] ** 3 - 2 * p[..., 0] + 1


def saddle(p):
    return p[..., 0] ** 3 * p[..., 1] - p[..., 1] ** 4


def test_interpolation_is_exact_for_polynomials_inside_and_outside_of_the_box():
    line, plane = ChebyshevGrid([(-1.0, 3.0)], 5), ChebyshevGrid([(-1.0, 3.0), (0.0, 2.0)], 6)
    at = torch.tensor([[-1.2], [0.4], [3.0], [3.1]], dtype=D)
    torch.testing.assert_close(line.interpolation(at) @ cubic(line.points), cubic(at))
    at = torch.tensor([[[-1.2, 0.3]], [[2.9, 2.2]]], dtype=D)
    torch.testing.assert_close(plane.interpolation(at) @ saddle(plane.points), saddle(at))


def test_at_a_node_interpolation_reads_the_value_there():
    grid = ChebyshevGrid([(-1.0, 3.0), (0.0, 2.0)], 5)
    torch.testing.assert_close(grid.interpolation(grid.points), torch.eye(25, dtype=D), rtol=0, atol=0)


def test_derivatives_are_exact_for_polynomials():
    grid = ChebyshevGrid([(-1.0, 3.0), (0.0, 2.0)], 6)
    x, y = grid.points.T
    first, second = grid.derivatives
    torch.testing.assert_close(first @ saddle(grid.points), 3 * x**2 * y)
    torch.testing.assert_close(second @ saddle(grid.points), x**3 - 4 * y**3)
    torch.testing.assert_close(second @ first @ saddle(grid.points), 3 * x**2)
    assert (first.sum(1).abs() < 1e-13).all()


@pytest.mark.parametrize(
    ("bounds", "nodes", "message"),
    [
        ([(0.0, 1.0)] * 3, 5, "one or two dimensions"),
        ([(1.0, 0.0)], 5, "low < high"),
        ([(0.0, 1.0)], 21, "from 4 to 20"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(bounds, nodes, message):
    with pytest.raises(BackpassError, match=message):
        ChebyshevGrid(bounds, nodes)
