"""Our attacks beside torchattacks and foolbox: the same numbers where the algorithm is the same, else no weaker."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from backpass.attacks import APGD, PGD
from backpass.attacks.noise import make_key
from backpass.attacks.threat import make_threat
from backpass.report.proportions import paired_difference

foolbox = pytest.importorskip("foolbox")
torchattacks = pytest.importorskip("torchattacks")

EPS = {"linf": 0.1, "l2": 0.6}
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def our_pgd(norm, **settings):
    return PGD(eps=EPS[norm], step=EPS[norm] / 4, steps=7, norm=norm, restarts=1, early_stop=False, **settings)


def our_start(norm, x):
    index = torch.arange(len(x))
    return make_threat(norm, EPS[norm], (0.0, 1.0)).start(x, make_key(0, index, 0 * index, 1, like=index))


def foolbox_pgd(norm, model, x, y, start=None):
    base = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD

    class FromOurStart(base):
        def get_random_start(self, x0, epsilon):
            return x0.__class__(start)

    attack = (base if start is None else FromOurStart)(
        steps=7, abs_stepsize=EPS[norm] / 4, random_start=start is not None
    )
    return attack.run(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilon=EPS[norm])


def torchattacks_pgd(norm, model, x, y, start=None, monkeypatch=None):
    settings = {"eps": EPS[norm], "alpha": EPS[norm] / 4, "steps": 7, "random_start": start is not None}
    if start is not None:
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, a=0, b=1: self.copy_(start - x))
    if norm == "linf":
        return torchattacks.PGD(model, **settings)(x, y)
    return torchattacks.PGDL2(model, eps_for_division=1e-30, **settings)(x, y)


@pytest.fixture
def in_float64(cnn, held_out):
    """A model and images at which two orders of summation cannot part the iterates."""
    return cnn.double(), held_out.x[:64].double(), held_out.y[:64]


@NORMS
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_equals_foolbox(norm, random_start, in_float64):
    model, x, y = in_float64
    theirs = foolbox_pgd(norm, model, x, y, our_start(norm, x) if random_start else None)
    ours = our_pgd(norm, random_start=random_start)(model, x, y).x_adv
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("norm", "random_start"), [("linf", False), ("linf", True), ("l2", False)])
def test_pgd_equals_torchattacks(norm, random_start, in_float64, monkeypatch):
    model, x, y = in_float64
    start = our_start(norm, x) if random_start else None
    theirs = torchattacks_pgd(norm, model, x, y, start, monkeypatch)
    monkeypatch.undo()
    ours = our_pgd(norm, random_start=random_start)(model, x, y).x_adv
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@NORMS
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_is_not_weaker_than_that_of_torchattacks(norm, loss, cnn, held_out):
    x, y = held_out.x[:300], held_out.y[:300]
    eps = {"linf": 0.08, "l2": 0.5}[norm]
    ours = APGD(eps=eps, norm=norm, loss=loss, steps=50)(cnn, x, y)
    attack = torchattacks.APGD(cnn, norm=norm.capitalize(), eps=eps, steps=50, loss=loss)
    theirs = cnn(attack(x, y)).argmax(1) != y
    assert paired_difference(ours.success, theirs).interval.high >= 0


def hand_loop(model, x, y, eps, step, steps):
    z = x.clone()
    for _ in range(steps):
        z.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
        z = (z.detach() + step * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return z


@pytest.mark.parametrize("peer", [torchattacks_pgd, foolbox_pgd], ids=["torchattacks", "foolbox"])
def test_a_rule_acts_in_other_libraries_as_in_a_hand_loop(peer, mlp, held_out):
    from backpass import LinBP

    x, y = held_out.x[:32], held_out.y[:32]
    plain = hand_loop(mlp, x, y, EPS["linf"], EPS["linf"] / 4, 7)
    with LinBP(start=0).attach(mlp):
        theirs = peer("linf", mlp, x, y)
        ours = our_pgd("linf", random_start=False)(mlp, x, y).x_adv
        by_hand = hand_loop(mlp, x, y, EPS["linf"], EPS["linf"] / 4, 7)
    torch.testing.assert_close(theirs, by_hand, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours, by_hand, atol=1e-6, rtol=0)
    assert not torch.allclose(by_hand, plain, atol=1e-2)
