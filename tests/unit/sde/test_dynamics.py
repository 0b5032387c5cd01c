"""The SDE's drift and noise against adversarial training written out sample by sample."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError, UnknownNameError
from backpass.sde import AdversarialSDE, from_module
from support.sde import D, slow_gradients, slow_jacobian, smooth_data, smooth_loss, smooth_theta


def _ball(eps):
    return lambda d: d * min(1.0, eps / max(d.norm().item(), 1e-30))


LOOPS = {
    "none": ({"steps": 0}, {}),
    "gradient": ({"steps": 3}, {}),
    "one step": ({"steps": 1}, {}),
    "sign": ({"steps": 3, "inner": "sign"}, {"direction": torch.sign}),
    "sign in a ball": (
        {"steps": 3, "inner": "sign", "eps": 0.15},
        {"direction": torch.sign, "project": lambda d: d.clamp(-0.15, 0.15)},
    ),
    "l2 ball": ({"steps": 3, "eps": 0.05}, {"project": _ball(0.05)}),
    "penalty": ({"steps": 3, "lam": 1.5}, {"lam": 1.5}),
    "own direction": ({"steps": 2, "inner": torch.tanh}, {"direction": torch.tanh}),
    "unrolled": ({"steps": 3, "unrolled": True}, {"unrolled": True}),
    "unrolled, penalty": ({"steps": 3, "unrolled": True, "lam": 1.5}, {"unrolled": True, "lam": 1.5}),
}


def make(**settings):
    return AdversarialSDE(
        smooth_loss, smooth_data(), **{"eta_outer": 0.2, "eta_inner": 0.1, "batch_size": 2, **settings}
    )


NAMES = (
    "mean_field",
    "drift",
    "covariance",
    "perturbation",
    "expected_loss",
    "adversarial_loss",
    "gradient_penalty",
)


@pytest.fixture(params=LOOPS, ids=str)
def loop(request):
    settings, slow = LOOPS[request.param]
    x, y = smooth_data()
    steps = settings["steps"]
    return make(**settings), lambda theta: slow_gradients(smooth_loss, theta, x, y, steps=steps, eta=0.1, **slow)


def test_the_mean_field_is_the_mean_of_the_samples_gradients(loop):
    sde, slow = loop
    theta = smooth_theta()
    expected = torch.stack([slow(path).mean(0) for path in theta])
    torch.testing.assert_close(sde.mean_field(theta), expected)


def test_the_drift_carries_half_eta_times_the_jacobian_of_the_attacked_field(loop):
    sde, slow = loop
    theta = smooth_theta(1)[0]
    jacobian = slow_jacobian(lambda p: slow(p).mean(0), theta)
    h = slow(theta).mean(0)
    torch.testing.assert_close(sde.drift(theta), -h - 0.1 * jacobian @ h, rtol=1e-6, atol=1e-8)


def test_the_noise_is_a_root_of_eta_times_the_batch_covariance(loop):
    sde, slow = loop
    theta = smooth_theta(1)[0]
    gradients = slow(theta)
    centred = gradients - gradients.mean(0)
    covariance = centred.T @ centred / len(gradients) / 2
    root = torch.stack([sde.noise(theta, xi) for xi in torch.eye(sde.noise_dim, dtype=D)], 1)
    torch.testing.assert_close(root @ root.T, 0.2 * covariance)
    torch.testing.assert_close(sde.covariance(theta), covariance)


def test_over_all_batches_the_chain_moves_by_the_mean_field_and_spreads_by_the_covariance(loop):
    sde, _ = loop
    theta = smooth_theta(1)
    batches = torch.tensor(list(itertools.product(range(sde.noise_dim), repeat=2)))
    moves = sde.chain_step(theta.expand(len(batches), -1), index=batches) - theta
    torch.testing.assert_close(moves.mean(0), -0.2 * sde.mean_field(theta[0]))
    centred = moves - moves.mean(0)
    torch.testing.assert_close(centred.T @ centred / len(batches), 0.04 * sde.covariance(theta[0]))


@pytest.mark.parametrize("mode", ["exact", "expanded"])
def test_several_paths_are_single_paths_side_by_side(mode):
    sde, theta = make(steps=2, mode=mode), smooth_theta()
    xi = torch.randn(4, 6, dtype=D)
    for name in NAMES:
        together = getattr(sde, name)(theta)
        torch.testing.assert_close(together, torch.stack([getattr(sde, name)(path) for path in theta]))
    torch.testing.assert_close(sde.noise(theta, xi), torch.stack(list(map(sde.noise, theta, xi))))


def test_without_adversary_both_modes_are_the_modified_equation_of_sgd():
    """-grad [G + eta/4 |grad G|^2], by autograd of that function."""
    theta = smooth_theta(1)[0].requires_grad_()
    sde = make(steps=0)
    clean = sde.expected_loss(theta)
    (slope,) = torch.autograd.grad(clean, theta, create_graph=True)
    (expected,) = torch.autograd.grad(clean + 0.2 / 4 * slope.square().sum(), theta)
    torch.testing.assert_close(sde.drift(theta), -expected)
    torch.testing.assert_close(make(steps=0, mode="expanded").drift(theta), -expected)
    torch.testing.assert_close(make(steps=3, mode="expanded", order=1).drift(theta), -slope)


WRITTEN = {
    "x @ theta": lambda theta, x: x @ theta,
    "theta @ x.T": lambda theta, x: theta @ x.T,
    "(x * theta).sum": lambda theta, x: (x * theta).sum(-1),
    "linear": lambda theta, x: F.linear(x, theta[None])[:, 0],
    "einsum": lambda theta, x: torch.einsum("np,p->n", x, theta),
    "mv": lambda theta, x: x.mv(theta),
    "bmm": lambda theta, x: torch.bmm(x[:, None], theta.expand(len(x), -1)[..., None])[:, 0, 0],
    "view": lambda theta, x: (x @ theta.view(3, 1)).squeeze(1),
    "mean of a sum": lambda theta, x: x @ theta + theta.sum() - theta.mean() * 3,
}


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 2, "mode": "expanded"}, {"steps": 2}], ids=str)
@pytest.mark.parametrize("way", WRITTEN)
def test_any_way_to_write_the_loss_gives_the_same_process(way, settings):
    """Gradients of sums are expanded tensors, several numbers at one place in memory."""
    x, y = smooth_data()
    theta = smooth_theta(1)[0]

    def process(output):
        return AdversarialSDE(
            lambda theta, x, y: (output(theta, x) - y).square() / 2, (x, y), eta_outer=0.2, eta_inner=0.1, **settings
        )

    ours, plain = process(WRITTEN[way]), process(lambda theta, x: (x * theta).sum(1))
    for paths in (theta, theta.expand(4, -1), smooth_theta()):
        xi = torch.ones(*paths.shape[:-1], 6, dtype=D).cumsum(-1)
        torch.testing.assert_close(ours.drift(paths), plain.drift(paths))
        torch.testing.assert_close(ours.noise(paths, xi), plain.noise(paths, xi))
        for one, other in zip(ours.coefficients(paths, xi), plain.coefficients(paths, xi), strict=True):
            torch.testing.assert_close(one, other)
        index = torch.zeros(*paths.shape[:-1], 2).long()
        torch.testing.assert_close(ours.chain_step(paths, index=index), plain.chain_step(paths, index=index))


CRITERIA = {
    "mse": (F.mse_loss, lambda o, y: (o - y).square()),
    "huber": (F.huber_loss, lambda o, y: torch.where((o - y).abs() < 1, (o - y).square() / 2, (o - y).abs() - 0.5)),
    "soft margin": (F.soft_margin_loss, lambda o, y: F.softplus(-y * o)),
    "smooth l1": (F.smooth_l1_loss, lambda o, y: F.huber_loss(o, y, reduction="none")),
}


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": 2, "mode": "expanded"}, {"steps": 2}], ids=str)
@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_losses_without_a_forward_mode_formula_are_differentiated_all_the_same(name, settings):
    theirs, plain = CRITERIA[name]
    theta, data = smooth_theta(), (smooth_data()[0], smooth_data()[1].sign())

    def process(criterion):
        def loss(theta, x, y):
            return criterion((x @ theta).tanh(), y)

        return AdversarialSDE(loss, data, eta_outer=0.2, eta_inner=0.1, **settings)

    ours = process(functools.partial(theirs, reduction="none"))
    for paths in (theta, theta[0]):
        torch.testing.assert_close(ours.drift(paths), process(plain).drift(paths))


def test_coefficients_at_once_are_those_in_turn(loop):
    sde, _ = loop
    theta, xi = smooth_theta(), torch.randn(4, 6, dtype=D)
    for one in (sde, dataclasses.replace(sde, order=1), dataclasses.replace(sde, mode="expanded")):
        drift, noise, leading = one.coefficients(theta, xi)
        torch.testing.assert_close(drift, one.drift(theta))
        torch.testing.assert_close(noise, one.noise(theta, xi))
        torch.testing.assert_close(leading, dataclasses.replace(one, order=1).drift(theta))


def test_order_one_leaves_out_the_terms_of_order_eta():
    theta = smooth_theta()
    torch.testing.assert_close(make(steps=2, order=1).drift(theta), -make(steps=2).mean_field(theta))


def test_expanded_noise_is_that_of_plain_sgd():
    theta, xi = smooth_theta(), torch.randn(4, 6, dtype=D)
    torch.testing.assert_close(make(steps=3, mode="expanded").noise(theta, xi), make(steps=0).noise(theta, xi))


def test_gradient_penalty_and_losses_are_means_over_samples():
    theta, (x, y) = smooth_theta(1)[0], smooth_data()
    x = x.requires_grad_()
    losses = smooth_loss(theta, x, y)
    (slopes,) = torch.autograd.grad(losses.sum(), x)
    sde = make(steps=2)
    torch.testing.assert_close(sde.gradient_penalty(theta), slopes.square().sum(1).mean())
    torch.testing.assert_close(sde.expected_loss(theta), losses.mean().detach())
    attacked = smooth_loss(theta, x + sde.perturbation(theta), y)
    torch.testing.assert_close(sde.adversarial_loss(theta), attacked.mean().detach())


@pytest.mark.parametrize("settings", [{"steps": 2}, {"steps": 2, "mode": "expanded"}, {"steps": 2, "unrolled": True}])
def test_the_drift_is_differentiable_in_theta(settings):
    theta = smooth_theta(2).requires_grad_()
    assert torch.autograd.gradcheck(make(**settings).drift, theta)
    jacobian = torch.func.jacrev(make(**settings).drift)(theta[0].detach())
    torch.testing.assert_close(jacobian, slow_jacobian(make(**settings).drift, theta[0].detach()), rtol=1e-6, atol=1e-8)


def test_a_network_gives_the_loss_of_its_parameters_and_stays_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    before = [p.clone() for p in model.parameters()]
    x, y = torch.randn(7, 3, 4, dtype=D), torch.arange(7) % 3
    loss, theta0 = from_module(model, functools.partial(F.cross_entropy, reduction="none"))
    sde = AdversarialSDE(loss, (x, y), eta_outer=0.1, steps=2, eta_inner=0.05)
    F.cross_entropy(model(x + sde.perturbation(theta0)), y).backward()
    torch.testing.assert_close(
        sde.mean_field(theta0), nn.utils.parameters_to_vector(p.grad for p in model.parameters())
    )
    sde.chain_step(theta0.expand(3, -1), generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


NETWORKS = {
    "convolution, BatchNorm, ReLU, pooling": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    ),
    "LayerNorm, GELU": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(36, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)
    ),
    "SiLU, average pooling": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    ),
}


@pytest.fixture(params=NETWORKS, ids=str)
def network(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[request.param]().double().eval()


IMAGES = torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=D), torch.arange(5) % 3


@pytest.mark.parametrize("inner", ["gradient", "sign"])
def test_the_correction_passes_through_the_attack_on_a_network(network, inner):
    """(Dh) h by central differences of the mean field along itself."""
    loss, theta = from_module(network, functools.partial(F.cross_entropy, reduction="none"))
    sde = AdversarialSDE(loss, IMAGES, eta_outer=0.2, steps=2, eta_inner=0.01, inner=inner)
    h = sde.mean_field(theta)
    along = (sde.mean_field(theta + 1e-6 * h) - sde.mean_field(theta - 1e-6 * h)) / 2e-6
    torch.testing.assert_close(sde.drift(theta), -h - 0.1 * along, rtol=1e-6, atol=1e-7)


def test_the_chain_is_adversarial_training_with_torchs_own_sgd(network):
    """Three batches, each attacked by two plain steps of ascent on its summed loss, then `torch.optim.SGD`."""
    loss, theta = from_module(network, functools.partial(F.cross_entropy, reduction="none"))
    sde = AdversarialSDE(loss, IMAGES, eta_outer=0.2, steps=2, eta_inner=0.05)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
    for rows in torch.tensor([[0, 3], [4, 4], [2, 1]]):
        theta = sde.chain_step(theta, index=rows)
        x, y = IMAGES[0][rows], IMAGES[1][rows]
        attacked = x.clone()
        for _ in range(2):
            attacked.requires_grad_()
            (ascent,) = torch.autograd.grad(F.cross_entropy(network(attacked), y, reduction="sum"), attacked)
            attacked = (attacked + 0.05 * ascent).detach()
        optimizer.zero_grad()
        F.cross_entropy(network(attacked), y).backward()
        optimizer.step()
    torch.testing.assert_close(theta, nn.utils.parameters_to_vector(network.parameters()).detach())


def test_frozen_parameters_stay_out_of_theta():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
    model[2].requires_grad_()
    _, theta0 = from_module(model, functools.partial(F.cross_entropy, reduction="none"))
    assert theta0.shape == (10,)


X, Y = smooth_data()
BAD = {
    "eta_outer, the learning rate": lambda: make(eta_outer=0.0),
    "eta_inner must be a finite number >= 0": lambda: make(steps=1, eta_inner=-0.1),
    "integer >= 0": lambda: make(steps=-1),
    "batch_size is an integer >= 1": lambda: make(batch_size=0),
    "order is 1 or 2": lambda: make(order=3),
    "eps, the radius": lambda: make(steps=1, eps=-1.0),
    "give lam > 0": lambda: make(steps=1, regulariser=lambda d: d.flatten(1).sum(1)),
    "pair of tensors": lambda: AdversarialSDE(smooth_loss, X, eta_outer=0.1),
    "same number of samples": lambda: AdversarialSDE(smooth_loss, (X, Y[:3]), eta_outer=0.1),
    "floating point": lambda: AdversarialSDE(smooth_loss, (X.long(), Y), eta_outer=0.1),
    "NaN or infinite": lambda: AdversarialSDE(smooth_loss, (X.log(), Y), eta_outer=0.1),
    "one value per sample": lambda: AdversarialSDE(lambda *a: smooth_loss(*a).mean(), (X, Y), eta_outer=1).drift(X[0]),
    "a vector": lambda: make().drift(torch.zeros(2, 2, 3, dtype=D)),
    "but the data are": lambda: make().drift(torch.zeros(3)),
    "a number per path and sample": lambda: make().noise(X, torch.zeros(3, dtype=D)),
    "a batch per path": lambda: make().chain_step(X, index=torch.zeros(2, 1).long()),
    "training mode": lambda: from_module(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), F.mse_loss),
    "nothing to follow": lambda: from_module(nn.ReLU(), F.mse_loss),
    "this model has 6": lambda: from_module(nn.Linear(2, 2), F.mse_loss)[0](torch.zeros(5), X, Y),
}


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_input_is_refused_with_a_reason(message):
    with pytest.raises(BackpassError, match=message):
        BAD[message]()


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'sign'"):
        make(inner="signs")
    with pytest.raises(UnknownNameError, match="Did you mean 'exact'"):
        make(mode="exac")
