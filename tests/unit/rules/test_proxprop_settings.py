"""The settings of ProxProp, what it selects, and what it refuses by name."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError, NoSiteError, UnknownNameError, list_sites, parse_rule
from backpass.rules import SIBP, LinBP, ProxProp, attachments
from support.proximal import EXACT, directions, relative


def small() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    return model.double(), torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "text", ["proxprop", "proxprop:tau=0.05", "proxprop:solver=cg,cg_steps=10", "proxprop:tau=0.05,solve=step,stop=-1"]
)
def test_the_text_form_reads_back(text):
    assert str(parse_rule(text)) == text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tau": 0}, "positive"),
        ({"tau": float("inf")}, "finite"),
        ({"tau": True}, "tau"),
        ({"solver": "exakt"}, "exact"),
        ({"damping": "men"}, "mean"),
        ({"cg_steps": 0}, "at least 1"),
        ({"cg_steps": 2.0}, "at least 1"),
        ({"solve": "stp"}, "step"),
        ({"memory": 1.0, "solve": "step"}, "memory"),
        ({"memory": 0.9}, "solve=.step."),
        ({"tau": 1.0, "memory": 0.9, "solve": "step"}, "damping"),
        ({"refresh": 0}, "refresh"),
        ({"norms": 1}, "norms"),
        ({"start": 1.5}, "start"),
        ({"where": "fc"}, "where"),
    ],
)
def test_a_setting_out_of_range_is_an_error(settings, says):
    with pytest.raises(BackpassError, match=says):
        ProxProp(**settings)


def test_an_optimizer_goes_with_the_solve_at_its_step_and_only_with_it():
    model, _ = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(BackpassError, match="optimizer=optimizer"):
        ProxProp(solve="step").attach(model)
    with pytest.raises(BackpassError, match="leave it out"):
        ProxProp().attach(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({"stop": -1}, {"4.weight"}),
        ({"start": 1}, {"0.weight"}),
        ({"where": lambda site: site.module == "2"}, {"0.weight", "4.weight"}),
        ({"start": "4"}, {"0.weight", "2.weight"}),
    ],
)
def test_sites_left_out_keep_their_gradient(settings, plain):
    model, x = small()
    g = torch.randn(6, 3, dtype=torch.float64)
    gradients = directions(model, x, g, parse_rule("bp"))
    found = directions(model, x, g, ProxProp(**settings))
    everywhere = directions(model, x, g, ProxProp())
    for name in ("0.weight", "2.weight", "4.weight"):
        assert torch.equal(found[name], gradients[name] if name in plain else everywhere[name])


def test_the_forward_is_the_same_to_the_bit_and_so_is_what_flows_down():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
    model.append(nn.Linear(100, 3))
    x, twin = torch.randn(3, 2, 5, 5), copy.deepcopy(model)
    plain, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = twin(plain)
    with EXACT.attach(model):
        found = model(ours)
        found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(found, expected)
    assert torch.equal(model[1].running_var, twin[1].running_var)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_linear_sites_are_listed():
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    sites = list_sites(model, torch.randn(2, 2, 4), kind="linear")
    assert [(s.module, s.function) for s in sites] == [("0", "conv1d"), ("1", "batch_norm"), ("3", "linear")]


def test_a_model_without_linear_layers_is_an_error():
    model = nn.Sequential(nn.ReLU())
    with ProxProp().attach(model), pytest.raises(NoSiteError):
        model(torch.randn(2, 2))


def test_functional_calls_are_sites_too():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.weight = nn.Parameter(torch.randn(2, 1, 3, 3)), nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            return F.linear(F.conv2d(input=x, weight=self.kernel).flatten(1), weight=self.weight)

    torch.manual_seed(0)
    ours = Functional().double()
    modules = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 3, bias=False)).double()
    with torch.no_grad():
        modules[0].weight.copy_(ours.kernel)
        modules[2].weight.copy_(ours.weight)
    x, g = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found, expected = directions(ours, x, g, EXACT), directions(modules, x, g, EXACT)
    assert torch.equal(found["kernel"], expected["0.weight"])
    assert torch.equal(found["weight"], expected["2.weight"])


@pytest.mark.parametrize(
    ("layer", "inputs", "name"),
    [
        (nn.MultiheadAttention(4, 2), (torch.randn(3, 1, 4),) * 3, "multi_head_attention_forward"),
        (nn.LSTM(4, 3), (torch.randn(3, 1, 4),), "lstm"),
        (nn.GRUCell(4, 3), (torch.randn(2, 4),), "gru_cell"),
        (nn.EmbeddingBag(5, 3), (torch.tensor([[0, 1]]),), "embedding_bag"),
        (nn.Bilinear(4, 4, 2), (torch.randn(3, 4),) * 2, "bilinear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("rule", [ProxProp(), SIBP()], ids=lambda rule: rule.name)
def test_layers_that_hide_their_weights_are_named(rule, layer, inputs, name):
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.reached = layer, nn.Linear(2, 2)

        def forward(self, *inputs):
            return self.hidden(*inputs), self.reached(torch.randn(3, 2))

    model = Beside()
    with rule.attach(model) as attached:
        with pytest.warns(UserWarning, match=name):
            model(*inputs)
        assert name in str(attached.unreachable["hidden"])
        assert [site.module for site in attached.sites] == ["reached"]
    with rule.attach(model, strict=True), pytest.raises(NoSiteError, match=name):
        model(*inputs)


@pytest.mark.parametrize("setting", ["sparse", "scale_grad_by_freq"])
def test_an_embedding_s_own_gradient_tricks_are_refused(setting):
    layer = nn.Embedding(4, 2, **{setting: True})
    with ProxProp(embeddings=True).attach(layer), pytest.raises(BackpassError, match=f"{setting}=False"):
        layer(torch.tensor([1]))


def test_an_embedding_s_max_norm_still_holds():
    layer = nn.Embedding(4, 2, max_norm=0.1)
    with ProxProp(embeddings=True).attach(layer):
        assert layer(torch.tensor([1, 2])).norm(dim=1).max() <= 0.1 + 1e-6


def test_it_composes_with_linbp():
    model, x = small()
    g = torch.randn(6, 3, dtype=torch.float64)
    with LinBP().attach(model):
        found = directions(model, x, g, EXACT)
    # The same with activations that are linear in the backward pass by their very expression.
    straight = nn.Sequential(model[0], _StraightThrough(), model[2], _StraightThrough(), model[4])
    expected = directions(straight, x, g, EXACT)
    assert relative(found["0.weight"], expected["0.weight"]) < 1e-12


class _StraightThrough(nn.Module):
    def forward(self, x):
        return x + (F.relu(x) - x).detach()


def test_a_copy_or_pickle_carries_the_rule():
    model, x = small()
    g = torch.randn(6, 3, dtype=torch.float64)
    expected = directions(model, x, g, EXACT)["0.weight"]
    EXACT.attach(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [attached.rule for attached in attachments(twin)] == [EXACT]
        (twin(x) * g).sum().backward()
        assert torch.equal(twin[0].weight.grad, expected)


def test_removing_the_rule_gives_the_gradient_back():
    model, x = small()
    g = torch.randn(6, 3, dtype=torch.float64)
    before = directions(model, x, g, parse_rule("bp"))
    directions(model, x, g, EXACT)
    model.zero_grad()
    (model(x) * g).sum().backward()
    assert torch.equal(model[0].weight.grad, before["0.weight"])


def test_names_are_checked():
    model, _ = small()
    with pytest.raises(UnknownNameError, match="module"):
        ProxProp(start="fc").attach(model)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 2, 5, 4)])
def test_an_activation_may_write_into_the_value_of_a_layer(shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(shape).double()
    found = []
    for in_place in (False, True):
        model[1].inplace = in_place
        with ProxProp(tau=0.5).attach(model):
            found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
