"""FGSM, I-FGSM and MI-FGSM against a slow loop written from the papers."""

import torch
import torch.nn.functional as F

from backpass.attacks import FGSM, IFGSM, MIFGSM, PGD
from backpass.attacks.diversity import Diversity
from backpass.attacks.jobs import Jobs
from backpass.attacks.threat import make_threat


def gradient(model, z, y):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)[0]


def test_fgsm_is_one_sign_step(cnn, held_out):
    x, y = held_out.x[:16], held_out.y[:16]
    expected = (x + 0.1 * gradient(cnn, x, y).sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(eps=0.1, early_stop=False)(cnn, x, y).x_adv, expected)


def test_fgsm_in_l2_is_one_normalised_step(cnn, held_out):
    x, y = held_out.x[:16], held_out.y[:16]
    g = gradient(cnn, x, y)
    expected = (x + 0.5 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
    torch.testing.assert_close(FGSM(eps=0.5, norm="l2", early_stop=False)(cnn, x, y).x_adv, expected)


def test_fgsm_leaves_alone_what_the_model_mistakes_anyway(cnn, held_out):
    x, y = held_out.x[:16], held_out.y[:16].clone()
    y[3] = (y[3] + 1) % 10
    result = FGSM(eps=0.1)(cnn, x, y)
    assert torch.equal(result.x_adv[3], x[3])
    assert bool(result.success[3])


def test_ifgsm_is_pgd_from_the_image(cnn, held_out):
    x, y = held_out.x[:16], held_out.y[:16]
    pgd = PGD(eps=0.1, step=0.03, random_start=False)(cnn, x, y)
    ifgsm = IFGSM(eps=0.1, step=0.03)(cnn, x, y)
    assert torch.equal(ifgsm.x_adv, pgd.x_adv)
    assert ifgsm.gradients == pgd.gradients


def test_momentum_accumulates_l1_normalised_gradients(cnn, held_out):
    cnn, x, y = cnn.double(), held_out.x[:16].double(), held_out.y[:16]
    z, m = x, torch.zeros_like(x)
    for _ in range(5):
        g = gradient(cnn, z, y)
        m = 0.9 * m + g / g.abs().sum((1, 2, 3), keepdim=True)
        z = torch.clamp(z + 0.03 * m.sign(), x - 0.1, x + 0.1).clamp(0, 1)
    mine = MIFGSM(eps=0.1, step=0.03, steps=5, decay=0.9, early_stop=False)(cnn, x, y)
    torch.testing.assert_close(mine.x_adv, z)


def test_momentum_follows_its_sample_when_others_leave(cnn, held_out):
    cnn, x, y = cnn.double(), held_out.x[:64].double(), held_out.y[:64]
    attack = MIFGSM(eps=0.1, step=0.02, steps=10)
    alone = torch.cat([attack(cnn, x[i : i + 1], y[i : i + 1]).x_adv for i in range(64)])
    assert torch.equal(attack(cnn, x, y).x_adv, alone)


def test_input_diversity_is_drawn_per_sample(cnn, held_out):
    cnn, x, y = cnn.double(), held_out.x[:16].double(), held_out.y[:16]
    attack = MIFGSM(eps=0.1, step=0.02, diversity=0.7, resize=0.7, early_stop=False)
    whole = attack(cnn, x, y)
    assert torch.equal(attack(cnn, x, y, batch_size=5).x_adv, whole.x_adv)
    assert not torch.equal(MIFGSM(eps=0.1, step=0.02, early_stop=False)(cnn, x, y).x_adv, whole.x_adv)


def test_a_diverse_view_is_a_smaller_image_on_black():
    x, index = torch.ones(64, 1, 20, 20), torch.arange(64)
    jobs = Jobs(x, index, index, index, torch.zeros_like(index), make_threat("linf", 0.1, (0.0, 1.0)))
    seen = Diversity(1.0, 0.5).draw(0, jobs, 0)(x)
    share = seen.mean((1, 2, 3))
    assert 0.2 <= share.min() < 0.35
    assert 0.8 < share.max() <= 1.0
    untouched = Diversity(0.0, 0.5).draw(0, jobs, 0)(held := torch.rand(64, 1, 20, 20))
    torch.testing.assert_close(untouched, held, atol=1e-4, rtol=0)
