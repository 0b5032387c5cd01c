"""Every displayed formula of docs/theory/sde.md, evaluated on random inputs against the code."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch.func import grad, jacfwd

from backpass.sde import SVAG, AdversarialSDE, ControlledSDE, MomentumSDE, permuted_law, svag_weights
from support.sde import D, smooth_data, smooth_loss, smooth_theta

PAGE = (Path(__file__).parents[2] / "docs" / "theory" / "sde.md").read_text()
X, Y = smooth_data()
THETA, XI = smooth_theta(1)[0], torch.randn(6, dtype=D, generator=torch.Generator().manual_seed(0))
ETA, ETA_I, K, B = 0.2, 0.1, 3, 2


def sde(**settings):
    return AdversarialSDE(
        smooth_loss, (X, Y), **{"eta_outer": ETA, "eta_inner": ETA_I, "steps": K, "batch_size": B, **settings}
    )


def h(theta):
    return torch.stack([slow_gradient(theta, i) for i in range(6)]).mean(0)


def slow_delta(theta, i):
    delta = torch.zeros_like(X[i : i + 1])
    for _ in range(K):
        delta = delta + ETA_I * grad(lambda d: smooth_loss(theta, X[i : i + 1] + d, Y[i : i + 1]).sum())(delta)
    return delta


def slow_gradient(theta, i):
    at = X[i : i + 1] + slow_delta(theta, i)
    return grad(lambda p: smooth_loss(p, at, Y[i : i + 1]).sum())(theta)


def root(chosen):
    """The square of the noise's factor, over unit vectors."""
    columns = torch.stack([chosen.noise(THETA, e) for e in torch.eye(6, dtype=D)], 1)
    return columns @ columns.T


def S():
    gradients = torch.stack([slow_gradient(THETA, i) for i in range(6)])
    centred = gradients - gradients.mean(0)
    return centred.T @ centred / 6 / B


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def chain():
    index = torch.tensor([1, 4])
    close(sde().chain_step(THETA, index=index), THETA - ETA / 2 * sum(slow_gradient(THETA, i) for i in (1, 4)))


def inner():
    close(sde().perturbation(THETA), torch.cat([slow_delta(THETA, i) for i in range(6)]))


def exact():
    close(sde().drift(THETA), -(h(THETA) + ETA / 2 * jacfwd(h)(THETA) @ h(THETA)))
    close(root(sde()), ETA * S())


def G(theta):
    return smooth_loss(theta, X, Y).mean()


def slopes(theta):
    return grad(lambda x: smooth_loss(theta, x, Y).sum())(X)


def expanded():
    def potential(theta):
        return G(theta) + ETA / 4 * grad(G)(theta).square().sum() + K * ETA_I / 2 * slopes(theta).square().sum() / 6

    close(sde(mode="expanded").drift(THETA), -grad(potential)(THETA))
    close(root(sde(mode="expanded")), root(sde(steps=0)))


def controlled():
    u = 0.6
    at = ControlledSDE(sde(), lambda t: u).at(0.0)
    close(at.drift(THETA), -(u * h(THETA) + u**2 * ETA / 2 * jacfwd(h)(THETA) @ h(THETA)))
    columns = torch.stack([at.noise(THETA, e) for e in torch.eye(6, dtype=D)], 1)
    close(columns @ columns.T, u**2 * ETA * S())


def momentum():
    mu, tau, V = 0.8, ETA**0.5, smooth_theta(2)[1]
    gamma = (1 - mu) / tau
    F = -(gamma * V + h(THETA))
    process, state = MomentumSDE(sde(), mu), torch.cat([THETA, V])
    velocity = F + tau / 2 * (gamma * F + jacfwd(h)(THETA) @ V)
    close(process.drift(state), torch.cat([V + tau / 2 * F, velocity]))
    columns = torch.stack([process.noise(state, e) for e in torch.eye(6, dtype=D)], 1)
    close((columns @ columns.T)[3:, 3:], tau * S())
    assert not columns[:3].any()


def permuted():
    """r over all permutations of three batches of two, to second order in a small rate, at the zero of h."""
    rate = 1e-4
    regression = AdversarialSDE(
        lambda p, x, y: ((x @ p) - y).square() / 2, (X, Y), eta_outer=rate, batch_size=2, eta_inner=0.1
    )
    law = permuted_law(regression, torch.zeros(3, dtype=D), permutations=10)
    residual = X @ law.theta - Y
    xi, J = residual[:, None] * X, X[:, :, None] * X[:, None, :]
    for order in itertools.islice(itertools.permutations(range(6)), 0, None, 97):
        xs, js = xi[list(order)].view(3, 2, 3).mean(1), J[list(order)].view(3, 2, 3, 3).mean(1)
        r, M = torch.zeros(3, dtype=D), torch.eye(3, dtype=D)
        for k in range(3):
            step = torch.eye(3, dtype=D) - rate * js[k]
            r, M = step @ r - rate * xs[k], step @ M
        second = rate**2 * sum(js[k] @ xs[j] for k in range(3) for j in range(k))
        torch.testing.assert_close(r, second, rtol=1e-2, atol=1e-11)
        theta = torch.ones(3, dtype=D)
        end = theta
        for k in range(3):
            end = regression.chain_step(end, index=torch.tensor(order[2 * k : 2 * k + 2]))
        close(end - law.theta, M @ (theta - law.theta) + r)


