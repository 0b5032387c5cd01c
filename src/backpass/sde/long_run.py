"""The stationary law near a minimum: where it sits, how wide it is, how fast it is reached."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import jacfwd, jvp, vmap

from backpass.errors import BackpassError
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.lyapunov import relaxation_rate, solve_discrete_lyapunov, solve_lyapunov
from backpass.sde.problem import check_theta

__all__ = ["Stationary", "find_zero", "stationary"]

_NEWTON_STEPS = 100
_HALVINGS = 30


@dataclass(frozen=True, kw_only=True)
class Stationary:
    """The stationary law of dTheta = -b(Theta) dt + sqrt(eta) S^{1/2} dW near theta with b(theta) = 0.

    Attributes:
        theta: (P,), the minimum of the loss that adversarial training descends, b(theta) = 0.
        mean: (P,), of the law, theta - H^{-1} (D^2 b : C) / 2; its error is O(eta^2).
        covariance: (P, P), the C with H C + C H^T = eta S; relative error O(eta).
        chain_covariance: (P, P), the C with C = A C A^T + eta^2 S, A = I - eta Dh: that of the chain, exact where
            the gradient is linear and its noise constant.
        jacobian: (P, P), H = Db, b = h + eta/2 (Dh) h.
        noise: (P, P), S at theta, without eta.
        rate: min Re eig(H), per unit of SDE time: after t all means have come e^{-rate t} closer.
        clean: (P,), the minimum theta* of the clean loss next to theta; None where there is none.
        shift: (P,), what theta - clean is to first order in the adversary, -K eta_I Hess(G)^{-1} grad V for gradient
            ascent; None where ``clean`` is.
    """

    theta: Tensor
    mean: Tensor
    covariance: Tensor
    chain_covariance: Tensor
    jacobian: Tensor
    noise: Tensor
    rate: float
    clean: Tensor | None
    shift: Tensor | None


def stationary(sde: AdversarialSDE, theta0: Tensor, *, degenerate: bool = False) -> Stationary:
    """Find the minimum next to theta0 and linearise there: H C + C H^T = eta S.

    Needs matrices of the size of the parameters: for analysis, some hundred of them. The law is that of the SDE in
    its mode and order as far as this metastable minimum goes: with several minima the true stationary law mixes them.

    Args:
        sde: in ``mode="exact"`` to predict, ``"expanded"`` to explain.
        theta0: (P,), where Newton's method starts.
        degenerate: accept noise of a rank below P; minibatches of N samples give rank N - 1 at most, so with more
            parameters the law lives on a part of the space and has no density.

    Raises:
        BackpassError: no zero of the drift is found, it is no minimum, or the noise is singular.

    Example:
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        >>> y = x[:, 0] + 0.1 * (8 * x[:, 0]).cos()
        >>> sde = AdversarialSDE(lambda theta, x, y: (x @ theta - y).square() / 2, (x, y), eta_outer=0.1)
        >>> law = stationary(sde, torch.zeros(1, dtype=torch.float64))
        >>> round(law.rate, 3)
        0.512
    """
    if not isinstance(sde, AdversarialSDE):
        raise BackpassError(f"stationary takes an AdversarialSDE, got {type(sde).__name__}.")
    check_theta(theta0, sde.data[0])
    if theta0.ndim != 1:
        raise BackpassError(f"theta0 is one start (P,) for Newton's method, got shape {tuple(theta0.shape)}.")
    theta = find_zero(sde, theta0)
    H = -_jacobian(sde, theta)
    S, eta = sde.covariance(theta), sde.eta_outer
    rank = int(torch.linalg.matrix_rank(S, hermitian=True))
    if rank < len(S) and not degenerate:
        raise BackpassError(
            f"the noise at the minimum has rank {rank} of {len(S)}, so the law has no density and does not forget its "
            f"start in every direction: {sde.noise_dim} samples give rank {sde.noise_dim - 1} at most, and a loss that "
            "is fitted exactly gives none. Pass degenerate=True for the covariance on the part that the noise reaches."
        )
    C = solve_lyapunov(H, eta * S)
    step = torch.eye(len(H), dtype=H.dtype, device=H.device) + eta * _jacobian(
        replace(sde, mode="exact", order=1), theta
    )
    clean, shift = _clean(sde, theta)
    return Stationary(
        theta=theta,
        mean=theta - torch.linalg.solve(H, _second_derivative(sde, theta, C)) / 2,
        covariance=C,
        chain_covariance=solve_discrete_lyapunov(step, eta**2 * S),
        jacobian=H,
        noise=S,
        rate=relaxation_rate(H),
        clean=clean,
        shift=shift,
    )


def find_zero(sde: AdversarialSDE, theta: Tensor) -> Tensor:
    """Find a zero of the drift by Newton's method, with steps halved until the drift's norm falls."""
    drift = sde.drift(theta)
    scale = float(drift.norm()) + float(sde.covariance(theta).diagonal().sum().sqrt())
    goal = torch.finfo(theta.dtype).eps ** 0.75 * max(scale, torch.finfo(theta.dtype).tiny)
    for _ in range(_NEWTON_STEPS):
        size = float(drift.norm())
        if size <= goal:
            return theta
        # Not lstsq: its default driver reads pivots from memory that no one has set, and then misjudges the rank.
        direction = -(torch.linalg.pinv(_jacobian(sde, theta)) @ drift)
        for halving in range(_HALVINGS):
            trial = theta + direction * 0.5**halving
            there = sde.drift(trial)
            if float(there.norm()) < size:
                theta, drift = trial, there
                break
        else:
            break
    raise BackpassError(
        f"no zero of the drift was found from this theta0; the norm is {float(drift.norm()):.3g}. Start closer to a "
        "minimum, for instance at the end of `integrate`; with sign steps or a ball the drift jumps and may have none."
    )


def _jacobian(sde: AdversarialSDE, theta: Tensor) -> Tensor:
    jacobian: Tensor = jacfwd(sde.drift)(theta)
    return jacobian


def _second_derivative(sde: AdversarialSDE, theta: Tensor, C: Tensor) -> Tensor:
    """D^2 b : C with b = -drift, as a sum of second derivatives along the scaled eigenvectors of C; (P,)."""
    values, vectors = torch.linalg.eigh(C)
    columns = (vectors * values.clamp(min=0).sqrt()).mT

    def along(v: Tensor) -> Tensor:
        def first(at: Tensor) -> Tensor:
            derivative: Tensor = jvp(sde.drift, (at,), (v,))[1]
            return derivative

        second: Tensor = jvp(first, (theta,), (v,))[1]
        return second

    return -vmap(along)(columns).sum(0)


def _clean(sde: AdversarialSDE, theta: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The clean minimum next to theta, and the first-order shift from there; Nones where there is none."""
    plain = replace(sde, steps=0, mode="exact", order=1)
    try:
        minimum = find_zero(plain, theta)
    except BackpassError:
        return None, None
    hessian = -_jacobian(plain, minimum)
    if not relaxation_rate(hessian) > 0:
        return None, None
    # At a zero of grad G all that is left of the expanded drift is the adversary's.
    return minimum, torch.linalg.solve(hessian, replace(sde, mode="expanded", order=2).drift(minimum))
