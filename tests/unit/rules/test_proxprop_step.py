"""With solve="step" the step is the one-batch step, however the batch was taken apart."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from backpass import BackpassError
from backpass.rules import ProxProp
from support.processes import in_processes
from support.proximal import relative

SETTINGS = ({"tau": 0.5}, {"tau": 0.5, "damping": "mean"}, {"tau": 0.5, "solver": "cg"})


def network() -> nn.Sequential:
    """Layers whose rows are fewer than their columns, and layers whose rows are more."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(75, 6))
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(6, 4)).double()


def batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 5, 5, dtype=torch.float64, generator=generator), torch.arange(n) % 4


def at_once(settings: dict, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The direction of the whole batch in one backward pass, by the default mode."""
    model, (x, y) = model or network(), batch()
    with ProxProp(norms=True, **settings).attach(model):
        F.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        assert relative(p.grad, expected[name]) < 1e-10, name


def frozen_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose step leaves the weights, so that ``.grad`` can be looked at."""
    return torch.optim.SGD(model.parameters(), 0.0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("parts", [1, 3, 12])
def test_micro_batches(settings, parts):
    model, (x, y) = network(), batch()
    optimizer = frozen_sgd(model)
    with ProxProp(solve="step", norms=True, **settings).attach(model, optimizer=optimizer):
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(model(a), b) / parts).backward()
        optimizer.step()
    assert_same(model, at_once(settings))


@pytest.mark.parametrize("rows", [2, 40])
def test_a_layer_used_twice_is_the_layer_on_both_inputs(rows):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5).double()
    a, b = torch.randn(2, rows, 7, dtype=torch.float64)
    twice = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    twice.forward = lambda a, b: torch.cat([twice["layer"](a), twice["layer"](b)])
    with ProxProp(tau=0.5, norms=True).attach(layer):
        layer(torch.cat([a, b])).square().sum().backward()
    optimizer = frozen_sgd(twice)
    with ProxProp(tau=0.5, norms=True, solve="step").attach(twice, optimizer):
        twice(a, b).square().sum().backward()
        optimizer.step()
    assert relative(twice["layer"].weight.grad, layer.weight.grad) < 1e-10
    assert relative(twice["layer"].bias.grad, layer.bias.grad) < 1e-10


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_collects_once(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.checkpointing = network(), False

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant) if self.checkpointing else self.inner(x)

    expected = at_once({"tau": 0.5}, Checkpointed())
    model, (x, y) = Checkpointed(), batch()
    model.checkpointing = True
    optimizer = frozen_sgd(model)
    with ProxProp(tau=0.5, norms=True, solve="step").attach(model, optimizer):
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(model(a.requires_grad_()), b) / 2).backward()
        optimizer.step()
    assert_same(model, expected)


def _in_one_process(rank: int, share: list[int], settings: dict) -> tuple[dict, str]:
    model, (x, y) = network(), batch()
    first = sum(share[:rank])
    mine = slice(first, first + share[rank])
    wrapped = DistributedDataParallel(model)
    optimizer = frozen_sgd(model)
    rule = ProxProp(solve="step", norms=True, **settings)
    with rule.attach(wrapped, optimizer):
        # DDP averages over processes; the mean over the batch weighs them by their share.
        loss = F.cross_entropy(wrapped(x[mine]), y[mine], reduction="sum") / len(x) * len(share)
        loss.backward()
        optimizer.step()
    found = {name: p.grad.tolist() for name, p in model.named_parameters()}
    model.zero_grad()
    try:
        with ProxProp(norms=True, **settings).attach(model):
            model(x).sum().backward()
    except BackpassError as error:
        return found, str(error)
    return found, ""


def test_two_processes_with_unequal_shares():
    share, settings = [5, 7], {"tau": 0.5}
    expected = at_once(settings)
    for found, refusal in in_processes(2, _in_one_process, share, settings):
        for name, value in found.items():
            assert relative(torch.tensor(value, dtype=torch.float64), expected[name]) < 1e-10, name
        assert "2 processes" in refusal
        assert 'solve="step"' in refusal


def test_many_steps_equal_those_of_the_default_mode():
    settings = {"tau": 0.5}
    models = [network(), network()]
    optimizers = [torch.optim.AdamW(model.parameters(), 0.05) for model in models]
    x, y = batch()
    ProxProp(norms=True, **settings).attach(models[0])
    ProxProp(solve="step", norms=True, **settings).attach(models[1], optimizers[1])
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_pass_that_was_zeroed_without_a_step_leaves_nothing_behind(set_to_none):
    model, (x, y) = network(), batch()
    optimizer = frozen_sgd(model)
    with ProxProp(tau=0.5, norms=True, solve="step").attach(model, optimizer):
        F.cross_entropy(model(3 * x), y).backward()
        optimizer.zero_grad(set_to_none)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert_same(model, at_once({"tau": 0.5}))


