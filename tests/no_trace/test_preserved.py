"""preserved(model): whatever happens inside, afterwards the model and the generators are as before."""

import copy
import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from backpass import BackpassError
from backpass.preserved import preserved


class Body(nn.Module):
    """A network with everything that can be disturbed; `act` disturbs it on each call."""

    def __init__(self, act=lambda model, x: None):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)
        self.register_buffer("undefined", torch.tensor([torch.nan, 1.0]))
        self.register_buffer("shared", self.calls)
        self.plain = torch.zeros(2)
        self.generator = torch.Generator().manual_seed(3)
        self.act = act
        self.last.weight.requires_grad_(False)
        self.first.weight.grad = torch.ones(6, 4)

    def train(self, mode=True):
        super().train(mode)
        self.norm.training = False
        return self

    def forward(self, x):
        self.act(self, x)
        return self.last(self.norm(self.first(x)))


def batch_statistics(model, x):
    F.batch_norm(model.first(x), model.norm.running_mean, model.norm.running_var, training=True)


def rebound(model, x):
    model.calls = model.calls + 1
    model.plain = model.plain + 1
    model.nothing = torch.ones(1)


def lazily_made(model, x):
    model.register_buffer("late", torch.ones(1), persistent=False)
    model.late_parameter = nn.Parameter(torch.ones(1))
    model.late_module = nn.Linear(1, 1)


def own_backward_pass(model, x):
    with torch.enable_grad():
        model.first(x).sum().backward()


def frozen_and_hooked(model, x):
    model.first.weight.requires_grad_(False)
    model.last.weight.requires_grad_(True)
    model.first.register_forward_hook(lambda *_: None)
    model.first.register_full_backward_pre_hook(lambda *_: None, prepend=True)
    model.register_forward_pre_hook(lambda *_: None, with_kwargs=True)


def drawn(model, x):
    torch.rand(1), random.random(), np.random.rand(), torch.rand(1, generator=model.generator)  # noqa: NPY002
    torch.manual_seed(5)


def failing(model, x):
    model.calls += 1
    raise ZeroDivisionError


DISTURBANCES = {
    "batch statistics": batch_statistics,
    "written": lambda model, x: (model.calls.add_(1), model.plain.add_(1), model.undefined.fill_(2)),
    "resized": lambda model, x: model.undefined.resize_(5).fill_(1),
    "re-bound": rebound,
    "deleted": lambda model, x: delattr(model, "undefined"),
    "replaced": lambda model, x: setattr(model, "first", nn.Linear(4, 6)),
    "lazily made": lazily_made,
    "own backward pass": own_backward_pass,
    "frozen and hooked": frozen_and_hooked,
    "drawn": drawn,
    "modes": lambda model, x: (model.train(), torch.set_grad_enabled(False)),
    "failing": failing,
}


