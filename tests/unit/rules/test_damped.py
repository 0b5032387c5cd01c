"""Damped systems: the direct solve with its escalation, and conjugate gradients."""

import pytest
import torch
from torch import Tensor

from backpass.rules.damped import NotFiniteError, conjugate_gradients, conjugate_gradients_by_rows, solve


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def system_of(gram: Tensor, right: Tensor, asked: list[torch.dtype]):
    def system(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        asked.append(dtype)
        return gram.to(dtype, copy=True), right.to(dtype)

    return system


def test_a_well_conditioned_system_is_solved_in_float32():
    a, right, asked = random(2, 6, 9), random(2, 6, 3), []
    solution = solve(system_of(a @ a.mT, right, asked), 0.5, torch.float32, 1e-7)
    expected = torch.linalg.solve(a @ a.mT + 0.5 * torch.eye(6, dtype=a.dtype), right)
    assert asked == [torch.float32]
    assert solution.dtype == torch.float32
    torch.testing.assert_close(solution.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_system_too_hard_for_float32_is_computed_anew_in_float64():
    # Five equal rows of length 5: in float32 the damping is lost, and the second pivot is 25 - 5 * 5 on any machine.
    a, right, asked = torch.tensor([1.0, 2, 2, 4]).double().expand(1, 5, 4), random(1, 5, 2), []
    damping = 1e-8
    solution = solve(system_of(a @ a.mT, right, asked), damping, torch.float32, 1e-7)
    assert asked == [torch.float32, torch.float64]
    # The part in the range of K, all that a layer sees of it; eps / damping is 2e-8.
    torch.testing.assert_close(a.mT @ solution, a.mT @ right / (a.square().sum() + damping))


def test_a_system_too_hard_for_float64_is_solved_by_eigenvalues():
    a, right, asked = random(1, 1, 4).expand(1, 5, 4), random(1, 5, 2), []
    solution = solve(system_of(a @ a.mT * 1e8, right, asked), 1e-30, torch.float64, 1e-7)
    assert asked == [torch.float64, torch.float64]
    expected = torch.linalg.pinv(a @ a.mT * 1e8, hermitian=True) @ right
    torch.testing.assert_close(solution, expected, rtol=1e-9, atol=0)


def test_what_is_not_finite_is_an_error():
    gram = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    gram[0, 1, 1] = float("inf")
    with pytest.raises(NotFiniteError, match="not finite"):
        solve(system_of(gram, random(1, 3, 2), []), 1.0, torch.float32, 1e-7)


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
    found = conjugate_gradients(a.mT @ a, right, 0.3, steps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [3, 8])
def test_iterating_on_rows_gives_the_iterates_on_columns(steps, n):
    a, g = random(2, n, 5), random(2, n, 3)
    on_columns = conjugate_gradients(a.mT @ a, a.mT @ g, 0.3, steps)
    on_rows = a.mT @ conjugate_gradients_by_rows(a @ a.mT, g, 0.3, steps)
    torch.testing.assert_close(on_rows, on_columns, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [conjugate_gradients, conjugate_gradients_by_rows])
def test_scaling_the_right_side_scales_the_solution(solver):
    a, g = random(1, 4, 4), random(1, 4, 2)
    one, many = solver(a @ a.mT, g, 0.3, 3), solver(a @ a.mT, g * 2.0**-40, 0.3, 3)
    assert torch.equal(many, one * 2.0**-40)


@pytest.mark.parametrize("solver", [conjugate_gradients, conjugate_gradients_by_rows])
def test_an_iteration_that_has_arrived_stays(solver):
    gram = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    right = random(1, 3, 2)
    torch.testing.assert_close(solver(gram, right, 1.0, 50), right / 2)
    assert torch.equal(solver(gram, torch.zeros_like(right), 1.0, 3), torch.zeros_like(right))
