"""The stochastic differential equation of adversarial training, and the chain that it models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp, vmap

from backpass.errors import BackpassError, UnknownNameError
from backpass.numbers import is_whole
from backpass.sde.derivative import along
from backpass.sde.inner import Direction, InnerLoop, Regulariser
from backpass.sde.ito import TorchSDE
from backpass.sde.problem import Data, Loss, check_data, check_losses, check_rate, check_theta

__all__ = ["AdversarialSDE"]


@dataclass(frozen=True, eq=False)
class AdversarialSDE:
    """dTheta = -[h + eta/2 (Dh) h] dt + sqrt(eta) S^{1/2} dW: adversarial training by alternating SGD, to order 2.

    The chain is theta' = theta - eta_outer (1/B) sum_j g(theta, x_j) with x_j drawn uniformly and independently,
    g = d/dtheta L(theta, x + delta_K(theta, x)) at fixed delta_K, and delta_K from K = `steps` steps of the inner
    loop. h = E g is its mean field and S = Cov(g) / B; time is t = k eta_outer after k steps. A trainer that permutes
    the samples in each epoch has the same drift but far less noise in the long run: see `permuted_law`.

    - ``mode="exact"`` keeps the attack as it is: order 2 in eta_outer whatever eta_inner. Use it to predict.
    - ``mode="expanded"`` is for eta_inner = O(eta_outer): drift -[grad G + eta/2 (Hess G) grad G + grad_theta
      E <L_x, delta>], with delta from the inner loop on the loss linearised in delta, and the noise of plain SGD.
      For gradient ascent the last term is grad [K eta_inner/2 E|L_x|^2]: that one term is the robustness.
    - ``order=1`` leaves out the terms of order eta: drift -h, or -grad G where expanded.

    All methods take theta as one path (P,) or several (M, P), give results with the same leading shape, work inside
    `torch.func` transforms, and are differentiable in theta, eta_outer, eta_inner and the data.

    Args:
        loss: loss(theta, x, y) -> (N,), see `from_module` for a network.
        data: (x, y), each with N rows; the adversary moves x alone.
        eta_outer: the learning rate, > 0; a number, or a tensor () to differentiate with respect to it.
        batch_size: B >= 1, drawn with replacement.
        steps: K >= 0 of the inner loop; 0 is plain SGD.
        eta_inner: the adversary's step size, >= 0; a number or a tensor ().
        lam: weight of the penalty R on the perturbation.
        regulariser: R, (N, ...) -> (N,); None for |delta|^2 / 2.
        inner: the adversary follows the ``"gradient"``, its ``"sign"``, or a function of the gradient.
        eps: radius of the ball for the perturbation: l_inf for ``"sign"``, l_2 otherwise; None for no ball.
        unrolled: differentiate through the perturbation too, as the chain and in h.
        mode: ``"exact"`` or ``"expanded"``.
        order: 2, or 1.

    Raises:
        BackpassError: a setting is out of its range, or the data are not finite.

    Example:
        >>> x, y = torch.randn(8, 3), torch.randn(8)
        >>> sde = AdversarialSDE(
        ...     lambda theta, x, y: (x @ theta - y).square() / 2, (x, y), eta_outer=0.1, steps=3, eta_inner=0.1
        ... )
        >>> sde.drift(torch.zeros(100, 3)).shape
        torch.Size([100, 3])

    Source: setting of Gu and Guo, arXiv 2105.08037v1 (abstract); drift and noise derived for this project.
    """

    loss: Loss
    data: Data
    _: KW_ONLY
    eta_outer: float | Tensor
    batch_size: int = 1
    steps: int = 0
    eta_inner: float | Tensor = 0.0
    lam: float = 0.0
    regulariser: Regulariser | None = None
    inner: Direction = "gradient"
    eps: float | None = None
    unrolled: bool = False
    mode: Literal["exact", "expanded"] = "exact"
    order: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise BackpassError(f"loss is a function loss(theta, x, y) -> (N,); got {type(self.loss).__name__}.")
        check_data(self.data)
        check_rate("eta_outer, the learning rate", self.eta_outer, positive=True)
        if not is_whole(self.batch_size, 1):
            raise BackpassError(f"batch_size is an integer >= 1; got {self.batch_size!r}.")
        if self.mode not in ("exact", "expanded"):
            raise UnknownNameError("mode", str(self.mode), ("exact", "expanded"))
        if not isinstance(self.unrolled, bool):
            raise BackpassError(f"unrolled is True or False; got {self.unrolled!r}.")
        if isinstance(self.order, bool) or self.order not in (1, 2):
            raise BackpassError(f"order is 1 or 2; got {self.order!r}.")
        _ = self.inner_loop  # validates the adversary's settings

    @property
    def inner_loop(self) -> InnerLoop:
        """The adversary."""
        return InnerLoop(
            steps=self.steps,
            eta=self.eta_inner,
            direction=self.inner,
            lam=self.lam,
            regulariser=self.regulariser,
            eps=self.eps,
        )

    @property
    def noise_dim(self) -> int:
        """Number of normal variates that the noise of a path takes: N, one per sample."""
        return len(self.data[0])

    @property
    def time_step(self) -> float:
        """SDE time of one step of the chain, eta_outer."""
        return float(self.eta_outer.detach()) if isinstance(self.eta_outer, Tensor) else self.eta_outer

    def mean_field(self, theta: Tensor) -> Tensor:
        """h(theta) = E g(theta, x), the mean gradient at the perturbed samples; (..., P)."""
        return self._over_paths(self._mean_field, theta)

    def drift(self, theta: Tensor) -> Tensor:
        """The drift in the SDE's mode and order; (..., P)."""
        return self._over_paths(self._exact_drift if self.mode == "exact" else self._expanded_drift, theta)

    def noise(self, theta: Tensor, xi: Tensor) -> Tensor:
        """sqrt(eta) S^{1/2} xi, by one vjp of the losses: no gradient of a single sample is formed; (..., P).

        Args:
            theta: (..., P).
            xi: standard normal, (..., N); times sqrt(dt) for an increment of length dt.
        """
        self._check_xi(theta, xi)
        return self._over_paths(self._noise, theta, xi)

    def coefficients(self, theta: Tensor, xi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drift, noise and leading drift at once; they share the attack, so this is cheaper than all in turn."""
        self._check_xi(theta, xi)
        if self.mode == "expanded" or self.unrolled:
            return self.drift(theta), self.noise(theta, xi), self.leading_drift(theta)
        if theta.ndim == 1:
            return self._exact_coefficients(theta, xi)
        found: tuple[Tensor, Tensor, Tensor] = vmap(self._exact_coefficients)(theta.contiguous(), xi)
        return found

    def leading_and_noise(self, theta: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
        """Leading drift and noise at once; (..., P) each."""
        _, noise, leading = replace(self, order=1).coefficients(theta, xi)
        return leading, noise

    def leading_drift(self, theta: Tensor) -> Tensor:
        """The drift without its terms of order eta: -h, or -grad G where expanded; (..., P)."""
        plain = self._mean_field if self.mode == "exact" else self._clean_slope
        return -self._over_paths(plain, theta)

    def covariance(self, theta: Tensor) -> Tensor:
        """S = Cov(g) / B as a matrix, without eta; for few parameters; (..., P, P)."""
        return self._over_paths(self._covariance, theta)

    def perturbation(self, theta: Tensor) -> Tensor:
        """delta_K of every sample; (..., N, ...)."""
        return self._over_paths(lambda p: self._perturbation(p, *self.data), theta)

    def expected_loss(self, theta: Tensor) -> Tensor:
        """G(theta) = E L(theta, x), the clean loss; (...)."""
        return self._over_paths(lambda p: self._losses(p, *self.data).mean(), theta)

    def adversarial_loss(self, theta: Tensor) -> Tensor:
        """E L(theta, x + delta_K(theta, x)); (...)."""
        return self._over_paths(lambda p: self._attacked(p, p, *self.data).mean(), theta)

    def gradient_penalty(self, theta: Tensor) -> Tensor:
        """E |grad_x L(theta, x)|^2, twice what adversarial training lowers; (...)."""
        samples = self.noise_dim
        return self._over_paths(lambda p: self._input_gradient(p).square().sum() / samples, theta)

    def chain_step(
        self, theta: Tensor, *, generator: torch.Generator | None = None, index: Tensor | None = None
    ) -> Tensor:
        """One step of the chain itself, theta - eta_outer (1/B) sum_j g(theta, x_j); (..., P).

        Args:
            theta: (..., P).
            generator: draws the batch of every path.
            index: the batch instead, of any size: indices of samples, (..., B).
        """
        check_theta(theta, self.data[0])
        if index is None:
            shape = (*theta.shape[:-1], self.batch_size)
            index = torch.randint(self.noise_dim, shape, generator=generator, device=theta.device)
        else:
            self._check_index(index, theta)
        x, y = self.data
        try:
            batch = x[index], y[index]
        except IndexError as error:
            raise BackpassError(f"index is in 0..{self.noise_dim - 1}: {error}.") from error
        return self._over_paths(self._chain_step, theta, *batch)

    def as_torchsde(self) -> TorchSDE:
        """Return the SDE as a module for `torchsde.sdeint` and `torchsde.sdeint_adjoint`."""
        return TorchSDE(self)

    def _check_xi(self, theta: Tensor, xi: Tensor) -> None:
        check_theta(theta, self.data[0])
        if not isinstance(xi, Tensor) or xi.dtype != theta.dtype or xi.shape != (*theta.shape[:-1], self.noise_dim):
            got = f"{tuple(xi.shape)} {xi.dtype}" if isinstance(xi, Tensor) else type(xi).__name__
            raise BackpassError(
                f"xi needs a number per path and sample, {(*theta.shape[:-1], self.noise_dim)} {theta.dtype}; "
                f"got {got}."
            )

    def _check_index(self, index: Tensor, theta: Tensor) -> None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise BackpassError(f"index is an int64 tensor of positions in the data; got {got}.")
        if index.ndim != theta.ndim or index.shape[:-1] != theta.shape[:-1] or not index.numel():
            raise BackpassError(f"index needs a batch per path, {(*theta.shape[:-1], 'B')}; got {tuple(index.shape)}.")

    def _over_paths(self, function: Callable[..., Tensor], theta: Tensor, *rest: Tensor) -> Tensor:
        check_theta(theta, self.data[0])
        if theta.ndim == 1:
            return function(theta, *rest)
        # One place in memory per number: forward-mode differentiation refuses expanded tensors.
        return vmap(function)(theta.contiguous(), *rest)

    def _losses(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return check_losses(self.loss(theta, x, y), len(x))

    def _perturbation(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        ascent = grad(lambda delta: self._losses(theta, x + delta, y).sum())
        return self.inner_loop.run(ascent, x)

    def _attacked(self, theta: Tensor, attacked: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """L(theta, x + delta_K(attacked, x)): the same parameters, of which theta alone is differentiated."""
        return self._losses(theta, x + self._perturbation(attacked, x, y), y)

    def gradient_at(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The mean of g over given samples, for one theta (P,); (P,)."""
        if self.unrolled:
            through: Tensor = grad(lambda p: self._attacked(p, p, x, y).mean())(theta)
            return through
        # The perturbation stays a function of the outer theta, so that a jvp of this passes through the attack.
        at = x + self._perturbation(theta, x, y)
        frozen: Tensor = grad(lambda p: self._losses(p, at, y).mean())(theta)
        return frozen

    def _mean_field(self, theta: Tensor) -> Tensor:
        return self.gradient_at(theta, *self.data)

    def _chain_step(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return theta - self.eta_outer * self.gradient_at(theta, x, y)

    def _exact_drift(self, theta: Tensor) -> Tensor:
        h = self._mean_field(theta)
        return -h if self.order == 1 else -h - self.eta_outer / 2 * along(self._mean_field, theta, h)

    def _expanded_drift(self, theta: Tensor) -> Tensor:
        slope = self._clean_slope(theta)
        if self.order == 1:
            return -slope
        plain = -slope - self.eta_outer / 2 * along(self._clean_slope, theta, slope)
        return plain - self._linear_term(theta) if self.steps else plain

    def _clean_slope(self, theta: Tensor) -> Tensor:
        slope: Tensor = grad(lambda p: self._losses(p, *self.data).mean())(theta)
        return slope

    def _linear_term(self, theta: Tensor) -> Tensor:
        """grad_theta E <L_x, delta> with delta from the loss linearised in delta, itself fixed unless unrolled."""

        def first_order(g: Tensor) -> Tensor:
            return self.inner_loop.run(lambda _: g, g)

        delta = first_order(self._input_gradient(theta))

        def work(p: Tensor) -> Tensor:
            g = self._input_gradient(p)
            return (g * (first_order(g) if self.unrolled else delta)).sum() / len(g)

        term: Tensor = grad(work)(theta)
        return term

    def _input_gradient(self, theta: Tensor) -> Tensor:
        x, y = self.data
        gradient: Tensor = grad(lambda at: self._losses(theta, at, y).sum())(x)
        return gradient

    def _noisy_losses(self, theta: Tensor) -> Callable[[Tensor], Tensor]:
        """The losses whose gradients are the noise: at the perturbed samples, or at the clean ones where expanded."""
        x, y = self.data
        if self.mode == "expanded":
            return lambda p: self._losses(p, x, y)
        if self.unrolled:
            return lambda p: self._attacked(p, p, x, y)
        at = x + self._perturbation(theta, x, y)
        return lambda p: self._losses(p, at, y)

    def _noise(self, theta: Tensor, xi: Tensor) -> Tensor:
        pull: Callable[[Tensor], tuple[Tensor]] = vjp(self._noisy_losses(theta), theta)[1]
        return pull(self._cotangents(xi))[0]

    def _cotangents(self, xi: Tensor) -> Tensor:
        return (xi - xi.mean()) * (self.eta_outer / (self.batch_size * self.noise_dim)) ** 0.5

    def _exact_coefficients(self, theta: Tensor, xi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = self.data
        at = x + self._perturbation(theta, x, y)
        losses, pull = vjp(lambda p: self._losses(p, at, y), theta)[:2]
        h, noise = pull(torch.full_like(losses, 1 / len(losses)))[0], pull(self._cotangents(xi))[0]
        drift = -h if self.order == 1 else -h - self.eta_outer / 2 * along(self._mean_field, theta, h)
        return drift, noise, -h

    def _covariance(self, theta: Tensor) -> Tensor:
        gradients: Tensor = jacrev(self._noisy_losses(theta))(theta)
        centred = gradients - gradients.mean(0)
        return centred.mT @ centred / (self.batch_size * self.noise_dim)
