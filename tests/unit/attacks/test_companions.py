"""What is combined with momentum to make images transfer: each against slow loops written from the papers."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import LinBP
from backpass.attacks import IFGSM, MIFGSM, PGD, Pool
from backpass.attacks.companions import patches_out, smooth
from backpass.attacks.diversity import Diversity
from backpass.attacks.jobs import Jobs
from backpass.attacks.noise import make_key, uniform
from backpass.attacks.threat import make_threat
from backpass.errors import BackpassError
from support.straight_through import straight_through

EPS, STEP, STEPS = 0.1, 0.03, 3


def gradient(model, z, y):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)[0]


def gaussian(g, k):
    """Dong et al. (2019), section 3.3: W_ij of sigma = k / sqrt(3), summing to 1, one pixel at a time."""
    window = [[math.exp(-(i * i + j * j) / (2 * k * k / 3)) for j in range(-k, k + 1)] for i in range(-k, k + 1)]
    total = sum(map(sum, window))
    out = torch.zeros_like(g)
    height, width = g.shape[2:]
    for r, c, i, j in itertools.product(range(height), range(width), range(-k, k + 1), range(-k, k + 1)):
        if 0 <= r + i < height and 0 <= c + j < width:
            out[:, :, r, c] += window[i + k][j + k] / total * g[:, :, r + i, c + j]
    return out


def jobs_of(x, y):
    index = torch.arange(len(x))
    return Jobs(x, y, index, index, torch.zeros_like(index), make_threat("linf", EPS, (0.0, 1.0)))


def drawn(x, purpose, number, like):
    """The library's draws, which belong to (seed, index, restart, purpose, number)."""
    index = torch.arange(len(x))
    return uniform(make_key(0, index, 0, purpose, number, like=index), like)


