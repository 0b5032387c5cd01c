"""LinBP on real networks with random weights: the promises of the first page, on every row of one table."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from backpass import BackpassError, LinBP, list_sites
from support.torchvision_operators import define_missing_operators
from support.zoo.architecture import Architecture, outputs_of
from support.zoo.by_hand import BY_HAND
from support.zoo.huggingface import HUGGING_FACE
from support.zoo.own import OWN
from support.zoo.timm_models import TIMM

ZOO = {**TIMM, **HUGGING_FACE, **OWN, **BY_HAND}
NEEDS = {**dict.fromkeys(TIMM, "timm"), **dict.fromkeys(HUGGING_FACE, "transformers")}
STARTS = (0, 0.5, -1)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what is out of reach is told; tested elsewhere


@pytest.fixture(scope="module", params=[pytest.param(k, marks=pytest.mark.slow) if ZOO[k].slow else k for k in ZOO])
def architecture(request) -> Architecture:
    if request.param in NEEDS:
        define_missing_operators()
        pytest.importorskip(NEEDS[request.param])
    return ZOO[request.param]


@functools.lru_cache(maxsize=2)  # the two precisions of one network
def made(architecture, dtype):
    return architecture.make(dtype)


def gradients(architecture, model, run):
    """Outputs, and the gradients of inputs and weights for a fixed random cotangent."""
    given = architecture_inputs(architecture, model)
    leaves = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs = outputs_of(architecture.call(run, given))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    wanted = {**leaves, **weights}
    found = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    return [out.detach() for out in outputs], dict(zip(wanted, found, strict=True))


def architecture_inputs(architecture, model):
    return made(architecture, next(model.parameters()).dtype)[1]


def first_index(start, sites):
    return sites - 1 if start == -1 else math.floor(start * sites)


def assert_close(found, expected, tolerance):
    """Every gradient to the relative tolerance, and to the rounding of the largest where it is zero."""
    eps = torch.finfo(next(g for g in expected.values() if g is not None).dtype).eps
    largest = max(g.abs().max() for g in expected.values() if g is not None)
    for name, right in expected.items():
        assert (found[name] is None) == (right is None), name
        if right is not None:
            allowed = tolerance * right.abs().max() + 64 * eps * largest
            error = (found[name] - right).abs().max()
            assert error <= allowed, f"{name}: {error / right.abs().max():.1e} of the gradient's largest entry"


class Calls:
    """Counts the calls of a model and of its parts."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, int] = {}
        self.handles = [
            module.register_forward_pre_hook(functools.partial(self._count, path))
            for path, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def _count(self, path: str, module: nn.Module, args: object) -> None:
        self.counts[path] = self.counts.get(path, 0) + 1

    def __enter__(self) -> dict[str, int]:
        return self.counts

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("start", STARTS)
def test_gradients_are_those_of_straight_through_activations_and_the_forward_is_plain(architecture, start):
    model, _ = made(architecture, torch.float64)
    plain, _ = gradients(architecture, model, model)
    first = first_index(start, architecture.sites)
    _, expected = gradients(architecture, model, architecture.rewritten(model, first))
    with LinBP(start=start).attach(model) as attached, Calls(model) as calls:
        for number in (1, 2):  # what the first call showed may serve the second
            outputs, found = gradients(architecture, model, model)
            assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
            assert [site.index for site in attached.sites] == list(range(first, architecture.sites))
            assert_close(found, expected, 1e-10)
            assert calls[""] == number


def test_the_same_in_single_precision(architecture):
    model, _ = made(architecture, torch.float32)
    plain, _ = gradients(architecture, model, model)
    with LinBP(start=0.5).attach(model):
        outputs, found = gradients(architecture, model, model)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
    rewritten = architecture.rewritten(model, first_index(0.5, architecture.sites))
    assert_close(found, gradients(architecture, model, rewritten)[1], 1e-5)


@pytest.mark.parametrize(("start", "mode"), [(-1, torch.no_grad), (0, torch.inference_mode)])
def test_without_gradients_the_forward_is_plain(architecture, start, mode):
    model, given = made(architecture, torch.float32)
    with mode():
        plain = outputs_of(architecture.call(model, given))
        try:
            with LinBP(start=start).attach(model), Calls(model) as calls:
                outputs = outputs_of(architecture.call(model, given))
        except BackpassError:
            assert architecture.fused
            return
    assert calls[""] == 1
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))


def test_sites_and_what_is_out_of_reach_are_those_of_the_table(architecture):
    model, given = made(architecture, torch.float32)
    args, kwargs = ((), given) if architecture.inputs else ((given["x"],), {})
    table = list_sites(model, *args, **kwargs)
    with LinBP().attach(model) as attached:
        architecture.call(model, given)
    assert len(table) == len(attached.sites) == architecture.sites, str(table)
    assert set(attached.unreachable) == set(table.unreachable) == architecture.unreachable
    assert all(reason for reasons in attached.unreachable.values() for reason in reasons)