def state(model):
    """Everything that must be equal before and after, tensors as lists of their bytes."""

    def of(tensor):
        return None if tensor is None else (id(tensor), tuple(tensor.shape), tensor.detach().clone().numpy().tobytes())

    modules = dict(model.named_modules())
    return {
        "modules": {name: (id(one), one.training) for name, one in modules.items()},
        "buffers": {(n, k): of(v) for n, one in modules.items() for k, v in one._buffers.items()},
        "plain": {(n, k): of(v) for n, one in modules.items() for k, v in vars(one).items() if torch.is_tensor(v)},
        "parameters": {n: (of(v), v.requires_grad, of(v.grad)) for n, v in model.named_parameters()},
        "hooks": {(n, k): list(v) for n, one in modules.items() for k, v in vars(one).items() if "_hooks" in k},
        "generators": [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],  # noqa: NPY002
        "own generators": [
            one.get_state().tolist()
            for m in modules.values()
            for one in vars(m).values()
            if type(one) is torch.Generator
        ],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def differences(before, after):
    return [key for key in before if before[key] != after[key]]


WRAPPERS = {
    "plain": lambda model: model,
    "copied": copy.deepcopy,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "in a sequence twice": lambda model: nn.Sequential(nn.Sequential(model), nn.Identity(), model.norm.eval()),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("training", [False, True, None])
@pytest.mark.parametrize("act", DISTURBANCES.values(), ids=DISTURBANCES)
def test_everything_is_as_before(act, training, wrap):
    if wrap is WRAPPERS["in a sequence twice"]:
        model = nn.ModuleList([Body(act), nn.Identity()])
        model.append(model[0].norm)
        called = model[0]
    else:
        model = called = wrap(Body(act))
    body = called if isinstance(called, Body) else called._orig_mod
    body.train()
    modes = [module.training for module in body.modules()]
    x = torch.rand(5, 4)
    before = state(model)
    for graph in (False, True):
        try:
            with preserved(model, training=training, graph=graph):
                inside = [module.training for module in body.modules()]
                assert inside == (modes if training is None else [training] * len(modes))
                body(x) if wrap is not WRAPPERS["compiled"] else called(x)
        except ZeroDivisionError:
            assert act is failing
        assert differences(before, state(model)) == []


def test_graphs_from_before_stay_valid():
    model = Body(lambda model, x: (model.plain.mul_(3), model.calls.add_(1)))
    model.plain.fill_(2)
    w = torch.ones((), requires_grad=True)
    loss = (w * model.plain * (model.calls + 1)).square().sum()
    with preserved(model):
        model(torch.rand(5, 4))
    assert torch.autograd.grad(loss, w)[0] == 2 * 2 * 2 * 2


def test_graphs_from_inside_stay_valid_where_wanted():
    model = Body(lambda model, x: model.plain.mul_(3))
    model.plain.fill_(2)
    w = torch.ones((), requires_grad=True)
    with preserved(model, graph=True):
        model(torch.rand(5, 4))
        loss = (w * model.plain).square().sum()
    assert torch.equal(model.plain, torch.full((2,), 2.0))
    assert torch.autograd.grad(loss, w)[0] == 2 * 2 * 6 * 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("grad", [True, False, None])
def test_grad_mode(mode, grad):
    model = Body()
    with mode():
        outside = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        with preserved(model, grad=grad):
            inside = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            assert inside == (outside if grad is None else (grad, False))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == outside


def test_buffers_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.BatchNorm1d(4)
    model.weight, model.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
    before = model.running_mean.clone()
    with preserved(model, training=True, grad=False), torch.inference_mode():
        model(torch.rand(5, 4))
    assert torch.equal(model.running_mean, before)
    assert model.running_mean.is_inference()


def test_a_hook_that_is_removed_inside_stays_removed():
    model = Body()
    handle = model.register_forward_hook(lambda *_: None)
    with preserved(model):
        handle.remove()
        model.first.register_forward_hook(lambda *_: None)
    assert not model._forward_hooks
    assert not model.first._forward_hooks


def test_entering_again():
    model = Body(batch_statistics)
    before = state(model)
    with preserved(model, training=True):
        inside = state(model)
        with preserved(model):
            model(torch.rand(5, 4))
            assert not model.first.training
        assert differences(inside, state(model)) == []
    assert differences(before, state(model)) == []


def test_threads_wait_for_each_other_where_models_share_a_part():
    shared = nn.BatchNorm1d(4)
    models = [nn.Sequential(shared), nn.Sequential(nn.Sequential(shared), nn.Identity()), nn.Sequential(nn.Identity())]
    inside, most = [], []

    def run(number):
        for _ in range(40):
            with preserved(models[number], training=True):
                if number < 2:
                    inside.append(number)
                    most.append(len(inside))
                models[number](torch.rand(3, 4))
                if number < 2:
                    inside.remove(number)

    threads = [threading.Thread(target=run, args=(number % 3,)) for number in range(6)]
    before = copy.deepcopy(shared.state_dict())
    shared.eval()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(most) == {1}
    assert all(torch.equal(before[name], value) for name, value in shared.state_dict().items())
    assert not shared.training


def test_unrelated_models_do_not_wait():
    entered = threading.Event()

    def other():
        with preserved(Body()):
            entered.set()

    with preserved(Body()):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(60)
    thread.join(60)


def test_another_thread_waits_until_the_first_has_left():
    model, entered = Body(), threading.Event()

    def other():
        with preserved(model):
            entered.set()

    with preserved(model), preserved(model):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(60)
    thread.join(60)


def test_compiled_code_is_used_again():
    model = Body().eval()
    seen = []

    def backend(graph, example):
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        with preserved(compiled):
            compiled(torch.rand(5, 4))
    compiled(torch.rand(5, 4))
    assert len(seen) == 1


def test_scripted_and_stateless_models():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    scripted = torch.jit.script(model)
    before = {name: value.clone() for name, value in scripted.state_dict().items()}
    for graph in (False, True):
        with preserved(scripted, training=True, graph=graph):
            scripted(torch.rand(5, 4))
        assert all(torch.equal(before[name], value) for name, value in scripted.state_dict().items())
    assert scripted.training

    def inside(own, x):
        with preserved(model):
            return functional_call(model, own, (x,)).sum()

    own = {name: value.detach() for name, value in model.named_parameters()}
    assert torch.func.grad(inside)(own, torch.rand(5, 4))["1.bias"].shape == (6,)


def test_refusals():
    with pytest.raises(BackpassError, match=r"must be a torch.nn.Module.*Wrap a function"), preserved(lambda x: x):
        pass
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(BackpassError, match="call it once on a batch"), preserved(lazy):
        pass
