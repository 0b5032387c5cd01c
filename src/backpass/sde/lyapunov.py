"""Lyapunov equations: the covariance of a linear process, in continuous time and in steps."""

from __future__ import annotations

import torch
from torch import Tensor

from backpass.errors import BackpassError

__all__ = ["relaxation_rate", "solve_discrete_lyapunov", "solve_lyapunov"]

_ITERATIONS = 100


def relaxation_rate(H: Tensor) -> float:
    """Min Re eig(H), the slowest rate at which dx = -H x dt forgets its start, H: (P, P)."""
    return float(torch.linalg.eigvals(H).real.min())


def solve_lyapunov(H: Tensor, Q: Tensor) -> Tensor:
    r"""The C with H C + C H^T = Q, the covariance of dx = -H x dt + Q^{1/2} dW.

    By Newton's iteration for the matrix sign, :math:`H \leftarrow \tfrac12 (H/c + c H^{-1})`,
    :math:`Q \leftarrow \tfrac12 (Q/c + c H^{-1} Q H^{-T})`: H goes to I, Q to 2 C, quadratically, also where H is not
    symmetric and cannot be diagonalized.

    Args:
        H: (P, P) with eigenvalues of positive real part.
        Q: (P, P), symmetric.

    Raises:
        BackpassError: an eigenvalue of H has no positive real part, so there is no stationary covariance.

    Source: Roberts, Linear model reduction and solution of the algebraic Riccati equation by use of the sign function
    (1980).
    """
    _check_square(H, Q)
    rate = relaxation_rate(H)
    if not rate > 0:
        raise BackpassError(
            f"H must have eigenvalues of positive real part only, the smallest here is {rate:g}: some direction is "
            "not pulled back, so the law never becomes stationary. Is this a minimum, are there flat directions? "
            "Weight decay removes them."
        )
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    tolerance = 10 * len(H) * torch.finfo(H.dtype).eps
    for _ in range(_ITERATIONS):
        inverse = torch.linalg.inv(H)
        scale = float((torch.linalg.matrix_norm(H) / torch.linalg.matrix_norm(inverse)).sqrt())
        if torch.linalg.matrix_norm(H - eye) < 0.1:
            scale = 1.0  # near the solution the plain iteration converges quadratically
        Q = (Q / scale + scale * inverse @ Q @ inverse.mT) / 2
        last, H = H, (H / scale + scale * inverse) / 2
        if torch.linalg.matrix_norm(H - last) <= tolerance * torch.linalg.matrix_norm(H):
            return (Q + Q.mT) / 4
    raise BackpassError(f"the Lyapunov equation of a {len(H)} x {len(H)} matrix did not converge: H is near singular.")


def solve_discrete_lyapunov(A: Tensor, Q: Tensor) -> Tensor:
    """The C with C = A C A^T + Q, the covariance of x' = A x + Q^{1/2} xi, by doubling.

    Args:
        A: (P, P) with eigenvalues inside the unit circle.
        Q: (P, P), symmetric.

    Raises:
        BackpassError: an eigenvalue of A has modulus 1 or more: the steps are too long, or a direction is flat.
    """
    _check_square(A, Q)
    radius = float(torch.linalg.eigvals(A).abs().max())
    if not radius < 1:
        raise BackpassError(
            f"the eigenvalues of a step must lie inside the unit circle, the largest here has modulus {radius:g}: "
            "take a smaller learning rate, or remove flat directions by weight decay."
        )
    C, eps = Q, torch.finfo(Q.dtype).eps
    for _ in range(_ITERATIONS):
        more = A @ C @ A.mT
        C, A = C + more, A @ A
        if torch.linalg.matrix_norm(more) <= eps * torch.linalg.matrix_norm(C):
            break
    return (C + C.mT) / 2


def _check_square(H: Tensor, Q: Tensor) -> None:
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.shape != Q.shape:
        raise BackpassError(f"two square matrices of one size are expected, got {tuple(H.shape)} and {tuple(Q.shape)}.")
    if not (torch.isfinite(H).all() and torch.isfinite(Q).all()):
        raise BackpassError("a matrix has values that are NaN or infinite: has the process diverged?")
