"""ProxProp with memory: a running average of each layer's Gram matrix against one that is written out."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import BackpassError, ProxProp
from backpass.rules.implicit.memory import Memory
from backpass.rules.implicit.systems import NotFiniteError
from support.proximal import relative

X = torch.randn(24, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(27, 8)
    model = nn.Sequential(
        conv, nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), linear, nn.Tanh(), nn.Linear(8, 3, bias=False)
    )
    return model.double()


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    return x if layer.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1)


class WrittenOut:
    """The slow re-implementation: every layer's average, refreshed in the given steps."""

    def __init__(self, model: nn.Module, decay: float, damping: str, tau: float) -> None:
        self.layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
        self.mean: dict[nn.Module, Tensor] = {}
        self.since: dict[nn.Module, int] = {}
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.decay, self.damping, self.tau = decay, damping, tau
        for layer in self.layers:
            layer.register_forward_hook(lambda m, args, out: self.inputs.setdefault(m, []).append(args[0].detach()))

    def directions(self, due: list[nn.Module]) -> list[Tensor]:
        found = []
        for layer in self.layers:
            inputs = torch.cat(self.inputs[layer])
            a = rows(layer, inputs)
            if layer in due:
                gram = a.T @ a / len(a)
                kept = self.decay ** self.since[layer] if layer in self.mean else 0.0
                self.mean[layer] = kept * self.mean.get(layer, gram) + (1 - kept) * gram
                self.since[layer] = 0
            self.since[layer] += 1
            mean = self.mean[layer]
            scale = 1.0
            if self.damping == "relative":
                added = scale = mean.trace() / len(mean) / self.tau
            else:
                added = 1 / self.tau * (len(inputs) / len(a) if self.damping == "sample_mean" else 1)
                scale = len(inputs) / len(a) if self.damping == "sample_mean" else 1.0
            g = layer.weight.grad.flatten(1)
            g = g if layer.bias is None else torch.cat([g, layer.bias.grad[:, None]], 1)
            found.append(scale * torch.linalg.solve(mean + added * torch.eye(len(mean)).double(), g.T).T)
        self.inputs.clear()
        return found


def by_layer(model: nn.Module) -> list[Tensor]:
    layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    return [
        torch.cat([m.weight.grad.flatten(1), *([] if m.bias is None else [m.bias.grad[:, None]])], 1) for m in layers
    ]


def backward(model: nn.Module, step: int, parts: int) -> None:
    x, y = X.roll(7 * step, 0)[:12] * (1 + 0.3 * step), Y.roll(7 * step)[:12]
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (F.cross_entropy(model(a), b) / parts).backward()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("damping", ["relative", "mean", "sample_mean"])
@pytest.mark.parametrize(("decay", "refresh"), [(0.9, 1), (0.5, 3), (0.0, 2), (0.9, None)])
def test_it_is_the_running_average(decay: float, refresh: int, damping: str, parts: int) -> None:
    model = network()
    reference = copy.deepcopy(model)
    slow = WrittenOut(reference, decay, damping, 2.0)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, reference)]
    rule = ProxProp(tau=2.0, damping=damping, solve="step", memory=decay, refresh=refresh)
    with rule.attach(model, optimizers[0]) as attached:
        for step in range(7):
            before = {name: layer.mean.clone() for name, layer in attached.memory.layers.items()}
            for m, optimizer in zip((model, reference), optimizers, strict=True):
                optimizer.zero_grad()
                backward(m, step, parts)
            optimizers[0].step()
            memory = attached.memory.layers
            due = [
                layer
                for layer, name in zip(slow.layers, ("0.weight", "4.weight", "6.weight"), strict=True)
                if name not in before or not torch.equal(before[name], memory[name].mean)
            ]
            assert len(due) == (3 if step == 0 or refresh in (1, None) else len(due))
            expected = slow.directions(due)
            for layer, value in zip(slow.layers, expected, strict=True):
                columns = layer.weight[0].numel()
                layer.weight.grad.copy_(value[:, :columns].view_as(layer.weight))
                if layer.bias is not None:
                    layer.bias.grad.copy_(value[:, -1])
            optimizers[1].step()
            for found, value in zip(by_layer(model), expected, strict=True):
                assert relative(found, value) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", ["relative", "sum", "mean", "sample_mean"])
@pytest.mark.parametrize("samples", [4, 24])
def test_without_memory_and_refreshed_always_it_is_the_exact_step_to_the_bit(
    samples: int, damping: str, dtype: torch.dtype
) -> None:
    """Systems over rows and over columns, of convolutions and linear layers, with and without bias."""
    found = []
    for settings in ({}, {"solve": "step", "memory": 0.0, "refresh": 1}):
        model = network().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        rule = ProxProp(tau=2.0, damping=damping, **settings)
        with rule.attach(model, optimizer) if settings else rule.attach(model):
            F.cross_entropy(model(X[:samples].to(dtype)), Y[:samples]).backward()
            optimizer.step()
        found.append([p.grad for p in model.parameters()])
    for exact, at_step in zip(*found, strict=True):
        assert torch.equal(exact, at_step)


def test_refreshes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(10)])
    optimizer, updated = torch.optim.SGD(model.parameters(), 0.01), []
    update = Memory.update
    monkeypatch.setattr(Memory, "update", lambda self, name, one: (updated.append(name), update(self, name, one)))
    with ProxProp(solve="step", memory=0.9, refresh=5).attach(model, optimizer):
        for step in range(16):
            updated.clear()
            optimizer.zero_grad()
            model(torch.randn(20, 5)).square().sum().backward()
            optimizer.step()
            assert len(updated) == (10 if step == 0 else 2)


