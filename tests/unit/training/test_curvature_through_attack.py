"""The curvature of adversarial training: the derivative of the mean gradient, through the attack."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError
from backpass.attacks import FAB, FGSM, PGD
from backpass.sde import AdversarialSDE, InnerLoop, from_module
from backpass.training import AdversarialTraining, ControlledLR, Trainer, half_losses
from backpass.training.half_batches import products

D = torch.float64
NETWORKS = {
    "tanh": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)),
    "convolution, BatchNorm": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.SiLU(), nn.Flatten(), nn.Linear(8, 3)
    ).eval(),
}
LOOPS = {
    "gradient": {"steps": 3, "eta": 0.3},
    "l2 ball": {"steps": 3, "eta": 2.0, "eps": 0.3},
    "sign": {"steps": 2, "eta": 0.05, "direction": "sign"},
    "none": {"steps": 0, "eta": 0.0},
}


def batch(count=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 4, 4, generator=generator, dtype=D), torch.arange(count) % 3


def network(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("loop", LOOPS)
def test_the_product_is_that_of_the_dense_derivative_of_the_attacked_gradient(name, loop):
    model, (x, y) = network(name), batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    direction = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=D)
    halves = half_losses(model, F.cross_entropy, x, y, adversary=InnerLoop(**LOOPS[loop]))
    found = products(parameters, halves, torch.ones(size, dtype=D), direction)
    loss, theta = from_module(model.eval(), functools.partial(F.cross_entropy, reduction="none"))
    settings = dict(LOOPS[loop])
    settings = {"eta_inner": settings.pop("eta"), "inner": settings.pop("direction", "gradient"), **settings}
    fields = [
        AdversarialSDE(loss, (x[rows], y[rows]), eta_outer=1.0, **settings).mean_field
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(found.first, fields[0](theta))
    torch.testing.assert_close(found.second, fields[1](theta))
    assert found.scale == pytest.approx(float(found.first.norm() / direction.norm()))
    step = found.first + found.scale * direction
    torch.testing.assert_close(found.curved, torch.func.jacfwd(fields[1])(theta) @ step)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_at_frozen_perturbations_it_is_smaller():
    """Logistic regression: the perturbation turns with theta."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 10, generator=generator, dtype=D)
    y = (x[:, 0] + 0.5 * torch.randn(200, generator=generator, dtype=D) > 0).double()
    model = nn.Linear(10, 1, bias=False, dtype=D)
    nn.init.constant_(model.weight, 0.3)
    adversary = InnerLoop(steps=3, eta=0.3)

    def loss(output, y):
        return F.binary_cross_entropy_with_logits(output[:, 0], y)

    def gradient_of(x):
        at = x.clone().requires_grad_()
        return torch.autograd.grad(len(x) * loss(model(at), y), at)[0]

    at = x
    for _ in range(3):
        at = (at + 0.3 * gradient_of(at)).detach()
    measured = []
    for halves in (half_losses(model, loss, x, y, adversary=adversary), half_losses(model, loss, at, y)):
        scheduler = ControlledLR(torch.optim.SGD(model.parameters(), lr=0.1))
        scheduler.measure(halves)
        measured.append(scheduler.measured)
    assert measured[0].progress == pytest.approx(measured[1].progress)
    assert measured[1].loss < 0.7 * measured[0].loss


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.l1_loss])
def test_means_of_every_kind_of_loss_are_measured(loss):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(8, 5), torch.randn(8, 1)
    scheduler = ControlledLR(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler.measure(half_losses(model, loss, x, y, adversary=InnerLoop(steps=3, eta=0.1)))
    assert scheduler.measurements == 1


def test_batch_statistics_in_training_mode_stay_as_they_were():
    model, (x, y) = network("convolution, BatchNorm").train(), batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scheduler = ControlledLR(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler.measure(half_losses(model, F.cross_entropy, x, y, adversary=InnerLoop(steps=2, eta=0.1)))
    assert scheduler.measurements == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def fit(attack, **settings):
    model = network("tanh").float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = ControlledLR(optimizer, **settings)
    x, y = batch(12)
    objective = AdversarialTraining(attack)
    Trainer(
        model, optimizer, (x.float().sigmoid(), y), epochs=1, batch_size=6, objective=objective, scheduler=scheduler,
        step_scheduler="step",
    ).fit()  # fmt: skip
    return scheduler


@pytest.mark.parametrize("attack", [PGD(eps=0.1, norm="l2", steps=2), FAB(eps=0.1, steps=2)], ids=["l2", "FAB"])
def test_the_trainer_refuses_examples_that_move_with_the_parameters_unless_frozen_is_asked_for(attack):
    with pytest.raises(BackpassError, match="frozen_curvature=True"):
        fit(attack)
    assert fit(attack, frozen_curvature=True).measurements == 2


def test_sign_steps_do_not_move_so_the_trainer_measures_them():
    assert fit(FGSM(eps=0.1)).measurements == 2
