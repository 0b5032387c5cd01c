"""transfer: the matrix of black-box success against a slow loop."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import LinBP
from backpass.attacks import FGSM, MIFGSM, PGD, Ensemble, transfer
from backpass.errors import BackpassError, UnknownNameError


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


def test_searches_run_to_the_end_by_default(cnn, mlp, held_out):
    data = held_out.x[:100], held_out.y[:100]
    one, other = (
        transfer({"a": cnn}, {"b": mlp}, data, PGD(eps=0.15, step=0.04, steps=10, early_stop=stop)).fooled["a"]["b"]
        for stop in (True, False)
    )
    assert torch.equal(one, other)


def test_rules_side_by_side_are_those_of_rules_attached_by_hand(cnn, mlp, held_out):
    data = held_out.x[:60], held_out.y[:60]
    attack = PGD(eps=0.15, step=0.04, steps=4, restarts=1)
    report = transfer({"a": cnn}, {"b": mlp}, data, attack, rules={"bp": None, "linbp": LinBP(start=-1)}, batch_size=25)
    with LinBP(start=-1).attach(cnn):
        by_hand = transfer({"a": cnn}, {"b": mlp}, data, attack)
    plain = transfer({"a": cnn}, {"b": mlp}, data, attack)
    assert list(report.fooled) == ["a bp", "a linbp"]
    assert torch.equal(report.fooled["a linbp"]["b"], by_hand.fooled["a"]["b"])
    assert torch.equal(report.fooled["a bp"]["b"], plain.fooled["a"]["b"])
    assert not torch.equal(report.fooled["a linbp"]["b"], report.fooled["a bp"]["b"])
    found = report.compare("a linbp", "a bp", "b")
    right = report.correct["b"]
    assert found.samples == int(right.sum())
    assert found.only_first == int((by_hand.fooled["a"]["b"] & ~plain.fooled["a"]["b"]).sum())


def mean_gradient(models, mean, x, y):
    def one(output, z):
        return torch.autograd.grad(F.cross_entropy(output, y, reduction="none").sum(), z, retain_graph=True)[0]

    z = x.clone().requires_grad_()
    outputs = [model(z) for model in models]
    if mean == "logits":
        return one(torch.stack(outputs).mean(0), z)
    gradients = [one(output, z) for output in outputs]
    if mean == "gradients":
        gradients = [g / g.abs().mean((1, 2, 3), keepdim=True) for g in gradients]
    return torch.stack(gradients).mean(0)


@pytest.mark.parametrize("mean", ["logits", "losses", "gradients"])
def test_an_ensemble_is_attacked_by_its_mean(mean, cnn, mlp, held_out):
    models = [cnn.double(), mlp.double()]
    x, y = held_out.x[:20].double(), held_out.y[:20]
    ensemble = Ensemble(models, mean=mean)
    result = FGSM(eps=0.1, early_stop=False)(ensemble, x, y)
    expected = (x + 0.1 * mean_gradient(models, mean, x, y).sign()).clamp(0, 1)
    torch.testing.assert_close(result.x_adv, expected)
    assert torch.equal(result.prediction, torch.stack([model(result.x_adv) for model in models]).mean(0).argmax(1))
    report = transfer({"both": ensemble}, {"a": models[0]}, (x, y), FGSM(eps=0.1))
    assert torch.equal(report.fooled["both"]["a"], report.correct["a"] & (models[0](result.x_adv).argmax(1) != y))


def test_a_sequence_of_sources_is_an_ensemble(cnn, mlp, held_out):
    data = held_out.x[:40], held_out.y[:40]
    attack, rules = PGD(eps=0.1, steps=3, restarts=1), {"linbp": LinBP(start=-1)}
    one, other = (
        transfer({"both": source}, {"a": cnn}, data, attack, rules=rules).fooled["both linbp"]["a"]
        for source in ([cnn, mlp], Ensemble([cnn, mlp]))
    )
    assert torch.equal(one, other)
    with pytest.raises(UnknownNameError, match="unknown mean 'probabilities'"):
        Ensemble([cnn], mean="probabilities")
    with pytest.raises(BackpassError, match="at least one"):
        Ensemble([])


def test_finished_parts_are_used_again(cnn, mlp, held_out, tmp_path):
    data = held_out.x[:60], held_out.y[:60]
    attack, calls = PGD(eps=0.15, step=0.04, steps=4, restarts=1), []
    cnn.register_forward_pre_hook(lambda module, args: calls.append(1))
    whole = transfer({"a": cnn}, {"b": mlp}, data, attack, batch_size=20, resume=tmp_path)
    first = len(calls)
    again = transfer({"a": cnn}, {"b": mlp}, data, attack, batch_size=20, resume=tmp_path)
    assert len(calls) - first < 0.3 * first
    assert again.to_dict() == whole.to_dict()
    with torch.no_grad():
        cnn[-1].bias += 0.5
    before = len(list(tmp_path.glob("*.pt")))
    transfer({"a": cnn}, {"b": mlp}, data, attack, batch_size=20, resume=tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == before + 3  # the target is the same


REFUSED = [
    ({"sources": {}}, "sources must be a dict of at least one by name; got {}"),
    ({"targets": nn.Linear(1, 1)}, "targets must be a dict of at least one by name; got Linear"),
    ({"attack": [FGSM()]}, "attack must be an attack"),
    ({"attack": FGSM(targeted=True)}, "needs classes="),
    ({"rules": []}, "rules must be a dict of at least one by name"),
    ({"rules": {"linbp": "linbp"}}, r"must be a rule, as backpass\.parse_rule\('linbp'\) makes it; got 'linbp'"),
    ({"sources": {"two": [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))]}}, r"got \[3, 64\] outputs"),
    ({"sources": {"none": []}}, "a list of at least one torch.nn.Module"),
    ({"gradients": [3]}, "needs an attack that takes steps, as ifgsm, mifgsm or pgd; got FGSM"),
    ({"attack": MIFGSM(scales=5), "gradients": [2, 10]}, "a budget of 2 gradients is too small"),
    ({"attack": PGD(), "gradients": [10, 5]}, r"increasing numbers, the last being the budget; got \[10, 5\]"),
    ({"attack": PGD(), "gradients": []}, "increasing numbers"),
    ({"attack": PGD(), "gradients": 5}, "increasing numbers"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_bad_arguments_are_refused(changed, message, mlp, held_out):
    given = {"sources": {"a": mlp}, "targets": {"b": mlp}, "attack": FGSM()}
    with pytest.raises(BackpassError, match=message):
        transfer(data=(held_out.x[:4], held_out.y[:4]), **given | changed)


def test_with_a_budget_every_rule_is_judged_after_equal_numbers_of_gradients(cnn, mlp, held_out, tmp_path):
    data = held_out.x[:40], held_out.y[:40]
    attack = MIFGSM(eps=0.15, step=0.04, variance=2)  # 1 gradient for the first step, 3 for each further one
    rules = {"bp": None, "linbp": LinBP(start=-1)}
    report = transfer({"a": cnn}, {"b": mlp}, data, attack, rules=rules, gradients=[1, 3, 4, 11], batch_size=25)
    assert list(report.after) == [1, 3, 4, 11]
    for gradients, steps in ((1, 1), (3, 1), (4, 2), (11, 4)):
        short = replace(attack, steps=steps)
        alone = transfer({"a": cnn}, {"b": mlp}, data, short, rules=rules).fooled
        for source, row in report.after[gradients].items():
            assert torch.equal(row["b"], alone[source]["b"]), (gradients, source)
    assert torch.equal(report.fooled["a linbp"]["b"], report.after[11]["a linbp"]["b"])
    curve = report.curves["a bp"]["b"]
    assert curve[11] == report.rates["a bp"]["b"]
    assert report.to_dict()["after_gradients"]["a bp"]["b"]["4"]["hits"] == curve[4].hits
    assert "after_gradients" not in transfer({"a": cnn}, {"b": mlp}, data, short).to_dict()
    kept, calls = {"resume": tmp_path, "gradients": [1, 11], "batch_size": 25}, []
    first = transfer({"a": cnn}, {"b": mlp}, data, attack, **kept)
    cnn.register_forward_pre_hook(lambda module, args: calls.append(1))
    assert transfer({"a": cnn}, {"b": mlp}, data, attack, **kept).to_dict() == first.to_dict()
    assert len(calls) < 5
    other = transfer({"a": cnn}, {"b": mlp}, data, attack, **kept | {"gradients": [4, 11]})
    assert torch.equal(other.after[4]["a"]["b"], report.after[4]["a bp"]["b"])