def by_hand(model, x, y, pool, *, decay=1.0, k=0, m=1, nesterov=False, eta=0.0, others=1, n=0, beta=1.5, out=0.0,
            patch=4, diversity=0.0, resize=0.7):  # fmt: skip
    """z_{t+1} = clip(z_t + step sign(m_{t+1})), every part of m written out."""
    z, momentum, variance = x, torch.zeros_like(x), torch.zeros_like(x)
    per_side = x.shape[2] // patch

    def averaged(point, look):
        total = torch.zeros_like(x)
        mask = torch.ones_like(x)
        if out:
            order = drawn(x, 4, look // (n + 1), x.new_empty(len(x), per_side**2)).argsort(1)
            for row in range(len(x)):
                for left_out in order[row, : round(out * per_side**2)].tolist():
                    r, c = divmod(left_out, per_side)
                    mask[row, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = 0
        for j in range(others):
            added = torch.zeros_like(x)
            if eta:
                u = drawn(x, 5, look * others + j, x.new_empty(len(x), 1))
                for row in range(len(x)):
                    choice = [image for image, label in zip(*pool, strict=True) if label != y[row]]
                    added[row] = choice[int(u[row] * len(choice))]
            for i in range(m):

                def seen(a, added=added, i=i, copy=(look * others + j) * m + i):
                    a = (x + mask * (a - x) + eta * added) / 2**i
                    return Diversity(diversity, resize).draw(0, jobs_of(x, y), copy)(a) if diversity else a

                total += gradient(lambda a, seen=seen: model(seen(a)), point, y)
        return total / (m * others)

    for t in range(STEPS):
        point = z
        if nesterov:
            # In the published code m is a sum of gradients divided by their mean absolute value.
            point = z + STEP * decay * momentum * x[0].numel()
        g = averaged(point, t * (n + 1))
        total = g + variance
        if n:
            neighbours = torch.zeros_like(x)
            for i in range(n):
                r = (2 * drawn(x, 6, t * n + i, x) - 1) * beta * EPS
                neighbours += averaged(point + r, t * (n + 1) + 1 + i)
            variance = neighbours / n - g
        if k:
            total = gaussian(total, k)
        momentum = decay * momentum + total / total.abs().sum((1, 2, 3), keepdim=True)
        z = torch.clamp(z + STEP * momentum.sign(), x - EPS, x + EPS).clamp(0, 1)
    return z


COMPANIONS = {
    "TI": ({"translation": 2}, {"k": 2}),
    "SI": ({"scales": 5}, {"m": 5}),
    "NI": ({"nesterov": True, "decay": 0.9}, {"nesterov": True, "decay": 0.9}),
    "admix": ({"mix": 0.2, "mixed": 3, "scales": 2}, {"eta": 0.2, "others": 3, "m": 2}),
    "VMI": ({"variance": 4}, {"n": 4}),
    "PatchOut": ({"patchout": 0.3, "patch": 4, "decay": 0.0}, {"out": 0.3, "decay": 0.0}),
    "MI + DI + TI + SI": (
        {"diversity": 0.7, "resize": 0.7, "translation": 1, "scales": 2},
        {"diversity": 0.7, "k": 1, "m": 2},
    ),
    "VNI + SI + PatchOut": (
        {"variance": 2, "beta": 0.5, "nesterov": True, "scales": 2, "patchout": 0.5, "patch": 4},
        {"n": 2, "beta": 0.5, "nesterov": True, "m": 2, "out": 0.5},
    ),
    "all": (
        {"variance": 2, "nesterov": True, "mix": 0.1, "mixed": 2, "scales": 2, "translation": 1, "patchout": 0.5}
        | {"patch": 4, "diversity": 0.5, "resize": 0.7},
        {"n": 2, "nesterov": True, "eta": 0.1, "others": 2, "m": 2, "k": 1, "out": 0.5, "diversity": 0.5},
    ),
}


@pytest.fixture
def pool(held_out):
    return held_out.x[100:109].double(), held_out.y[100:109]


@pytest.mark.parametrize("name", COMPANIONS)
def test_each_companion_is_the_papers_loop(name, cnn, held_out, pool):
    settings, slow = COMPANIONS[name]
    model, x, y = cnn.double(), held_out.x[:6].double(), held_out.y[:6]
    attack = MIFGSM(eps=EPS, step=STEP, steps=STEPS, early_stop=False, pool=Pool(*pool), **settings)
    found = attack(model, x, y)
    torch.testing.assert_close(found.x_adv, by_hand(model, x, y, pool, **slow), atol=1e-10, rtol=0)
    assert found.gradients == len(x) * attack.cost(STEPS)
    assert not torch.equal(found.x_adv, MIFGSM(eps=EPS, step=STEP, steps=STEPS, early_stop=False)(model, x, y).x_adv)


class Straight(nn.Module):
    def forward(self, x):
        return straight_through(x, torch.relu)


@pytest.mark.parametrize("name", ["MI + DI + TI + SI", "VNI + SI + PatchOut"])
def test_a_rule_acts_on_every_gradient(name, cnn, held_out, pool):
    settings, slow = COMPANIONS[name]
    model, x, y = cnn.double(), held_out.x[:6].double(), held_out.y[:6]
    rewritten = copy.deepcopy(model)
    for module in list(rewritten.modules()):
        for child, activation in list(module.named_children()):
            if isinstance(activation, nn.ReLU):
                setattr(module, child, Straight())
    attack = MIFGSM(eps=EPS, step=STEP, steps=STEPS, early_stop=False, **settings)
    with LinBP().attach(model):
        found = attack(model, x, y).x_adv
    torch.testing.assert_close(found, by_hand(rewritten, x, y, pool, **slow), atol=1e-10, rtol=0)
    assert not torch.equal(found, attack(model, x, y).x_adv)


@pytest.mark.parametrize("name", COMPANIONS)
def test_the_answer_to_an_image_does_not_depend_on_the_batch(name, cnn, held_out, pool):
    model, x, y = cnn.double(), held_out.x[:9].double(), held_out.y[:9]
    attack = MIFGSM(eps=EPS, step=STEP, steps=STEPS, pool=Pool(*pool), **COMPANIONS[name][0])
    whole = attack(model, x, y).x_adv
    assert torch.equal(attack(model, x, y, batch_size=4).x_adv, whole)
    assert torch.equal(attack(model, x[5:6], y[5:6], indices=torch.tensor([5])).x_adv, whole[5:6])


def test_without_momentum_and_companions_it_is_ifgsm(cnn, held_out):
    x, y = held_out.x[:9], held_out.y[:9]
    assert torch.equal(MIFGSM(eps=EPS, decay=0.0)(cnn, x, y).x_adv, IFGSM(eps=EPS)(cnn, x, y).x_adv)


def test_smoothing_keeps_the_sum_inside_and_loses_what_leaves_the_image():
    g = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    g[0, 0, 4, 4] = g[0, 1, 0, 0] = 1
    inside, corner = smooth(g, 3)[0].sum((1, 2))
    assert float(inside) == pytest.approx(1.0)
    assert 0.25 < float(corner) < 0.5


@pytest.mark.parametrize(("side", "left_out"), [(4, 3), (5, 4)])  # patches at the edge may be smaller
def test_the_perturbation_of_a_share_of_the_patches_is_left_out(side, left_out):
    x = torch.zeros(50, 3, 12, 12)
    patches = (-(-12 // side)) ** 2
    seen = patches_out(left_out / patches, side, 0, jobs_of(x, torch.zeros(50).long()), 0)(torch.ones_like(x))
    corners = seen[:, :, ::side, ::side].flatten(2)
    assert torch.equal((corners == 0).sum(2), torch.full((50, 3), left_out))
    assert torch.equal(seen, seen[:, :1].expand_as(seen))
    assert len(corners[:, 0].unique(dim=0)) > 5


def test_an_image_is_mixed_with_every_other_class_and_never_with_its_own():
    images, labels = torch.arange(5.0).view(5, 1, 1, 1), torch.tensor([0, 1, 1, 2, 0])
    y = torch.arange(3).repeat(100)
    mixed = Pool(images, labels).draw(0, jobs_of(torch.zeros(300, 1, 1, 1), y), 0).flatten()
    for label, expected in ((0, {1, 2, 3}), (1, {0, 3, 4}), (2, {0, 1, 2, 4})):
        assert set(mixed[y == label].int().tolist()) == expected


def test_pools_of_equal_images_are_equal(pool):
    images, labels = pool
    attack = MIFGSM(mix=0.2, pool=Pool(images, labels))
    assert attack == MIFGSM(mix=0.2, pool=Pool(images.clone(), labels))
    assert hash(attack) == hash(MIFGSM(mix=0.2, pool=Pool(images.clone(), labels)))
    assert attack != MIFGSM(mix=0.2, pool=Pool(images, labels.flip(0)))


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_budget_in_gradients_is_used_and_not_exceeded(name, pool):
    attack = MIFGSM(pool=Pool(*pool), **COMPANIONS[name][0])
    for budget in (30, 31, 100):
        steps = attack.within(budget).steps
        assert attack.cost(steps) <= budget < attack.cost(steps + 1)


def test_the_path_of_a_search_has_the_images_of_shorter_searches(cnn, held_out):
    model, x, y = cnn.double(), held_out.x[:9].double(), held_out.y[:9]
    for attack in (MIFGSM(eps=EPS, variance=2, steps=7), PGD(eps=EPS, steps=7, restarts=1)):
        path = attack.path(model, x, y, steps=[1, 3, 7], batch_size=4)
        for steps, images in zip((1, 3, 7), path, strict=True):
            shorter = type(attack)(**vars(attack) | {"steps": steps, "early_stop": False})
            assert torch.equal(shorter(model, x, y).x_adv, images)


def test_what_an_attack_lacks_is_said(cnn, held_out, pool):
    x, y = held_out.x[:4], held_out.y[:4]
    with pytest.raises(BackpassError, match="give pool=Pool"):
        MIFGSM(mix=0.2)(cnn, x, y)
    with pytest.raises(BackpassError, match="the pool's images must be of shape"):
        MIFGSM(mix=0.2, pool=Pool(pool[0][..., :3], pool[1]))(cnn, x, y)
    with pytest.raises(BackpassError, match="of another class"):
        MIFGSM(mix=0.2, pool=Pool(pool[0], torch.zeros(9).long()))(cnn, x, torch.zeros(4).long())
    with pytest.raises(BackpassError, match=r"labels \(P,\); got \(9, 1, 8, 8\) and \(3,\)"):
        Pool(pool[0], pool[1][:3])
    for settings in ({"translation": 2}, {"patchout": 0.5}):
        with pytest.raises(BackpassError, match="work on images"):
            MIFGSM(**settings)(torch.nn.Linear(64, 10), x.flatten(1), y)
    with pytest.raises(BackpassError, match="a budget of 4 gradients is too small: a step of MIFGSM takes 5"):
        MIFGSM(scales=5).within(4)
    with pytest.raises(BackpassError, match=r"in ascending order, from 1 to 10; got \[3, 11\]"):
        MIFGSM().path(cnn, x, y, steps=[3, 11])
