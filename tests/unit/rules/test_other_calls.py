"""LinBP where a model is called in another way than as itself: mapped, replicated, pickled, copied."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from backpass import BackpassError, LinBP, NoSiteError, parse_rule
from support.straight_through import Rewritten


class Member(nn.Module):
    """relu by function, tanh by method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.second(F.relu(self.first(x))).tanh())


class Ensemble(nn.Module):
    """Members whose stacked weights are mapped over by torch.func.vmap, inside the forward."""

    def __init__(self, members=3) -> None:
        super().__init__()
        self.members = nn.ModuleList([Member() for _ in range(members)])
        self.skeleton = [copy.deepcopy(self.members[0]).to("meta")]  # a list: no part of the model's parameters

    def forward(self, x):
        members = [dict(member.named_parameters()) for member in self.members]
        stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
        return vmap(lambda weights, x: functional_call(self.skeleton[0], weights, (x,)), (0, None))(stacked, x).mean(0)


class Registered(Ensemble):
    """The same with the skeleton a module of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.base = self.skeleton[0]


class OverSamples(nn.Module):
    """The mapped axis is that of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.member = Member()

    def forward(self, x):
        return vmap(self.member)(x)


class Loop(nn.Module):
    """The ensemble as a loop: the slow reference."""

    def __init__(self, ensemble) -> None:
        super().__init__()
        self.members = ensemble.members

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


def gradients(model, run, x):
    x = x.clone().requires_grad_()
    weights = [p for p in model.parameters() if not p.is_meta]
    return torch.autograd.grad(run(x).square().sum(), [x, *weights])


def close(one, other):
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", [Ensemble, Registered])
def test_activations_of_members_mapped_inside_the_model_are_linear(kind):
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(4, 4, dtype=torch.float64)
    plain = model(x)
    expected = gradients(model, Rewritten(Loop(model), 0), x)
    with LinBP().attach(model, strict=True) as attached:
        found = gradients(model, model, x)
        assert torch.equal(model(x), plain)
    assert len(attached.sites) == 2  # one call each serves all members
    assert close(found, expected)


@pytest.mark.parametrize("start", [0, -1])
def test_activations_of_a_model_mapped_over_samples_are_linear(start):
    torch.manual_seed(0)
    model, x = OverSamples().double(), torch.randn(4, 4, dtype=torch.float64)
    expected = gradients(model, Rewritten(model.member, start % 2), x)
    with LinBP(start=start).attach(model, strict=True):
        found = gradients(model, model, x)
    assert close(found, expected)


@pytest.mark.parametrize("start", [0, 0.5, -1])
def test_data_parallel_is_seen_through(start):
    torch.manual_seed(0)
    model, x = Member().double(), torch.randn(4, 4, dtype=torch.float64)
    first = {0: 0, 0.5: 1, -1: 1}[start]
    expected = gradients(model, Rewritten(model, first), x)
    parallel = nn.DataParallel(model)
    with LinBP(start=start).attach(parallel):
        assert close(gradients(model, parallel, x), expected)


def test_replicas_are_linear_or_an_error():
    """What DataParallel calls on several devices: shallow copies of all modules, made for each call, in threads."""
    torch.manual_seed(0)
    model, x = Member().double(), torch.randn(4, 4, dtype=torch.float64)
    expected = gradients(model, Rewritten(model, 1), x)
    with LinBP(start=-1).attach(model):
        replica = replicate(model)
        try:
            found = gradients(model, replica, x)
        except BackpassError:
            return
    assert close(found, expected)


def replicate(model):
    """As torch.nn.parallel.replicate does, on one device."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            setattr(twin, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, name, parameter.view_as(parameter))  # a tensor with a graph, no parameter
    return copies[model]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("called", [True, False], ids=["called before", "not called before"])
@pytest.mark.parametrize("start", [0, -1, "second"])
@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_attached_model_obeys_the_rule_by_itself(way, start, called):
    torch.manual_seed(0)
    model, x = Member().double(), torch.randn(4, 4, dtype=torch.float64)
    first = {0: 0, -1: 1, "second": 2}[start]
    if start == "second":  # no site inside
        with LinBP(start=start).attach(model), pytest.raises(NoSiteError):
            model(x)
        return
    expected = gradients(model, Rewritten(model, first), x)
    plain = gradients(model, model, x)
    with LinBP(start=start).attach(model):
        if called:
            model(x)
        twin = way(model)
        assert close(gradients(model, model, x), expected)
    assert close(gradients(model, model, x), plain)
    assert close(gradients(twin, twin, x), expected)  # after the first one was removed, too


def test_the_papers_start_is_resolved_or_refused_at_once():
    try:
        rule = parse_rule("linbp:start=paper")
    except BackpassError:
        return
    from backpass.models import build

    model = build("vgg16")
    with rule.attach(model) as attached:
        model(torch.rand(1, 3, 32, 32))
    assert [site.index for site in attached.sites] == list(range(10, 15))
