"""What SIBP cannot do exactly raises, and names the alternative."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass import SIBP, BackpassError, NoSiteError, UnknownNameError, parse_rule
from support.processes import in_processes


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)


def test_a_gradient_from_before() -> None:
    model, x = network()
    with SIBP().attach(model):
        model(x).sum().backward()
        with pytest.raises(BackpassError, match=r"'2\.weight' has a gradient from a backward pass before.*zero_grad"):
            model(x).sum().backward()
        model.zero_grad()
        model(x).sum().backward()


def test_a_shared_weight() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with (
        SIBP().attach(model),
        pytest.raises(BackpassError, match=r"used twice in one backward pass.*ProxProp\(union=True\)"),
    ):
        model(torch.randn(2, 3)).sum().backward()
    model.zero_grad()
    with SIBP(where=lambda site: site.index == 1).attach(model):
        model(torch.randn(2, 3)).sum().backward()


def test_a_double_backward() -> None:
    model, x = network()
    with SIBP().attach(model), pytest.raises(BackpassError, match="no double backward.*remove the rule"):
        torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)


def _two_processes(rank: int) -> str:
    model, x = network()
    with SIBP().attach(model):
        try:
            torch.nn.parallel.DistributedDataParallel(model)(x[rank:]).sum().backward()
        except BackpassError as error:
            return str(error)
    return ""


def test_several_processes() -> None:
    for message in in_processes(2, _two_processes):
        assert "2 processes contribute to the layer of '2.weight'" in message
        assert "ProxProp(union=True)" in message


def test_half_precision() -> None:
    model, x = network()
    with SIBP().attach(model), torch.autocast("cpu", torch.float16), pytest.raises(BackpassError, match="bfloat16"):
        model(x)


@pytest.mark.parametrize("poison", ["input", "weight", "loss"])
def test_divergence_is_explained(poison: str) -> None:
    model, x = network()
    if poison == "input":
        x[0, 0] = torch.inf
    if poison == "weight":
        model[0].weight.data[0] = torch.nan
    with SIBP(eta=0.7).attach(model), pytest.raises(BackpassError, match=r"diverged\. eta is 0\.7; about 1 / \(number"):
        (model(x).sum() * (torch.inf if poison == "loss" else 1)).backward()


def test_a_backward_pass_after_the_rule_is_gone() -> None:
    model, x = network()
    loss = _loss_of_a_passing_rule(model, x)
    with pytest.raises(BackpassError, match="while the rule is attached"):
        loss.backward()


def _loss_of_a_passing_rule(model: nn.Module, x: Tensor) -> Tensor:
    with SIBP().attach(model):
        return model(x).sum()


def test_layers_out_of_sight() -> None:
    model = nn.LSTM(3, 2)
    x = torch.randn(4, 1, 3)
    with SIBP().attach(model), pytest.raises(BackpassError, match=r"'lstm' in module '\(model\)'.*out of sight"):
        model(x)
    without = nn.ReLU()
    with SIBP().attach(without), pytest.raises(NoSiteError, match="sibp finds no site"):
        without(x)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("eta", 0, "eta is a positive finite number or None"),
        ("eta", float("inf"), "eta is a positive"),
        ("lam", None, "lam is a positive finite number, got None"),
        ("lam", -1.0, "lam is a positive"),
        ("lam_bias", "1", "lam_bias is a positive finite number or None"),
        ("newton_steps", 0, "newton_steps is an int of at least 1"),
        ("cg_steps", 2.0, "cg_steps is an int of at least 1"),
        ("updated_weights", 1, "updated_weights is True or False"),
        ("where", 3, "where is a function of a Site"),
    ],
)
def test_settings_out_of_range(setting: str, value: object, message: str) -> None:
    with pytest.raises(BackpassError, match=message):
        SIBP(**{setting: value})


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'mean'"):
        SIBP(reduction="meen")
    with pytest.raises(UnknownNameError, match="setting of rule 'sibp'"):
        parse_rule("sibp:etaa=1")


def test_the_text_form() -> None:
    rule = parse_rule("sibp:eta=0.25,lam=2,updated_weights=false")
    assert rule == SIBP(eta=0.25, lam=2, updated_weights=False)
    assert parse_rule(str(rule)) == rule
    assert parse_rule("sibp:eta=none") == SIBP(eta=None)


def test_another_backward_pass_for_the_input_alone_needs_no_free_gradient() -> None:
    model, x = network()
    x.requires_grad_()
    with SIBP().attach(model):
        F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long)).backward()
        first, x.grad = x.grad, None
        (second,) = torch.autograd.grad(F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long)), x)
    torch.testing.assert_close(first, second)
