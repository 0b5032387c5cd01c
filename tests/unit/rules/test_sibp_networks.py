"""SIBP in networks of every build: which layer an activation belongs to, and what stays as it is."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backpass import SIBP, LinBP, ProxProp
from support.networks import CASES
from support.resnets import TinyResNet
from support.semi_implicit import Layer, error, steps_of_rule, transcription

WAYS = ["modules", "functional", "method", "statement-in-place", "torch-in-place", "loop", "reused-in-place", "tanh"]


def run(model: Callable[[Tensor], Tensor], parameters: nn.Module, x: Tensor) -> list[Tensor]:
    """All gradients for the loss 1/2 |f(x)|^2."""
    parameters.zero_grad()
    (0.5 * model(x).square().sum()).backward()
    return [p.grad.clone() for p in parameters.parameters()]


def same(one: list[Tensor], other: list[Tensor], atol: float = 1e-12) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", [*WAYS, "gelu", "silu", "elu", "hardtanh", "softplus"])
def test_an_activation_is_found_however_it_is_called(name: str) -> None:
    model, x = CASES[name].make()
    plain = model(x)
    stages = CASES[name].stages(model)
    layers = [Layer(layer, stage.activation) for layer, stage in zip(model.layers, stages, strict=True)]
    with SIBP(reduction="sum", cg_steps=40).attach(model):
        assert torch.equal(model(x), plain)
        run(model, model, x)
    expected = transcription(layers, x, lambda z: z, 0.1)
    assert error(steps_of_rule(model, list(model.layers)), expected) < 1e-9


def test_with_a_normalization_between_the_layers_output_is_its_target_space() -> None:
    model, x = CASES["conv-bn-relu"].make()
    conv = model.body[3]
    seen = []
    conv.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    with SIBP(reduction="sum").attach(model):
        run(model, model, x)
    with torch.no_grad():
        columns = F.unfold(model.body[:3](x), 3).transpose(1, 2).flatten(0, 1)
        A = torch.cat([columns, torch.ones(len(columns), 1).double()], 1)
        g = seen[0].movedim(1, -1).flatten(0, -2)
        expected = torch.linalg.solve(A.T @ A + torch.eye(A.shape[1]).double(), 0.1 * A.T @ g).T
    torch.testing.assert_close(conv.weight.grad.flatten(1), expected[:, :-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("build", [TinyResNet, lambda: CASES["residual"].make()[0]])
def test_training_lowers_the_loss_of_residual_networks(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().float()
    x = torch.randn(16, 3, 8, 8) if isinstance(model, TinyResNet) else torch.randn(16, 5)
    y = torch.randint(5, (16,))
    affine = [p for p in model.parameters() if p.dim() == 1]
    weights = [p for p in model.parameters() if p.dim() > 1]
    # Normalizations are left to plain gradients, and these need a rate of their own.
    optimizer = torch.optim.SGD([{"params": weights, "lr": 1.0}, {"params": affine, "lr": 0.1}])
    with SIBP(eta=0.1).attach(model):
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
            optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


class Blocks(nn.Module):
    """Two blocks and a head; with ``reentrant`` set, the blocks are checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)])
        self.head = nn.Linear(4, 2)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_give_the_same_gradient(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Blocks().double(), torch.randn(3, 4).double().requires_grad_()
    with SIBP().attach(model):
        expected = run(model, model, x)
        model.reentrant = reentrant
        assert same(run(model, model, x), expected)


def test_momentum_and_adam_use_the_direction() -> None:
    for make in (
        lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, 1e-2),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
        x, y = torch.randn(40, 6), torch.randint(3, (40,))
        optimizer = make(model.parameters())
        with SIBP().attach(model):
            first = F.cross_entropy(model(x), y)
            for _ in range(40):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            assert F.cross_entropy(model(x), y) < 0.6 * first


def test_float32_is_the_float64_step_to_rounding_and_bfloat16_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 10))
    x, y = torch.randn(20, 50), torch.randint(10, (20,))

    def gradients(model: nn.Module, x: Tensor) -> Tensor:
        with SIBP().attach(model):
            F.cross_entropy(model(x), y).backward()
        found = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        model.zero_grad()
        return found

    exact = gradients(copy.deepcopy(model).double(), x.double())
    assert (gradients(model, x) - exact).norm() < 3e-6 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (gradients(model, x) - exact).norm() < 5e-2 * exact.norm()


def test_eta_none_is_one_over_the_number_of_layers() -> None:
    model, x = CASES["functional"].make()
    with SIBP(eta=None).attach(model):
        chosen = run(model, model, x)
    with SIBP(eta=1 / 4).attach(model):
        assert same(run(model, model, x), chosen)


def test_a_copy_carries_the_rule() -> None:
    model, x = CASES["modules"].make()
    attached = SIBP().attach(model)
    expected = run(model, model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(run(other, other, x), expected, 0)
    attached.remove()


def test_functional_gradients_equal_those_of_backward() -> None:
    model, x = CASES["tanh"].make()
    with SIBP().attach(model):
        expected = run(model, model, x)

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return 0.5 * torch.func.functional_call(model, parameters, (x,)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        found = torch.func.grad(loss)(parameters, x)
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
        first = torch.func.grad(loss)(parameters, x[:1])
    assert same(list(found.values()), expected)
    assert same([value[0] for value in each.values()], list(first.values()))


def test_linbp_keeps_the_activations_it_was_attached_to() -> None:
    model, x = CASES["modules"].make()
    for first, second in ((LinBP(), SIBP()), (SIBP(), LinBP())):
        with first.attach(model), second.attach(model):
            both = run(model, model, x)
        # Gradients pass the activations as they are, and each layer's own output is its target space.
        inputs = [x]
        for layer in model.layers[:3]:
            inputs.append(torch.relu(layer(inputs[-1])).detach())
        g, expected = model(x).detach(), []
        for layer, a in zip(reversed(model.layers), reversed(inputs), strict=True):
            ((weight, bias),) = transcription([Layer(layer, None)], a, lambda _, g=g: g, 0.1 * len(x))
            expected = [-weight, -bias, *expected]
            g = g @ (layer.weight + weight).detach()
        assert same(both, expected)


def test_left_out_layers_are_plain() -> None:
    model, x = CASES["functional"].make()
    plain = run(model, model, x)
    with SIBP(where=lambda site: site.index == 0).attach(model) as attached:
        found = run(model, model, x)
    assert [site.index for site in attached.sites] == [0]
    assert same(found[2:], plain[2:], 0)
    assert not same(found[:2], plain[:2], 1e-3)


def test_removed_it_leaves_plain_backpropagation() -> None:
    model, x = CASES["functional"].make()
    plain = run(model, model, x)
    SIBP().attach(model).remove()
    assert same(run(model, model, x), plain, 0)
    assert not torch._C._len_torch_function_stack()


def test_proxprop_is_the_linear_case() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), torch.randn(5, 6).double()
    with SIBP(eta=0.2, lam=0.5, reduction="sum").attach(model):
        ours = run(model, model, x)
    with ProxProp(tau=2.0).attach(model):
        theirs = run(model, model, x)
    assert same(ours, [0.2 * g for g in theirs])
