"""What a rule cannot reach is named: in `unreachable`, once as a warning, and as an error where that is asked for."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import SIBP, BackpassError, LinBP, NoSiteError, ProxProp, list_sites
from backpass.models import build
from support.zoo.by_hand import BY_HAND, CubeFunction

OPAQUE = {name: row for name, row in BY_HAND.items() if row.unreachable}


class OnlyCube(nn.Module):
    def forward(self, x):
        return CubeFunction.apply(x)


class AffineCube(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.Linear(4, 4)

    def forward(self, x):
        return CubeFunction.apply(self.affine(x))


class OnlyLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def path_in_message(path):
    return r"\(model\)|''|the model" if not path else f"['\"` ]{path}['\"`,: ]"


@pytest.fixture(params=OPAQUE)
def opaque(request):
    architecture = OPAQUE[request.param]
    model, given = architecture.make(torch.float32)
    return model, given["x"], next(iter(architecture.unreachable))


def test_it_is_told_once(opaque):
    model, x, path = opaque
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LinBP().attach(model) as attached:
            for _ in range(3):
                model(x)
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "reach" in str(w.message)]
    assert len(texts) == 1
    ((found, reasons),) = attached.unreachable.items()
    assert found == path
    assert all(reason in texts[0] for reason in reasons)


def test_strict_makes_it_an_error(opaque):
    model, x, path = opaque
    with pytest.raises(BackpassError, match=path_in_message(path)), LinBP().attach(model, strict=True):
        model(x)
    model(x)


def test_strict_leaves_a_model_alone_of_which_everything_can_be_reached():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    with LinBP().attach(model, strict=True) as attached:
        model(x)
    assert attached.unreachable == {}


def test_the_printed_table_of_sites_names_it(opaque):
    model, x, path = opaque
    text = str(list_sites(model, x))
    assert "reach" in text
    assert (path or "(model)") in text


@pytest.mark.parametrize("model", [AffineCube(), OnlyLSTM()], ids=["autograd function", "lstm"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_where_nothing_else_is_selected_it_is_an_error(model):
    with LinBP().attach(model), pytest.raises(NoSiteError, match="reach"):
        model(torch.randn(2, 3, 4))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_is_an_elementwise_autograd_function_is_acted_on_as_a_whole_or_refused():
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    model = OnlyCube()
    try:
        with LinBP().attach(model) as attached:
            model(x).sum().backward()
    except NoSiteError:
        return
    assert [site.function for site in attached.sites] == ["OnlyCube"]
    assert torch.equal(x.grad, torch.ones(2))


WIDTH = 4
WEIGHTS = {
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "Tensor.addmm": lambda x, w, b: b.addmm(x, w),
    "matmul": lambda x, w, b: torch.matmul(x, w),
    "@": lambda x, w, b: x @ w,
    "mm": lambda x, w, b: torch.mm(x, w),
    "einsum": lambda x, w, b: torch.einsum("ni,io->no", x, w),
    "einsum, output first": lambda x, w, b: torch.einsum("io,ni->no", w, x),
    "Conv1D": lambda x, w, b: torch.addmm(b, x.view(-1, WIDTH), w).view(*x.shape[:-1], -1),
}


class ByHand(nn.Module):
    """x W (+ b) in some way between two ordinary layers."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(3, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 3)), nn.Parameter(torch.randn(3))
        self.compute = compute

    def forward(self, x):
        return self.last(torch.tanh(self.compute(torch.tanh(self.first(x)), self.weight, self.bias)))


class ByLinear(nn.Module):
    """The same network with an nn.Linear in the middle."""

    def __init__(self, other, biased, viewed) -> None:
        super().__init__()
        self.viewed = viewed
        self.first, self.last, self.middle = other.first, other.last, nn.Linear(WIDTH, 3, bias=biased)
        with torch.no_grad():
            self.middle.weight.copy_(other.weight.T)
            if biased:
                self.middle.bias.copy_(other.bias)

    def forward(self, x):
        z = self.middle(torch.tanh(self.first(x)))
        return self.last(torch.tanh(z.view(*x.shape[:-1], -1) if self.viewed else z))


@pytest.mark.parametrize("rule", [ProxProp(tau=0.3), ProxProp(tau=0.3, damping="mean"), SIBP(eta=0.2)], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_products_with_a_parameter_are_linear_layers(name, rule):
    torch.manual_seed(0)
    biased = "addmm" in name or name == "Conv1D"
    model = ByHand(WEIGHTS[name]).double()
    twin = ByLinear(model, biased, viewed=name == "Conv1D").double()
    x = torch.randn(6, WIDTH, dtype=torch.float64)

    def gradients(model):
        model.zero_grad()
        given = x.clone().requires_grad_()
        with rule.attach(model) as attached:
            model(given).square().mean().backward()
        assert len(attached.sites) == 3
        return given.grad, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    by_input, found = gradients(model)
    expected_by_input, expected = gradients(twin)
    assert torch.allclose(by_input, expected_by_input, rtol=1e-10, atol=1e-12)
    assert torch.allclose(found["weight"], expected["middle.weight"].T, rtol=1e-10, atol=1e-12)
    if biased:
        assert torch.allclose(found["bias"], expected["middle.bias"], rtol=1e-10, atol=1e-12)
    assert torch.allclose(found["first.weight"], expected["first.weight"], rtol=1e-10, atol=1e-12)


UNREACHED_WEIGHTS = {
    # Products of three factors, and of two parameters, are not linear in one weight alone.
    "bilinear": lambda x, w, b: F.bilinear(x, x, torch.stack([w] * WIDTH).permute(2, 0, 1)),
    "einsum of three": lambda x, w, b: torch.einsum("ni,io,o->no", x, w, b),
}


@pytest.mark.parametrize("rule", [ProxProp(tau=0.3), SIBP(eta=0.2)], ids=str)
@pytest.mark.parametrize("name", UNREACHED_WEIGHTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_uses_a_parameter_otherwise_is_named_or_refused(name, rule):
    torch.manual_seed(0)
    model, x = ByHand(UNREACHED_WEIGHTS[name]).double(), torch.randn(6, WIDTH, dtype=torch.float64)
    try:
        with rule.attach(model) as attached:
            model(x).square().mean().backward()
    except BackpassError:
        return
    assert "" in attached.unreachable


def test_a_recurrent_layer_among_linear_ones_is_named_by_proxprop():
    model = nn.Sequential(nn.Linear(4, 4), OnlyLSTM(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with ProxProp(tau=0.3).attach(model) as attached:
                model(torch.randn(2, 3, 4)).sum().backward()
        except BackpassError:
            return
    assert set(attached.unreachable) == {"1.lstm"}


@pytest.mark.parametrize("residual", ["plain", "renormalized", "per_activation"])
@pytest.mark.parametrize("start", [0, "layer3", -2])
def test_an_activation_that_is_not_selected_is_not_out_of_reach(residual, start):
    model = build("resnet18", shape=(3, 8, 8), classes=2).eval()
    with LinBP(start=start, residual=residual).attach(model, strict=True) as attached:
        for _ in range(2):
            model(torch.rand(1, 3, 8, 8)).sum().backward()
    assert not attached.unreachable
