"""The stationary law of training that permutes its samples in every epoch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from backpass.errors import BackpassError
from backpass.numbers import is_whole
from backpass.sde.dynamics import AdversarialSDE
from backpass.sde.long_run import find_zero
from backpass.sde.problem import check_theta
from backpass.sde.sampling import draw_batches

__all__ = ["PermutedLaw", "permuted_law"]

_MOST_PARAMETERS = 32


@dataclass(frozen=True, kw_only=True)
class PermutedLaw:
    """First two moments of the chain without replacement in its stationary law.

    Attributes:
        theta: (P,), the zero of the mean field h.
        mean: (P,), at the end of an epoch.
        covariance: (P, P), at the end of an epoch.
        within: (P, P), covariance around ``mean`` averaged over the steps of an epoch; it is larger.
        epoch: steps in an epoch, floor(N / B).
    """

    theta: Tensor
    mean: Tensor
    covariance: Tensor
    within: Tensor
    epoch: int


def permuted_law(
    sde: AdversarialSDE, theta0: Tensor, *, permutations: int = 2000, generator: torch.Generator | None = None
) -> PermutedLaw:
    r"""Return the stationary law of the chain whose batches are cut from a permutation in each epoch.

    With g_i linearised at the zero of h, :math:`g_i \approx \xi_i + J_i x`, one epoch is an affine map x -> M x + r,
    with M the product of I - eta J over its batches. The moments solve :math:`m = E[M] m + E[r]` and
    :math:`Q = E[(M x + r)(M x + r)^\top]`; the means over permutations are taken over a sample of them, so the
    covariance has a relative standard error of about :math:`\sqrt{2 / \mathrm{permutations}}`.

    The batches of an epoch sum to the full gradient, so their noise cancels to first order: with M and r expanded in
    eta, r = eta^2 sum_{j<k} J_k xi_j + O(eta^3), and the covariance at the end of an epoch is of order eta^3 N / B in
    the place of the eta of batches drawn with replacement. The SDE, whose noise is white, does not describe this.

    Args:
        sde: the process, with at most 32 parameters; its mode does not matter, the chain is meant.
        theta0: (P,), where Newton's method for the zero of h starts.
        permutations: sampled for the means, >= 10.
        generator: of the permutations.

    Raises:
        BackpassError: there is no zero, the chain is unstable there, or a setting is out of its range.

    Source: derived for this project; for the setting compare arXiv 2312.16143.
    """
    if not isinstance(sde, AdversarialSDE):
        raise BackpassError(f"sde must be an AdversarialSDE, got {type(sde).__name__}.")
    check_theta(theta0, sde.data[0])
    if theta0.ndim != 1 or len(theta0) > _MOST_PARAMETERS or not is_whole(permutations, 10):
        raise BackpassError(
            f"expected theta0 of shape (P,) with P <= {_MOST_PARAMETERS} and at least 10 permutations, got "
            f"{tuple(theta0.shape)} and {permutations!r}."
        )
    theta = find_zero(replace(sde, mode="exact", order=1), theta0)
    gradients, jacobians = _linearised(sde, theta)
    epoch, eta = sde.noise_dim // sde.batch_size, sde.eta_outer
    batches = draw_batches("permuted", sde.noise_dim, sde.batch_size, (permutations,), generator, theta.device)
    eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    product, shift = eye.expand(permutations, -1, -1), theta.new_zeros(permutations, len(theta))
    maps = []
    for _ in range(epoch):
        index = next(batches)
        step = eye - eta * jacobians[index].mean(1)
        shift = (step @ shift[..., None])[..., 0] - eta * gradients[index].mean(1)
        product = step @ product
        maps.append((product, shift))
    mean = torch.linalg.solve(eye - product.mean(0), shift.mean(0))
    second = _second_moment(product, shift, mean)
    covariance = second - mean.outer(mean)
    within = torch.stack([_propagated(one, r, second, mean) for one, r in maps]).mean(0)
    # Around the mean at the end of an epoch: E x x^T - m E x^T - E x m^T + m m^T.
    first = torch.stack([(one @ mean + r).mean(0) for one, r in maps]).mean(0)
    within = within - mean.outer(first) - first.outer(mean) + mean.outer(mean)
    return PermutedLaw(theta=theta, mean=theta + mean, covariance=covariance, within=within, epoch=epoch)


def _linearised(sde: AdversarialSDE, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return g_i (N, P) and its derivative J_i (N, P, P), which passes through the attack."""
    x, y = sde.data

    def one(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return sde.gradient_at(p, x[None], y[None])

    jacobians: Tensor = vmap(jacfwd(one), (None, 0, 0))(theta, x, y)
    gradients: Tensor = vmap(one, (None, 0, 0))(theta, x, y)
    return gradients, jacobians


def _propagated(product: Tensor, shift: Tensor, second: Tensor, mean: Tensor) -> Tensor:
    """Return E (M x + r)(M x + r)^T for x of these moments."""
    cross = (product @ mean)[:, :, None] * shift[:, None, :]
    terms = product @ second @ product.mT + cross + cross.mT + shift[:, :, None] * shift[:, None, :]
    return terms.mean(0)


def _second_moment(product: Tensor, shift: Tensor, mean: Tensor) -> Tensor:
    """Solve Q = E[M Q M^T] + the terms of `_propagated` without Q."""
    size = len(mean)
    coupled = torch.einsum("rij,rkl->ikjl", product, product).reshape(size**2, size**2) / len(product)
    radius = float(torch.linalg.eigvals(coupled).abs().max())
    if not radius < 1:
        raise BackpassError(
            f"an epoch multiplies squared deviations by up to {radius:.3g}: the chain is unstable here. Use a smaller "
            "eta_outer."
        )
    rest = _propagated(product, shift, torch.zeros_like(mean.outer(mean)), mean).reshape(-1)
    eye = torch.eye(size**2, dtype=mean.dtype, device=mean.device)
    solution: Tensor = torch.linalg.solve(eye - coupled, rest).view(size, size)
    return solution
