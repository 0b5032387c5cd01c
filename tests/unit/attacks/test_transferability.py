"""transfer: the matrix of black-box success against a slow loop."""

import pytest
import torch

from backpass.attacks import FGSM, PGD, transfer
from backpass.errors import BackpassError


def test_the_matrix_is_that_of_a_slow_loop(cnn, mlp, held_out):
    x, y = held_out.x[:100], held_out.y[:100]
    models = {"cnn": cnn, "mlp": mlp}
    attack = PGD(eps=0.15, step=0.04, steps=5, restarts=1, early_stop=False)
    report = transfer(models, models, (x, y), attack, batch_size=32)
    for s, source in models.items():
        x_adv = attack(source, x, y).x_adv
        for t, target in models.items():
            right = target(x).argmax(1) == y
            fooled = right & (target(x_adv).argmax(1) != y)
            assert torch.equal(report.fooled[s][t], fooled)
            assert torch.equal(report.correct[t], right)
            assert (report.rates[s][t].hits, report.rates[s][t].trials) == (int(fooled.sum()), int(right.sum()))
    matrix = report.matrix
    assert matrix[0, 0] > matrix[0, 1] > 0
    assert matrix[1, 1] > matrix[1, 0] > 0


def test_it_leaves_train_mode_as_it_is(cnn, mlp, held_out):
    cnn.train()
    before = {name: value.clone() for name, value in cnn.state_dict().items()}
    transfer({"mlp": mlp}, {"cnn": cnn}, (held_out.x[:10], held_out.y[:10]), FGSM(eps=0.1))
    assert cnn.training
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())


def test_what_cannot_be_meant_is_refused(mlp, held_out):
    with pytest.raises(BackpassError, match="at least one source and one target"):
        transfer({}, {"mlp": mlp}, (held_out.x, held_out.y), FGSM())
    with pytest.raises(BackpassError, match="needs classes="):
        transfer({"mlp": mlp}, {"mlp": mlp}, (held_out.x, held_out.y), FGSM(targeted=True))