def test_gradients_that_a_step_left_must_be_zeroed():
    model, (x, y) = network(), batch()
    optimizer = frozen_sgd(model)
    with ProxProp(tau=1.0, solve="step").attach(model, optimizer):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        with pytest.raises(BackpassError, match="zero_grad"):
            F.cross_entropy(model(x), y).backward()


def test_clipping_by_norm_scales_the_direction():
    model, (x, y) = network(), batch()
    optimizer = frozen_sgd(model)
    with ProxProp(tau=0.5, norms=True, solve="step").attach(model, optimizer):
        F.cross_entropy(model(x), y).backward()
        before = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    expected = at_once({"tau": 0.5})
    assert_same(model, {name: value * 1e-3 / (before + 1e-6) for name, value in expected.items()})


@pytest.mark.parametrize("rows", [3, 30])
def test_what_changes_the_gradient_entry_by_entry_is_solved_for_as_it_stands(rows):
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), torch.randn(rows, 6, dtype=torch.float64)
    optimizer = frozen_sgd(model)
    with ProxProp(tau=0.5, norms=True, solve="step").attach(model, optimizer):
        model(x).square().sum().backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        gradient = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
        optimizer.step()
    wide = torch.cat([x, x.new_ones(rows, 1)], 1)
    expected = torch.linalg.solve(wide.T @ wide + 2 * torch.eye(7, dtype=x.dtype), gradient.T).T
    assert relative(torch.cat([model.weight.grad, model.bias.grad[:, None]], 1), expected) < 1e-10


def test_the_input_may_be_overwritten_after_the_backward_pass():
    model, (x, y) = network(), batch()
    model = nn.Sequential(*list(model)[3:])
    x = torch.randn(12, 3, 5, 5, dtype=torch.float64)
    once = copy.deepcopy(model)
    with ProxProp(tau=1.0).attach(once):
        F.cross_entropy(once(x), y).backward()
    optimizer, buffer = frozen_sgd(model), x.clone()
    with ProxProp(tau=1.0, solve="step").attach(model, optimizer):
        F.cross_entropy(model(buffer), y).backward()
        buffer.zero_()
        optimizer.step()
    assert_same(model, {name: p.grad for name, p in once.named_parameters()})


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_s_gradients_are_solved_for_after_it(by_keyword):
    model, (x, y) = network(), batch()
    optimizer, seen = frozen_sgd(model), []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        seen.append(model[0].weight.grad.clone())
        return loss

    with ProxProp(tau=0.5, norms=True, solve="step").attach(model, optimizer):
        found = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert found.item() == F.cross_entropy(model(x), y).item()
    assert_same(model, at_once({"tau": 0.5}))
    assert relative(seen[0], model[0].weight.grad) > 0.1


@pytest.mark.parametrize("settings", [{"tau": 1.0, "memory": 0}, {}])
def test_gradients_by_torch_func_reach_no_step(settings):
    model = nn.Linear(3, 2)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return functional_call(model, parameters, (torch.randn(4, 3),)).sum()

    with (
        ProxProp(solve="step", **settings).attach(model, frozen_sgd(model)),
        pytest.raises(BackpassError, match=r"torch\.func"),
    ):
        grad(loss)(parameters)


def test_a_weight_shared_by_different_layers_is_an_error():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x))

    model = Tied()
    with (
        ProxProp(embeddings=True, solve="step").attach(model, frozen_sgd(model)),
        pytest.raises(BackpassError, match="shared"),
    ):
        model(torch.arange(4)).sum().backward()


def test_frozen_parts_and_unused_layers_keep_their_gradients():
    model, (x, y) = network(), batch()
    model[4].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    expected = copy.deepcopy(model)
    with ProxProp(tau=0.5, norms=True).attach(expected):
        F.cross_entropy(expected(x), y).backward()
    optimizer = frozen_sgd(model)
    with ProxProp(tau=0.5, norms=True, solve="step").attach(model, optimizer):
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            (F.cross_entropy(model(a), b) / 2).backward()
        optimizer.step()
    assert model[4].weight.grad is None
    for name, p in expected.named_parameters():
        if p.grad is not None:
            assert relative(model.get_parameter(name).grad, p.grad) < 1e-10, name


def test_removal_leaves_the_optimizer_as_it_was():
    model, (x, y) = network(), batch()
    optimizer = frozen_sgd(model)
    ProxProp(tau=1.0, solve="step").attach(model, optimizer).remove()
    assert not optimizer._optimizer_step_pre_hooks
    F.cross_entropy(model(x), y).backward()
    plain = model[6].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[6].weight.grad, plain)