def test_by_default_refreshes_become_rarer_with_age(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(10)])
    optimizer, updated = torch.optim.SGD(model.parameters(), 0.001), [0] * 140
    update = Memory.update
    with ProxProp(solve="step", memory=0.9).attach(model, optimizer):
        for step in range(len(updated)):

            def counted(self, name, one, step=step):
                updated[step] += 1
                update(self, name, one)

            monkeypatch.setattr(Memory, "update", counted)
            optimizer.zero_grad()
            model(torch.randn(20, 5)).square().sum().backward()
            optimizer.step()
    assert updated[:10] == [10] * 10
    assert updated[10:20] == [5] * 10
    assert updated[100:] == [1] * 40


def test_between_refreshes_calls_are_plain() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = []
    with ProxProp(solve="step", memory=0.9, refresh=3).attach(model, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            z = model(torch.randn(6, 4))
            names.append(z.grad_fn.name())
            z.sum().backward()
            optimizer.step()
    assert [name == "AddmmBackward0" for name in names] == [False, True, True, False, True]


def test_a_resumed_run_is_the_same_to_the_bit() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network().float()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        ProxProp(solve="step", memory=0.7, refresh=3).attach(model, optimizer)
        return model, optimizer

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            F.cross_entropy(model(X.float().roll(step, 0)), Y.roll(step)).backward()
            optimizer.step()

    model, optimizer = start()
    run(model, optimizer, range(9))
    first, its_optimizer = start()
    run(first, its_optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": its_optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, another = start()
    second.load_state_dict(saved["model"])
    another.load_state_dict(saved["optimizer"])
    run(second, another, range(5, 9))
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    # Without the rule the saved state is one that the optimizer takes.
    torch.optim.AdamW(network().float().parameters()).load_state_dict(saved["optimizer"])


def test_inputs_of_zero_and_inputs_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ProxProp(solve="step", memory=0.9, refresh=1).attach(model, optimizer) as attached:
        for x in (torch.zeros(6, 4), torch.randn(6, 4)):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            assert all(p.grad.isfinite().all() for p in model.parameters())
        before = attached.memory.layers["0.weight"].mean.clone()
        optimizer.zero_grad()
        model(torch.full((6, 4), torch.inf)).sum().backward()
        with pytest.raises(NotFiniteError, match=r"'1.weight'.*diverged"):
            optimizer.step()
        assert torch.equal(attached.memory.layers["0.weight"].mean, before)


def test_the_memory_follows_the_model_s_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ProxProp(solve="step", memory=0.5, refresh=1).attach(model, optimizer) as attached:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            model.to(dtype)
            optimizer.zero_grad()
            model(torch.ones(6, 4, dtype=dtype)).sum().backward()
            optimizer.step()
            mean = attached.memory.layers["0.weight"].mean
            torch.testing.assert_close(mean, torch.ones_like(mean))
            assert mean.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_where_the_user_does_not_choose_each_layer_gets_the_cheaper_step() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Unflatten(1, (8, 4)), nn.Linear(4, 6), nn.Flatten())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ProxProp(solve="step").attach(model, optimizer) as attached:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 64)).square().sum().backward()
            optimizer.step()
        assert list(attached.memory.layers) == ["2.weight"]
    exact = ProxProp(solve="step", memory=0).attach(model, optimizer)
    assert exact.memory is None


def test_a_second_step_without_a_backward_pass_keeps_the_direction() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(9, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with ProxProp(solve="step", memory=0.5, refresh=2).attach(model, optimizer):
        model(x).sum().backward()
        optimizer.step()
        once = model[0].weight.grad.clone()
        optimizer.step()
        assert torch.equal(model[0].weight.grad, once)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        torch.testing.assert_close(model[0].weight.grad, once)


def test_a_new_tau_holds_from_the_next_step_on() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(9, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    found = []
    for tau in (2.0, 0.5):
        with ProxProp(tau=2.0, damping="mean", solve="step", memory=0.5, refresh=2).attach(
            model, optimizer
        ) as attached:
            attached.set(tau=tau)
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            first = model[0].weight.grad.clone()
            attached.set(tau=0.5)
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            found.append((first, model[0].weight.grad.clone()))
    assert not torch.allclose(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    with pytest.raises(BackpassError, match="setting that can change"):
        attached.set(memory=0.5)


@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(12, 4), (40, 12)), (nn.Conv2d(6, 4, 2), (5, 6, 5, 4)), (nn.Linear(12, 4), (3, 12))]
)
def test_a_long_side_is_solved_in_blocks(layer: nn.Module, shape: tuple[int, ...], memory: float) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64)
    layer(x).square().sum().backward()
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    g = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
    a = x if x.dim() == 2 else F.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
    gram = a.T @ a / len(a)
    columns, side = g.shape[1], 12 if x.dim() == 4 else 4
    if len(a) > columns or memory:
        at = torch.arange(columns) // side
        gram = gram * (at[:, None] == at[None])
    expected = torch.linalg.solve(gram + 0.5 * torch.eye(columns, dtype=x.dtype), g.T).T
    layer.zero_grad()
    rule = ProxProp(tau=2.0, damping="mean", solve="step", memory=memory, max_side=side)
    with rule.attach(layer, optimizer):
        layer(x).square().sum().backward()
        optimizer.step()
    found = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
    assert relative(found[:, :-1], expected[:, :-1]) < 1e-10
    assert relative(found[:, -1], expected[:, -1]) < 1e-10
