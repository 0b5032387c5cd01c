"""Damped systems: the direct solve with its escalation, and conjugate gradients."""

import pytest
import torch
from torch import Tensor

from backpass.rules.implicit.systems import NotFiniteError, conjugate_gradients, solve


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def system_of(gram: Tensor, right: Tensor, asked: list[torch.dtype]):
    def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        asked.append(dtype)
        return gram.to(dtype, copy=True), None if right is None else right.to(dtype)

    return system


def test_a_well_conditioned_system_is_solved_in_float32():
    a, right, asked = random(2, 6, 9), random(2, 6, 3), []
    solution = solve(system_of(a @ a.mT, right, asked), lambda gram: 0.5, torch.float32, 1e-7)[0]
    expected = torch.linalg.solve(a @ a.mT + 0.5 * torch.eye(6, dtype=a.dtype), right)
    assert asked == [torch.float32]
    assert solution.dtype == torch.float32
    torch.testing.assert_close(solution.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_system_too_hard_for_float32_is_computed_anew_in_float64():
    # Five equal rows of length 5: in float32 the damping is lost, and the second pivot is 25 - 5 * 5 on any machine.
    a, right, asked = torch.tensor([1.0, 2, 2, 4]).double().expand(1, 5, 4), random(1, 5, 2), []
    damping = 1e-8
    solution = solve(system_of(a @ a.mT, right, asked), lambda gram: damping, torch.float32, 1e-7)[0]
    assert asked == [torch.float32, torch.float64]
    # The part in the range of K, all that a layer sees of it; eps / damping is 2e-8.
    torch.testing.assert_close(a.mT @ solution, a.mT @ right / (a.square().sum() + damping))


def test_a_system_too_hard_for_float64_is_solved_by_eigenvalues():
    a, right, asked = random(1, 1, 4).expand(1, 5, 4), random(1, 5, 2), []
    solution = solve(system_of(a @ a.mT * 1e8, right, asked), lambda gram: 1e-30, torch.float64, 1e-7)[0]
    assert asked == [torch.float64, torch.float64]
    expected = torch.linalg.pinv(a @ a.mT * 1e8, hermitian=True) @ right
    torch.testing.assert_close(solution, expected, rtol=1e-9, atol=0)


def test_what_is_not_finite_is_an_error():
    gram = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    gram[0, 1, 1] = float("inf")
    with pytest.raises(NotFiniteError, match="not finite"):
        solve(system_of(gram, random(1, 3, 2), []), lambda gram: 1.0, torch.float32, 1e-7)[0]


def textbook(matrix: Tensor, right: Tensor, steps: int) -> Tensor:
    """Hestenes and Stiefel, on one long vector."""
    x, r = torch.zeros_like(right), right.clone()
    p = r.clone()
    for _ in range(steps):
        alpha = (r @ r) / (p @ (matrix @ p))
        x, before = x + alpha * p, r
        r = r - alpha * (matrix @ p)
        p = r + (r @ r) / (before @ before) * p
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_conjugate_gradients_are_the_textbook_s_on_the_whole_layer(steps):
    a, g = random(2, 8, 5), random(2, 8, 3)
    right = a.mT @ g
    whole = torch.block_diag(*[torch.kron(b.T @ b, torch.eye(3, dtype=b.dtype)) for b in a])
    whole = whole + 0.3 * torch.eye(len(whole), dtype=a.dtype)
    expected = textbook(whole, right.flatten(), steps).view_as(right)
    found = conjugate_gradients(a.mT @ a, right, 0.3, steps, by_column=False, rows=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_by_column_each_output_is_a_system_of_its_own(steps):
    a, g = random(1, 8, 5), random(1, 8, 3)
    matrix, right = a[0].T @ a[0] + 0.3 * torch.eye(5, dtype=a.dtype), a[0].T @ g[0]
    expected = torch.stack([textbook(matrix, column, steps) for column in right.T], 1)
    found = conjugate_gradients(a.mT @ a, a.mT @ g, 0.3, steps, by_column=True, rows=False)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [3, 8])
def test_iterating_on_rows_gives_the_iterates_on_columns(steps, n, by_column):
    a, g = random(2, n, 5), random(2, n, 3)
    on_columns = conjugate_gradients(a.mT @ a, a.mT @ g, 0.3, steps, by_column, rows=False)
    on_rows = a.mT @ conjugate_gradients(a @ a.mT, g, 0.3, steps, by_column, rows=True)
    torch.testing.assert_close(on_rows, on_columns, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_scaling_the_right_side_scales_the_solution(rows, by_column):
    a, g = random(1, 4, 4), random(1, 4, 2)
    one, many = (conjugate_gradients(a @ a.mT, r, 0.3, 3, by_column, rows) for r in (g, g * 2.0**-40))
    assert torch.equal(many, one * 2.0**-40)


@pytest.mark.parametrize("rows", [False, True])
def test_an_iteration_that_has_arrived_stays(rows):
    gram = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    right = random(1, 3, 2)
    torch.testing.assert_close(conjugate_gradients(gram, right, 1.0, 50, False, rows), right / 2)
    nothing = torch.zeros_like(right)
    assert torch.equal(conjugate_gradients(gram, nothing, 1.0, 3, False, rows), nothing)


def test_without_a_right_side_the_solution_is_the_inverse():
    a = random(2, 6, 9)
    found, added = solve(system_of(a @ a.mT, None, []), lambda gram: 0.5, torch.float64, 0.0)
    torch.testing.assert_close(found @ (a @ a.mT + added * torch.eye(6)), torch.eye(6).double().expand(2, 6, 6))
