"""Weights and calls for which an implicit step is not exact: refused by name, or the exact step of the parameter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from backpass import SIBP, BackpassError, ProxProp
from backpass.rules import Rule
from support.processes import in_processes
from support.proximal import relative

RULES = (ProxProp(tau=0.5), SIBP(eta=0.1))
both = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def spectral(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


class Merged(nn.Module):
    """A frozen weight with a low-rank adapter merged into it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.a @ self.b)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": spectral,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "merged": Merged,
}


@both
@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_computed_from_parameters(rule: Rule, name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), COMPUTED[name](nn.Linear(3, 4)))
    with rule.attach(model), pytest.raises(BackpassError, match="computed from other parameters"):
        model(torch.randn(5, 3)).sum().backward()


class Function(nn.Module):
    """A function of an input and parameters."""

    def __init__(self, function, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters()))


TWICE = {
    "transposed": (
        lambda x, w: F.linear(torch.tanh(F.linear(x, w)), w.t()),
        {"w": (3, 3)},
        (5, 3),
    ),
    "transposed convolution": (
        lambda x, w: F.conv_transpose2d(torch.tanh(F.conv2d(x, w)), w),
        {"w": (3, 3, 2, 2)},
        (2, 3, 5, 5),
    ),
    "bias of two weights": (
        lambda x, w, v, b: F.linear(torch.tanh(F.linear(x, w, b)), v, b),
        {"w": (3, 3), "v": (3, 3), "b": (3,)},
        (5, 3),
    ),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize(
    "rule",
    [*RULES, ProxProp(tau=0.5, solve="step"), ProxProp(solve="step", memory=0.9)],
    ids=["backward", "sibp", "step", "memory"],
)
def test_a_parameter_of_two_layers_without_a_common_gram_matrix(rule: Rule, name: str) -> None:
    function, shapes, shape = TWICE[name]
    model = Function(function, **shapes)
    optimizer = [torch.optim.SGD(model.parameters(), 0.1)] if getattr(rule, "solve", "") == "step" else []
    says = "no common Gram matrix" if optimizer else "is used twice"
    with rule.attach(model, *optimizer), pytest.raises(BackpassError, match=says):
        model(torch.randn(shape)).sum().backward()


@both
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tensordot", lambda x, w, v: torch.tensordot(x @ w, v, 1)),
        ("inner", lambda x, w, v: torch.inner(x @ w, v)),
        ("baddbmm", lambda x, w, v: torch.baddbmm(x, (x @ w)[None], v[None])),
        ("addmm_", lambda x, w, v: (x @ w).addmm_(x, v)),
        ("multi_dot", lambda x, w, v: torch.linalg.multi_dot([x @ w, v, v])),
    ],
)
def test_products_that_are_not_read_as_layers_are_named(rule: Rule, name: str, function) -> None:
    model = Function(function, w=(3, 3), v=(3, 3))
    says = f"{name} of parameters is not read as a layer"
    with rule.attach(model) as attached, pytest.warns(UserWarning, match=says):
        model(torch.randn(5, 3)).sum().backward()
    assert [site.function for site in attached.sites] == ["matmul"]


@both
def test_lazy_layers(rule: Rule) -> None:
    model, x = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2)), torch.randn(5, 3)
    with rule.attach(model):
        model(x).sum().backward()
    found = model[0].weight.grad.clone()
    model.zero_grad()
    with rule.attach(model):
        model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, found)


@both
def test_two_parts_of_one_parameter_are_two_layers_unless_they_overlap(rule: Rule) -> None:
    class Parts(nn.Module):
        def __init__(self, second: slice) -> None:
            super().__init__()
            self.weight, self.second = nn.Parameter(torch.randn(6, 4).double()), second

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight[:3]) + F.linear(x.flip(0), self.weight[self.second])

    torch.manual_seed(0)
    model, x = Parts(slice(3, 6)), torch.randn(5, 4).double()
    first, second = (nn.Linear(4, 3, bias=False).double() for _ in range(2))
    g = torch.randn(5, 3).double()
    with torch.no_grad():
        first.weight.copy_(model.weight[:3])
        second.weight.copy_(model.weight[3:])
    with rule.attach(model):
        (model(x) * g).sum().backward()
    for layer, inputs, part in ((first, x, slice(0, 3)), (second, x.flip(0), slice(3, 6))):
        with rule.attach(layer):
            (layer(inputs) * g).sum().backward()
        assert relative(model.weight.grad[part], layer.weight.grad) < 1e-12
    overlapping = Parts(slice(2, 5))
    with rule.attach(overlapping), pytest.raises(BackpassError, match="used twice"):
        overlapping(x).sum().backward()


@both
def test_complex_weights(rule: Rule) -> None:
    model = nn.Linear(3, 2).to(torch.complex64)
    with rule.attach(model), pytest.raises(BackpassError, match=r"real weights, got torch\.complex64"):
        model(torch.randn(4, 3, dtype=torch.complex64))


@both
def test_sparse_inputs(rule: Rule) -> None:
    model = nn.Linear(3, 2)
    with rule.attach(model), pytest.raises(BackpassError, match=r"dense inputs, got torch\.sparse_coo.*to_dense"):
        model(torch.eye(3).to_sparse())


