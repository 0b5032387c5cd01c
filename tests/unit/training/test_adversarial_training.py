"""What adversarial training minimises, on which examples, by whose gradients, and at what cost."""

import gc
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError, LinBP, ProxProp
from backpass.attacks import APGD, FAB, FGSM, PGD, AutoAttack, Square
from backpass.rules import attachments
from backpass.training.adversary import AdversarialTraining
from backpass.training.batches import Batch
from backpass.training.processes import local_model

EPS = 0.1


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(16, 3),
    )


def batch(rows=slice(None), *, epoch=5, seed=7):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(12, 1, 4, 4, generator=generator), torch.arange(12) % 3
    return Batch(x=x[rows], y=y[rows], index=torch.arange(100, 112)[rows], epoch=epoch, step=0, seed=seed)


def examples(objective, model, some, plain=nullcontext):
    return objective.examples(model, some, plain)


def kl(p, q):
    """By torch.distributions, an implementation of its own."""
    categorical = torch.distributions.Categorical
    return torch.distributions.kl_divergence(categorical(logits=p), categorical(logits=q))


PGD5 = PGD(eps=EPS, step=EPS / 4, steps=5, restarts=1, early_stop=False)


def test_examples_are_those_of_the_attack_written_out():
    # z <- clip(z + step sign(grad CE(f(z), y))) in eval mode, from the start that the attack draws.
    model, some = network(), batch()
    objective = AdversarialTraining(replace(PGD5, random_start=False))
    got = examples(objective, model, some)
    model.eval()
    z = some.x.clone()
    for _ in range(5):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), some.y, reduction="sum"), z)
        z = (z + EPS / 4 * gradient.sign()).clamp(some.x - EPS, some.x + EPS).clamp(0, 1).detach()
    assert torch.allclose(got, z, rtol=0, atol=1e-6)


def test_the_loss_is_the_mean_cross_entropy_at_the_examples():
    model, some = network().eval(), batch()
    objective = AdversarialTraining(PGD5)
    evaluated = objective(model, some, nullcontext)
    x_adv = examples(objective, model, some)
    expected = F.cross_entropy(model(x_adv), some.y, reduction="none")
    assert torch.allclose(evaluated.loss, expected.mean(), rtol=0, atol=1e-6)
    assert torch.equal(evaluated.correct, model(x_adv).argmax(1) == some.y)
    assert evaluated.metrics["adversarial_accuracy"] == evaluated.correct.float().mean()
    wanted = torch.autograd.grad(expected.mean(), list(model.parameters()))
    got = torch.autograd.grad(evaluated.loss, list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(got, wanted, strict=True))