def svag():
    for amplification in (2, 4, 16):
        plus, minus = ((2 * amplification - 1) ** 0.5 + 1) / 2, ((2 * amplification - 1) ** 0.5 - 1) / 2
        assert svag_weights(amplification) == pytest.approx((plus, -minus))
        index = torch.tensor([0, 2, 5, 5])
        ones = [(slow_gradient(THETA, i) + slow_gradient(THETA, j)) / 2 for i, j in ((0, 2), (5, 5))]
        expected = THETA - ETA / amplification * (plus * ones[0] - minus * ones[1])
        close(SVAG(sde(), amplification).chain_step(THETA, index=index), expected)


FORMULAS = {
    r"\theta' = \theta - \frac{\eta}{B} \sum_j g(\theta, x_j)": chain,
    r"\delta_{k+1} = \Pi\big(\delta_k + \eta_I": inner,
    r"d\Theta = -\Big[h + \frac{\eta}{2} (Dh)\, h\Big] dt + \sqrt{\eta}\, S^{1/2} dW.": exact,
    r"d\Theta = -\nabla\Big[G + \frac{\eta}{4} |\nabla G|^2 + \frac{K \eta_I}{2}\, \mathbf E |L_x|^2\Big] dt": expanded,
    r"d\Theta = -\Big[u\, h + u^2\, \frac{\eta}{2} (Dh)\, h\Big] dt + u \sqrt{\eta}\, S^{1/2} dW.": controlled,
    r"d\Theta = \Big[V + \frac{\tau}{2} F\Big] dt, \qquad dV = \Big[F + \frac{\tau}{2} \big(\gamma F": momentum,
    r"M = \prod_k (I - \eta J_k), \qquad r = \eta^2 \sum_{j < k} J_k\, \xi_j + O(\eta^3).": permuted,
    r"g_l = a_+\, g_1 - a_-\, g_2, \qquad a_\pm = \frac{\sqrt{2l - 1} \pm 1}{2},": svag,
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_formula_is_what_the_code_computes(formula):
    FORMULAS[formula]()


def test_every_displayed_formula_is_evaluated():
    displayed = [one.strip() for one in re.findall(r"\$\$(.*?)\$\$", PAGE, re.DOTALL)]
    assert len(displayed) == len(FORMULAS)
    for formula, text in zip(FORMULAS, displayed, strict=True):
        assert text.startswith(formula)


def E(values):
    return values.sum() / 6


def norm(g):
    return g.square().sum(1).clamp(min=1e-30).sqrt()


def huber(g, eps=0.05):
    r, bend = norm(g), eps / (K * ETA_I)
    return torch.where(r <= bend, K * ETA_I / 2 * r**2, eps * r - eps**2 / (2 * K * ETA_I))


LAM = 1.5
OFFSET = torch.tensor([0.3, -0.2, 0.5], dtype=D)
ROWS = {
    r"$\frac{K \eta_I}{2}\, \mathbf E \lvert L_x \rvert^2$ |": ({}, lambda g: K * ETA_I / 2 * E(norm(g) ** 2)),
    r"$\frac{1 - (1 - \lambda \eta_I)^K}{2 \lambda}\, \mathbf E \lvert L_x \rvert^2$": (
        {"lam": LAM},
        lambda g: (1 - (1 - LAM * ETA_I) ** K) / (2 * LAM) * E(norm(g) ** 2),
    ),
    r"$K \eta_I\, \mathbf E \lvert L_x \rvert_1$": ({"inner": "sign"}, lambda g: K * ETA_I * E(g.abs())),
    r"$\min(K \eta_I, \epsilon)\, \mathbf E \lvert L_x \rvert_1$": (
        {"inner": "sign", "eps": 0.15},
        lambda g: min(K * ETA_I, 0.15) * E(g.abs()),
    ),
    r"$\mathbf E$ of Huber's function of $\lvert L_x \rvert$": ({"eps": 0.05}, lambda g: E(huber(g))),
    r"$K \eta_I\, \mathbf E \lvert L_x \rvert^2$, twice": ({"unrolled": True}, lambda g: K * ETA_I * E(norm(g) ** 2)),
    r"$\frac{K \eta_I}{2}\, \mathbf E \lvert L_x - \lambda r_0 \rvert^2$": (
        {"lam": LAM, "regulariser": lambda d: d @ OFFSET},
        lambda g: K * ETA_I / 2 * E(norm(g - LAM * OFFSET) ** 2),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_row_of_inner_loops_is_the_potential_that_the_adversary_adds(row):
    assert row in PAGE
    settings, term = ROWS[row]
    added = sde(mode="expanded", **settings).drift(THETA) - sde(steps=0, mode="expanded").drift(THETA)
    close(added, -grad(lambda theta: term(slopes(theta)))(THETA))
