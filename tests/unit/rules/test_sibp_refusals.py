"""What SIBP cannot do exactly raises, and names the alternative."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backpass import SIBP, BackpassError, NoSiteError, UnknownNameError, parse_rule
from backpass.rules.semi_implicit.backward import DivergedError
from support.processes import in_processes


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)


def test_one_selected_use_of_a_shared_weight() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with SIBP(where=lambda site: site.index == 1).attach(model):
        model(torch.randn(2, 3)).sum().backward()


class Parted(nn.Module):
    """Two blocks with the boundary between a layer and its activation; each block is checkpointed, or neither."""

    def __init__(self, first: list[nn.Module], second: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(*first), nn.Sequential(*second)
        self.how: tuple[str, ...] = ()
        self.reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            block = getattr(self, name)
            x = checkpoint(block, x, use_reentrant=self.reentrant) if name in self.how else block(x)
        return x


def parted() -> tuple[Parted, Tensor, list[Tensor]]:
    """With the gradients that it has where nothing is checkpointed."""
    torch.manual_seed(0)
    model = Parted([nn.Linear(4, 5)], [nn.Tanh(), nn.Linear(5, 3)]).double()
    x = torch.randn(6, 4).double().requires_grad_()
    with SIBP().attach(model):
        model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return model, x, expected


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", [("first",), ("second",), ("first", "second")])
def test_checkpointing_that_parts_a_layer_from_its_activation_is_exact_or_raises(
    how: tuple[str, ...], reentrant: bool
) -> None:
    model, x, expected = parted()
    model.how, model.reentrant = how, reentrant
    with SIBP().attach(model):
        if how == ("first",) and not reentrant:  # the activation's own node holds what it needs
            model(x).square().sum().backward()
            for p, known in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, known, rtol=0, atol=0)
        else:
            with pytest.raises(BackpassError, match=r"'tanh'.*checkpoint.*same block"):
                model(x)
    model.zero_grad()
    # What is not under the rule, or not learned, is none of its business.
    with SIBP(where=lambda site: site.module != "first.0").attach(model):
        model(x).square().sum().backward()
    with torch.no_grad(), SIBP().attach(model):
        model(x)


def test_an_activation_of_a_layer_without_gradients_raises_nothing() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = self.below(x)
            return self.above(torch.relu(z))

    model, x = Frozen(), torch.randn(2, 4)
    with SIBP().attach(model):
        model(x).sum().backward()
    assert model.below.weight.grad is None


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
        assert 'ProxProp(solve="step")' in message


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


def deep(s: type[nn.Module], std: float = 0.05) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in pairwise([64, *[100] * 8, 10]):
        layers += [nn.Linear(i, o), s()]
        nn.init.normal_(layers[-2].weight, 0, std)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, rule: SIBP, steps: int, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, generator = x.float() / 16, torch.Generator().manual_seed(0)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 1.0)
    losses = []
    with rule.attach(model):
        for _ in range(steps):
            rows = torch.randint(len(x), (100,), generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_a_finite_explosion_is_divergence_too() -> None:
    with pytest.raises(DivergedError, match=r"times as long as its weights and as every step before, so the network"):
        train(deep(nn.ReLU), SIBP(eta=10.0, descent_steps=0), 300)


@pytest.mark.parametrize("s", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("std", [0.01, 0.05, 0.3])
def test_escaping_from_bad_initial_weights_is_no_divergence(s: type[nn.Module], std: float) -> None:
    train(deep(s, std), SIBP(eta=0.1), 100)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_divergence_has_no_scale(factor: float) -> None:
    model = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 10))
    nn.init.zeros_(model[2].weight)
    with torch.no_grad():
        model[0].weight.mul_(factor)
    train(model, SIBP(eta=0.1), 100)
    train(model, SIBP(eta=50.0), 100, torch.optim.AdamW(model.parameters(), 1e-3))


def test_models_without_layers() -> None:
    x = torch.randn(4, 1, 3)
    without = nn.ReLU()
    with SIBP().attach(without), pytest.raises(NoSiteError, match="sibp finds no site"):
        without(x)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("eta", 0, "eta must be positive and finite, or None"),
        ("eta", float("inf"), "eta must be positive"),
        ("lam", None, "lam must be positive and finite, got None"),
        ("lam", -1.0, "lam must be positive"),
        ("lam_bias", "1", "lam_bias must be positive and finite, or None"),
        ("newton_steps", 0, "newton_steps must be an int of at least 1"),
        ("cg_steps", 2.0, "cg_steps must be an int of at least 1"),
        ("updated_weights", 1, "updated_weights must be True or False"),
        ("where", 3, "where must be a function of a Site"),
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