def test_again_evaluates_rows_with_the_examples_held_fixed():
    model, some = network().eval(), batch()
    for trades in (None, 3.0):
        evaluated = AdversarialTraining(PGD5, trades=trades)(model, some, nullcontext)
        parts = [evaluated.again(model, slice(start, start + 1)) for start in range(len(some))]
        assert torch.allclose(evaluated.loss, torch.stack(parts).mean(), rtol=0, atol=1e-6)
        assert torch.allclose(evaluated.again(model, slice(3, 8)), torch.stack(parts[3:8]).mean(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("trades", [None, 3.0])
def test_an_output_without_logits_is_refused(trades):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return {"logits": self.inner(x)}

    with pytest.raises(BackpassError, match=r'logits="logits"'):
        AdversarialTraining(PGD5, trades=trades)(Named(), batch(), nullcontext)
    evaluated = AdversarialTraining(replace(PGD5, logits="logits"), trades=trades)(Named(), batch(), nullcontext)
    assert evaluated.loss.requires_grad


def test_trades_is_clean_cross_entropy_and_beta_times_the_divergence():
    model, some = network().eval(), batch()
    model[-1].weight.data *= 5  # far from symmetric, so that KL(p || q) is not KL(q || p)
    objective = AdversarialTraining(PGD5, trades=6.0)
    evaluated = objective(model, some, nullcontext)
    # The inner maximum, written out: ascent of KL(p(x) || p(z)) from the start that the attack draws.
    start = examples(AdversarialTraining(replace(PGD5, step=0.0, steps=1)), model, some)
    reference, z = model(some.x).detach(), start
    for _ in range(5):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(kl(reference, model(z)).sum(), z)
        z = (z + EPS / 4 * gradient.sign()).clamp(some.x - EPS, some.x + EPS).clamp(0, 1).detach()
    expected = F.cross_entropy(model(some.x), some.y, reduction="none") + 6.0 * kl(model(some.x), model(z))
    assert torch.allclose(evaluated.loss, expected.mean(), rtol=0, atol=1e-5)
    # The gradient flows through both arguments of the divergence.
    wanted = torch.autograd.grad(expected.mean(), list(model.parameters()))
    got = torch.autograd.grad(evaluated.loss, list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def test_making_examples_leaves_batch_norm_modes_and_gradients_alone():
    model, some = network().train(), batch()
    model[1].eval()  # a frozen BatchNorm stays frozen
    objective = AdversarialTraining(PGD5, rule=LinBP(start=-1))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    x_adv = examples(objective, model, some)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not x_adv.requires_grad
    assert torch.all((x_adv - some.x).abs() <= EPS + 1e-6)


def test_examples_depend_on_seed_sample_and_epoch_and_on_nothing_else():
    model, some = network(), batch()
    objective = AdversarialTraining(PGD5)
    whole = examples(objective, model, some)
    parts = [examples(AdversarialTraining(PGD5), model, batch(rows)) for rows in (slice(0, 5), slice(5, 12))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(examples(objective, model, replace(some, step=99)), whole)
    assert not torch.equal(examples(objective, model, batch(epoch=6)), whole)
    assert not torch.equal(examples(objective, model, batch(seed=8)), whole)
    assert not torch.equal(examples(AdversarialTraining(replace(PGD5, seed=1)), model, some), whole)


class Counting(nn.Module):
    """Counts rows that pass forward, and rows whose gradients come back."""

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x):
        self.forwards += len(x)
        output = self.model(x)
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(self, "backwards", self.backwards + len(gradient)))
        return output


@pytest.mark.parametrize(("trades", "forwards", "backwards"), [(None, 6, 6), (6.0, 8, 7)])
@pytest.mark.parametrize("rule", [None, LinBP(start=1)], ids=str)
def test_an_update_costs_the_steps_and_one_more(trades, forwards, backwards, rule):
    # Of TRADES x and x' pass in the last one, and x once more as the reference.
    # Restarts and early stops are for evaluation: neither has an effect here.
    model, some = Counting(network()), batch()
    objective = AdversarialTraining(PGD(eps=EPS, step=EPS / 4, steps=5, restarts=3), trades=trades, rule=rule)
    for _ in range(2):
        model.forwards = model.backwards = 0
        objective(model, some, nullcontext).loss.backward()
        assert (model.forwards, model.backwards) == (forwards * 12, backwards * 12)
    objective.close()


@pytest.mark.parametrize(
    "attack",
    [FGSM(eps=EPS), APGD(eps=EPS, steps=5), Square(eps=EPS, queries=10), AutoAttack(eps=EPS, steps=3, queries=5)],
    ids=lambda a: type(a).__name__,
)
def test_any_attack_can_be_the_inner_maximiser(attack):
    model, some = network(), batch()
    x_adv = examples(AdversarialTraining(attack), model, some)
    assert x_adv.shape == some.x.shape
    assert not torch.equal(x_adv, some.x)


def gradients_of(model, objective, some, rules=()):
    attached = [rule.attach(model) for rule in rules]
    plain = attached[0].suspended if attached else nullcontext
    x_adv = examples(objective, model, some, plain)
    loss = objective(model, some, plain).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for one in attached:
        one.remove()
    objective.close()
    return x_adv, gradients


def test_the_strategies_of_the_paper():
    # 1: LinBP for the weights; 2: LinBP for the examples; both.
    model, some, lin = network().eval(), batch(), LinBP(start=0)
    with lin.attach(model):
        linear = examples(AdversarialTraining(PGD5), model, some)
    plain = examples(AdversarialTraining(PGD5), model, some)
    assert not torch.equal(linear, plain)

    def weight_gradients(x, rule):
        with rule.attach(model) if rule else nullcontext():
            return torch.autograd.grad(F.cross_entropy(model(x), some.y), list(model.parameters()))

    for generating, updating in [(None, None), (None, lin), (lin, None), (lin, lin)]:
        objective = AdversarialTraining(PGD5, rule=generating)
        x_adv, got = gradients_of(model, objective, some, [updating] if updating else [])
        assert torch.equal(x_adv, linear if generating else plain)
        wanted = weight_gradients(x_adv, updating)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(got, wanted, strict=True))


def test_the_rule_of_the_examples_is_in_force_only_while_they_are_made():
    model, some = network(), batch()
    objective = AdversarialTraining(PGD5, rule=LinBP(start=-1))
    objective(model, some, nullcontext)
    assert attachments(model) == []
    objective.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forgotten_objective_takes_its_rule_along():
    model, some = network(), batch()
    objective = AdversarialTraining(PGD5, rule=LinBP(start=-1))
    objective(model, some, nullcontext)
    del objective
    gc.collect()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_it_composes_with_a_proximal_update():
    model, some = network().eval(), batch()
    objective = AdversarialTraining(PGD5, trades=2.0, rule=LinBP(start=-1))
    with ProxProp(tau=0.5).attach(model) as attached:
        objective(model, some, attached.suspended).loss.backward()
    proximal = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    objective(model, some, nullcontext).loss.backward()
    assert any(not torch.allclose(a, p.grad) for a, p in zip(proximal, model.parameters(), strict=True))


def test_local_model_sees_through_nothing_but_ddp():
    model = network()
    assert local_model(model) is model
    compiled = torch.compile(model)
    assert local_model(compiled) is compiled
    with pytest.raises(BackpassError, match="expected an nn.Module"):
        local_model(lambda x: x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": "pgd"}, "attack must be an attack"),
        ({"attack": PGD(targeted=True)}, "leave targeted=False"),
        ({"rule": "linbp"}, "rule must be a rule"),
        ({"trades": 0.0}, "beta, a positive number"),
        ({"trades": math.inf}, "beta, a positive number"),
        ({"trades": 1.0, "attack": AutoAttack()}, "chooses its losses itself"),
        ({"trades": 1.0, "attack": FAB()}, "chooses its losses itself"),
        ({"trades": 1.0, "attack": APGD(loss="dlr-targeted")}, "chooses its losses itself"),
        ({"warmup": -1}, "whole number of epochs"),
        ({"warmup": 1.5}, "whole number of epochs"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(BackpassError, match=message):
        AdversarialTraining(**{"attack": PGD5, **settings})
