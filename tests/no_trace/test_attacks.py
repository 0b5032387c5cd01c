"""Promise 1: after an attack the model and the global state are what they were, whatever happened meanwhile."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backpass.attacks as attacks

ATTACKS = {
    "pgd-linf": attacks.PGD(eps=0.1, steps=2, restarts=2),
    "pgd-l2": attacks.PGD(eps=0.5, steps=2, restarts=2, norm="l2", step=0.1),
    "fgsm": attacks.FGSM(eps=0.05),
    "ifgsm": attacks.IFGSM(eps=0.1, steps=2),
    "mifgsm": attacks.MIFGSM(eps=0.1, steps=2, diversity=0.5, noise=0.02),
    "apgd-linf": attacks.APGD(eps=0.1, steps=3, restarts=2),
    "apgd-targeted": attacks.APGD(eps=0.5, steps=3, norm="l2", loss="dlr-targeted", targets=2),
    "fab": attacks.FAB(eps=0.1, steps=2, targets=2),
    "square": attacks.Square(eps=0.1, queries=5),
    "fmn": attacks.FMN(steps=3),
    "apgd-l1": attacks.APGD(eps=2.0, steps=25, norm="l1"),
    "pgd-l1": attacks.PGD(eps=2.0, steps=2, norm="l1", step=0.5),
    "autoattack": attacks.AutoAttack(eps=0.05, steps=2, targets=2, queries=5),
    "eot": attacks.PGD(eps=0.1, steps=2, eot=2),
    "pgd-bf16": attacks.PGD(eps=0.1, steps=2, restarts=2, dtype=torch.bfloat16),
}

every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
every_mode = pytest.mark.parametrize(
    "mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference_mode"]
)


class Wilful(nn.Module):
    """A model with all that an attack might disturb: it draws, it counts, and one BatchNorm of it is frozen."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.frozen = nn.BatchNorm2d(1)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.fail_after = 10**9

    def train(self, mode: bool = True) -> Wilful:
        super().train(mode)
        self.frozen.training = False
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not any(module.training for module in self.modules())
        self.calls += 1
        self.nothing = self.calls * 2
        if self.calls > self.fail_after:
            raise RuntimeError("out of memory, say")
        return self.body(self.frozen(x)) + 1e-6 * torch.rand(len(x), 1, device=x.device)


def prepared(cnn: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Wilful:
    model = Wilful(cnn).train()
    model.body[0].weight.requires_grad_(False)
    model.body[1].eval()
    with torch.no_grad():
        model.body[4](torch.rand(4, 16, 4, 4))  # statistics that are not those of eval mode
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.rand_like(parameter)
    return model


def state(model: nn.Module) -> dict[str, object]:
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "versions": {name: value._version for name, value in model.named_parameters()},
        "identities": {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "nothing": model.nothing,
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        },
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "function_modes": torch.overrides._get_current_function_mode_stack(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [key for key in before if not same(before[key], after[key])]


@every_attack
@every_mode
def test_an_attack_leaves_no_trace(attack, mode, cnn, held_out):
    x, y = held_out.x[:6], held_out.y[:6]
    model = prepared(cnn, x, y)
    before, x_before = state(model), x.clone()
    with mode():
        inside = state(model)
        attack(model, x, y)
        assert differences(inside, state(model)) == []
    assert differences(before, state(model)) == []
    assert torch.equal(x, x_before)
    assert x.grad is None
    assert not x.requires_grad


@every_attack
@every_mode
@pytest.mark.parametrize("calls", [0, 1], ids=["first", "second"])
def test_an_attack_that_fails_leaves_no_trace(attack, mode, calls, cnn, held_out):
    x, y = held_out.x[:6], held_out.y[:6]
    model = prepared(cnn, x, y)
    model.fail_after = calls
    before = state(model)
    with mode(), pytest.raises(RuntimeError, match="out of memory"):
        attack(model, x, y)
    assert differences(before, state(model)) == []


@every_attack
@every_mode
def test_the_answer_is_the_same_in_every_grad_mode(attack, mode, mlp, held_out):
    expected = attack(mlp, held_out.x[:6], held_out.y[:6]).x_adv
    with mode():
        x, y = held_out.x[:6].clone(), held_out.y[:6].clone()  # inference tensors, under inference_mode
        result = attack(mlp, x, y)
    assert torch.equal(result.x_adv, expected)
    assert not result.x_adv.is_inference()


@every_attack
def test_a_rule_stays_attached_as_it_was(attack, mlp, held_out):
    from backpass import LinBP

    x, y = held_out.x[:6], held_out.y[:6]

    def linear_gradient() -> torch.Tensor:
        z = x.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(mlp(z), y), z)[0]

    plain = linear_gradient()
    with LinBP(start=0).attach(mlp):
        before = linear_gradient()
        attack(mlp, x, y)
        assert torch.equal(linear_gradient(), before)
        assert not torch.equal(before, plain)
    assert torch.equal(linear_gradient(), plain)


@every_mode
def test_an_evaluation_leaves_no_trace(mode, cnn, held_out, tmp_path):
    x, y = held_out.x[:12], held_out.y[:12]
    model = prepared(cnn, x, y)
    attack = attacks.PGD(eps=0.1, steps=2, restarts=2)
    before = state(model)
    with mode():
        attacks.evaluate(model, (x, y), attack, batch_size=5, resume=tmp_path)
        attacks.transfer({"a": model}, {"b": model}, (x, y), attack, batch_size=5)
        attacks.save(tmp_path / "images.pt", model, x, y, attack(model, x, y), attack)
    assert differences(before, state(model)) == []


@every_attack
def test_tensors_are_made_where_the_images_are(attack, mlp, held_out):
    expected = attack(mlp, held_out.x[:6], held_out.y[:6]).x_adv
    with torch.device("meta"):  # a tensor made without saying where would be there, and could not be computed with
        assert torch.equal(attack(mlp, held_out.x[:6], held_out.y[:6]).x_adv, expected)


@pytest.mark.parametrize(
    "wrap", [torch.jit.script, torch.fx.symbolic_trace, lambda model: torch.compile(model, backend="eager")]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_wrapped_models_are_restored_too(wrap, mlp, held_out):
    attack = attacks.PGD(eps=0.1, steps=2)
    expected = attack(mlp, held_out.x[:6], held_out.y[:6]).x_adv
    wrapped = wrap(mlp)
    wrapped.train()
    assert torch.equal(attack(wrapped, held_out.x[:6], held_out.y[:6]).x_adv, expected)
    assert all(module.training for module in wrapped.modules())
