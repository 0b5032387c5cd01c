"""APGD against a slow single-sample transcription of algorithm 1, and what it reports of its halvings."""

import pytest
import torch
import torch.nn.functional as F

from backpass.attacks import APGD
from backpass.attacks.apgd import checkpoints
from backpass.attacks.noise import make_key
from backpass.attacks.threat import make_threat
from backpass.errors import BackpassError


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [3, 5, 6, 7, 8, 9]


def slow_apgd(model, x, y, start, norm, eps, steps):
    """Algorithm 1 for one sample: returns the best point and the iterations of halving."""
    threat = make_threat(norm, eps, (0.0, 1.0))

    def look(z):
        z = z.clone().requires_grad_()
        value = F.cross_entropy(model(z), y)
        return value.item(), torch.autograd.grad(value, z)[0]

    z = before = best_z = start
    step, halvings, last_mark, halved_last, rises = 2 * eps, [], 0, False, 0
    last, best_g = look(start)
    best = mark_best = last
    for k in range(steps + 1):
        value, g = look(z)
        rises += value > last
        last = value
        if value > best:
            best, best_z, best_g = value, z, g
        if k in checkpoints(steps):
            halve = rises < 0.75 * (k - last_mark) or (not halved_last and best == mark_best)
            if halve:
                step, z, g, last = step / 2, best_z, best_g, best
                halvings.append(k)
            last_mark, halved_last, mark_best, rises = k, halve, best, 0
        ahead = threat.project(x, z + step * threat.direction(g))
        if k:
            ahead = threat.project(x, z + 0.75 * (ahead - z) + 0.25 * (z - before))
        before, z = z, ahead
    return best_z, halvings


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.06), ("l2", 0.4)])
def test_every_sample_follows_algorithm_1(cnn, held_out, norm, eps):
    cnn, x, y = cnn.double(), held_out.x[:12].double(), held_out.y[:12]
    attack = APGD(eps=eps, norm=norm, steps=40, early_stop=False)
    result = attack(cnn, x, y)
    index = torch.arange(12)
    starts = make_threat(norm, eps, (0.0, 1.0)).start(x, make_key(0, index, 0 * index, 1, like=index))
    for i in range(12):
        row = slice(i, i + 1)
        best, halvings = slow_apgd(cnn, x[row], y[row], starts[row], norm, eps, 40)
        if not result.success[i]:
            torch.testing.assert_close(result.x_adv[row], best, atol=1e-9, rtol=0)
        assert [k for k in result.halvings[i].tolist() if k >= 0] == halvings


def test_fooled_samples_have_no_later_halvings(cnn, held_out):
    x, y = held_out.x[:64], held_out.y[:64]
    result = APGD(eps=0.15, steps=40)(cnn, x, y)
    assert result.halvings.shape == (64, len(checkpoints(40)))
    assert bool((result.halvings[result.success][:, -1] == -1).float().mean() > 0.5)
    assert bool((result.halvings[~result.success] >= 0).any())


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", "dlr-targeted"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5)])
def test_the_answer_is_that_of_any_batch_size(cnn, held_out, loss, norm, eps):
    cnn, x, y = cnn.double(), held_out.x[:24].double(), held_out.y[:24]
    attack = APGD(eps=eps, norm=norm, steps=10, loss=loss, restarts=2, targets=2)
    whole = attack(cnn, x, y)
    part = attack(cnn, x, y, batch_size=7)
    torch.testing.assert_close(part.x_adv, whole.x_adv, atol=1e-9, rtol=0)
    assert torch.equal(part.success, whole.success)
    assert torch.equal(part.halvings, whole.halvings)


def test_targeted_dlr_tries_the_likeliest_classes_in_turn(cnn, held_out):
    x, y = held_out.x[:128], held_out.y[:128]
    one, nine = (APGD(eps=0.08, steps=20, loss="dlr-targeted", targets=t)(cnn, x, y) for t in (1, 9))
    assert nine.success.sum() >= one.success.sum()
    assert nine.gradients > one.gradients


def test_targeted_dlr_does_not_lead_to_the_users_classes():
    with pytest.raises(BackpassError, match="leads away from y to classes of its own choice"):
        APGD(loss="dlr-targeted", targeted=True)


def test_lead_to_the_users_classes(cnn, held_out):
    x, y = held_out.x[:32], (held_out.y[:32] + 1) % 10
    result = APGD(eps=0.3, steps=20, targeted=True)(cnn, x, y)
    assert result.success.float().mean() > 0.8
    assert torch.equal(cnn(result.x_adv).argmax(1) == y, result.success)