@both
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 2), (0, 3)),
        (nn.Linear(3, 2), (4, 0, 3)),
        (nn.Conv2d(2, 3, 3), (0, 2, 5, 5)),
        (nn.ConvTranspose1d(2, 3, 3), (0, 2, 5)),
    ],
)
def test_an_empty_batch_has_the_step_zero(rule: Rule, layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer.zero_grad()
    with rule.attach(layer):
        layer(torch.randn(shape)).sum().backward()
    assert not layer.weight.grad.any()
    assert layer.weight.grad.shape == layer.weight.shape
    assert not layer.bias.grad.any()


def test_an_empty_batch_at_the_step() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    for batches in ((x[:0],), (x, x[:0])):
        optimizer = torch.optim.SGD(layer.parameters(), 0.0)
        optimizer.zero_grad()
        with ProxProp(tau=0.5, solve="step").attach(layer, optimizer):
            for one in batches:
                layer(one).sum().backward()
            optimizer.step()
        assert bool(layer.weight.grad.any()) == (len(batches) == 2)


@both
def test_a_rule_attached_between_forward_and_backward(rule: Rule) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    loss = model(torch.randn(5, 3)).sum()
    with rule.attach(model), pytest.raises(BackpassError, match=r"before the rule was attached.*attach the rule first"):
        loss.backward()
    # Afterwards nothing is left behind, and the other order works.
    model.zero_grad()
    model(torch.randn(5, 3)).sum().backward()
    model.zero_grad()
    with rule.attach(model):
        model(torch.randn(5, 3)).sum().backward()
        model.zero_grad()
        (2 * model[0].weight.sum()).backward()


@both
def test_an_equal_rule_attached_twice(rule: Rule) -> None:
    model = nn.Linear(3, 2)
    with rule.attach(model):
        with pytest.warns(UserWarning, match="in force on this model already"):
            rule.attach(model).remove()
        with ProxProp(tau=0.123).attach(model):
            model(torch.randn(4, 3)).sum().backward()
    with rule.attach(model):
        pass


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@both
def test_frozen_layers_are_no_sites_also_where_they_freeze_and_thaw_while_the_rule_is_attached(rule: Rule) -> None:
    model, x = network(), torch.randn(5, 3).double()
    with rule.attach(model) as attached:
        for frozen in ([0], [0], [], [], [2], [0], []):
            expected = network()
            for one in (model, expected):
                for at in (0, 2):
                    one[at].requires_grad_(at not in frozen)
            model.zero_grad()
            model(x).square().sum().backward()
            with rule.attach(expected) as anew:
                expected(x).square().sum().backward()
            assert attached.sites == anew.sites
            assert [site.module for site in attached.sites] == [str(at) for at in (0, 2) if at not in frozen]
            for p, q in zip(model.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "rule",
    [*RULES, ProxProp(solve="step"), ProxProp(solve="step", memory=0.9)],
    ids=["proxprop", "sibp", "step", "memory"],
)
def test_parameters_that_are_pieces_of_one_vector(rule: Rule) -> None:
    found, x = [], torch.randn(5, 3).double()
    for model in (network(), network()):
        if found:
            nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with rule.attach(model, *([optimizer] if getattr(rule, "solve", "") == "step" else [])):
            model(x).square().sum().backward()
            optimizer.step()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_frozen_layers_do_not_count_in_sibp_s_eta() -> None:
    model, x = network(), torch.randn(5, 3).double()
    model[0].requires_grad_(False)
    found = []
    for rule in (SIBP(eta=None), SIBP(eta=1.0)):
        with rule.attach(model):
            model(x).square().sum().backward()
        found.append(model[2].weight.grad)
        model.zero_grad()
    assert torch.equal(*found)


@pytest.mark.parametrize("how", ["loss_scale", "scaler"])
def test_sibp_knows_the_scale_of_the_loss(how: str) -> None:
    model, x = network(), torch.randn(5, 3).double()
    with SIBP(eta=2.0).attach(model):
        model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    rule = SIBP(eta=2.0, loss_scale=1024.0) if how == "loss_scale" else SIBP(eta=2.0)
    with rule.attach(model, scaler=scaler if how == "scaler" else None):
        loss = model(x).square().sum()
        (scaler.scale(loss) if how == "scaler" else 1024.0 * loss).backward()
    for p, known in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad / 1024, known, rtol=1e-12, atol=1e-14)


def test_sibp_with_a_grad_scaler_in_float16_skips_what_overflows() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 3)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 1.0), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    losses = []
    with SIBP(eta=0.1).attach(model, scaler=scaler):
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x), torch.tensor([0, 1, 0, 1, 1]))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert scaler.get_scale() < 2.0**40
    assert losses[-1] < 0.7 * losses[0]


def _refused_when_sharded(rank: int) -> list[str]:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for attach in (
        lambda: ProxProp().attach(model),
        lambda: ProxProp(solve="step").attach(model, optimizer=optimizer),
        lambda: SIBP().attach(model),
    ):
        with pytest.raises(BackpassError) as error:
            attach()
        found.append(str(error.value))
    model(torch.randn(5, 3)).sum().backward()  # the model is as it was
    optimizer.step()
    return found


def test_a_model_sharded_over_processes() -> None:
    for messages in in_processes(2, _refused_when_sharded):
        for message, name in zip(messages, ("ProxProp", "ProxProp", "SIBP"), strict=True):
            assert "sharded (FSDP" in message
            assert f"{name} solves with whole weight matrices" in message
            assert "DistributedDataParallel" in message
