"""SDEs through torchsde and diffrax: the same coefficients, the same law, and torchsde's adjoint."""

import math

import pytest
import torch

from backpass.sde import AdversarialSDE, ControlledSDE, ItoSDE, MomentumSDE, integrate
from support.sde import D, smooth_data, smooth_loss, smooth_theta, squared_loss

torchsde = pytest.importorskip("torchsde", reason="torchsde is not installed")

DATA = (
    torch.tensor([[0.6], [1.0], [1.2], [0.8]], dtype=D),
    torch.tensor([0.5, 0.3, 1.0, -0.2], dtype=D),
)


def adversarial(**settings):
    return AdversarialSDE(smooth_loss, smooth_data(), eta_outer=0.2, steps=2, eta_inner=0.1, batch_size=2, **settings)


SDES = {
    "exact": (adversarial(), smooth_theta()),
    "expanded": (adversarial(mode="expanded"), smooth_theta()),
    "controlled": (ControlledSDE(adversarial(), lambda t: 1 / (1 + t)), smooth_theta()),
    "momentum": (MomentumSDE(adversarial(), 0.8), torch.cat([smooth_theta(), smooth_theta()], 1)),
    "linear": (ItoSDE(lambda x: -x, lambda x, xi: 0.1 * xi, noise_dim=3), smooth_theta()),
}


@pytest.mark.parametrize("name", SDES)
def test_torchsde_takes_the_same_euler_steps(name):
    """One step of torchsde with a given increment is one of ours."""
    sde, theta = SDES[name]
    module = sde.as_torchsde()
    here = sde.at(0.3) if hasattr(sde, "at") else sde
    xi = torch.randn(4, sde.noise_dim, dtype=D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.f(0.3, theta), here.drift(theta))
    torch.testing.assert_close(module.g_prod(0.3, theta, xi), here.noise(theta, xi))
    torch.testing.assert_close((module.g(0.3, theta) @ xi[..., None])[..., 0], here.noise(theta, xi))
    end = torchsde.sdeint(module, theta, torch.tensor([0.0, 0.1], dtype=D), method="euler", dt=0.05)[-1]
    assert end.shape == theta.shape
    assert not torch.equal(end, theta)


def test_torchsde_has_the_same_moments():
    """Four standard errors, and the half of dt by which Euler-Maruyama may be off."""
    sde = AdversarialSDE(squared_loss, DATA, eta_outer=0.1, steps=2, eta_inner=0.1)
    start, paths = torch.ones(1500, 1, dtype=D), 1500
    torch.manual_seed(0)
    theirs = torchsde.sdeint(sde.as_torchsde(), start, torch.tensor([0.0, 1.0], dtype=D), method="euler", dt=0.0125)[-1]
    ours = integrate(sde, start, 1.0, generator=torch.Generator().manual_seed(1)).theta
    error = math.sqrt(float(theirs.var() + ours.var()) / paths)
    assert theirs.mean().item() == pytest.approx(ours.mean().item(), abs=4 * error + 0.006)
    assert theirs.var().item() == pytest.approx(ours.var().item(), rel=4 * math.sqrt(4 / paths) + 0.03)


def test_the_adjoint_gives_the_gradients_of_both_rates_and_of_the_data():
    """Against torchsde's own backpropagation through the same path."""
    rates = [torch.tensor(value, dtype=D, requires_grad=True) for value in (0.1, 0.1)]
    x = DATA[0].clone().requires_grad_()
    sde = AdversarialSDE(squared_loss, (x, DATA[1]), eta_outer=rates[0], steps=2, eta_inner=rates[1])
    start, times = torch.ones(3, 1, dtype=D), torch.tensor([0.0, 0.2], dtype=D)
    found = []
    for call, extra in ((torchsde.sdeint, {}), (torchsde.sdeint_adjoint, {"adjoint_params": (*rates, x)})):
        noise = torchsde.BrownianInterval(0.0, 0.2, size=(3, 4), dtype=D, entropy=7)
        end = call(sde.as_torchsde(), start, times, bm=noise, method="euler", dt=0.005, **extra)[-1]
        found.append(torch.autograd.grad(end.square().mean(), [*rates, x]))
    for direct, adjoint in zip(*found, strict=True):
        torch.testing.assert_close(adjoint, direct, rtol=0.1, atol=0.01 * float(direct.abs().max()))


def test_diffrax_has_the_same_moments():
    """The expanded SDE of one-dimensional regression, written by hand in JAX."""
    diffrax = pytest.importorskip("diffrax", reason="diffrax is not installed")
    import jax
    import jax.numpy as jnp

    sde = AdversarialSDE(squared_loss, DATA, eta_outer=0.1, steps=2, eta_inner=0.1, mode="expanded")
    x, y = (jnp.asarray(part.flatten().tolist()) for part in DATA)

    def drift(t, theta, args):
        slope, curvature = jnp.mean((x * theta - y) * x), jnp.mean(x**2)
        # d/dtheta of K eta_I / 2 E (theta (theta x - y))^2
        adversary = 2 * 0.1 * jnp.mean(theta * (theta * x - y) * (2 * theta * x - y))
        return -slope - 0.05 * curvature * slope - adversary

    def diffusion(t, theta, args):
        return jnp.sqrt(0.1) * jnp.std((x * theta - y) * x)

    def path(key):
        noise = diffrax.VirtualBrownianTree(0.0, 1.0, tol=1e-3, shape=(), key=key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, noise))
        return diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, 0.0125, jnp.asarray(1.0)).ys[0]

    paths = 2000
    theirs = torch.tensor(jax.vmap(path)(jax.random.split(jax.random.PRNGKey(0), paths)).tolist())
    start = torch.ones(paths, 1, dtype=D)
    ours = integrate(sde, start, 1.0, generator=torch.Generator().manual_seed(1)).theta[:, 0]
    error = math.sqrt(float(theirs.var() + ours.var()) / paths)
    assert theirs.mean().item() == pytest.approx(ours.mean().item(), abs=4 * error + 0.006)
    assert theirs.var().item() == pytest.approx(ours.var().item(), rel=4 * math.sqrt(4 / paths) + 0.03)
