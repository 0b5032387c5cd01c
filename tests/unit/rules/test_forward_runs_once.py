"""The forward pass of a model with a rule runs once, with all its side effects once, wherever the range starts."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import LinBP
from support.names import name_of
from support.straight_through import Rewritten
from support.zoo.activations_by_hand import QuickGELU

STARTS = (None, 0, 1, 0.5, -1, "second")
SETTINGS = [{"start": start} for start in STARTS] + [{"stop": -1}, {"where": lambda site: site.index == 1}]


class WithSideEffects(nn.Module):
    """Two layers and something beside them that changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.SiLU()), nn.Linear(4, 2)

    def beside(self, x):
        return x

    def forward(self, x):
        return self.last(self.second(torch.tanh(self.first(self.beside(x)))))


class GrowingCache(WithSideEffects):
    """A list of keys, as in the attention of a decoder: later calls see earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = []

    def beside(self, x):
        self.cache.append(x.detach())
        return torch.stack(self.cache).mean(0) + x


class Counter(WithSideEffects):
    """An attribute, no buffer."""

    calls = 0

    def beside(self, x):
        self.calls += 1
        return x * self.calls


class NumPyDraws(WithSideEffects):
    def beside(self, x):
        return x + float(np.random.rand())  # noqa: NPY002


class OwnNumPyGenerator(WithSideEffects):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def beside(self, x):
        return x + torch.as_tensor(self.generator.random(x.shape)).to(x)


class OwnGenerator(WithSideEffects):
    """A torch.Generator, of which a copy cannot be made by copying the model."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def beside(self, x):
        return x + torch.randn(x.shape, generator=self.generator).to(x)

    def __deepcopy__(self, memo):
        return copied_with_generator(self)


class GlobalDraws(WithSideEffects):
    def beside(self, x):
        return F.dropout(x, 0.3, training=True)


class Iterator(WithSideEffects):
    """Consumes what it is given once."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]

    def beside(self, x):
        return x * self.scales.pop(0)


class ReplacedBuffer(WithSideEffects):
    """A buffer that is bound anew, so that it grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.empty(0, 4, dtype=torch.float64))

    def beside(self, x):
        self.seen = torch.cat([self.seen, x.detach()])
        return x + self.seen.mean(0)


class CachedGraph(WithSideEffects):
    """A scale that is computed at the first call and kept, with its graph."""

    cached = None

    def beside(self, x):
        if self.cached is None:
            self.cached = torch.tanh(self.first(x)).mean()
        return x * self.cached.detach()


class AlteredInput(WithSideEffects):
    """Writes into the tensor that the user gave."""

    def beside(self, x):
        with torch.no_grad():
            x.mul_(0.5)
        return x


class BatchStatistics(WithSideEffects):
    """Running statistics in train mode, moved by the functional call, which leaves no trace in the buffer's version."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("var", torch.ones(4, dtype=torch.float64))

    def beside(self, x):
        return F.batch_norm(x, self.mean, self.var, training=True, momentum=0.5)


class PowerIteration(WithSideEffects):
    """Spectral normalisation in train mode: each call moves the estimate of the singular vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrizations.spectral_norm(self.first)


def copied_with_generator(model):
    twin = OwnGenerator().double()
    twin.load_state_dict(model.state_dict())
    twin.generator.set_state(model.generator.get_state())
    return twin


KINDS = [
    *(GrowingCache, Counter, NumPyDraws, OwnNumPyGenerator, OwnGenerator, GlobalDraws, Iterator, ReplacedBuffer),
    *(CachedGraph, AlteredInput, BatchStatistics, PowerIteration),
]


def three_calls(model):
    """Outputs and inputs after three calls on the same data, with every random state as at the start."""
    np.random.seed(0)  # noqa: NPY002 - the global state of NumPy is the subject
    torch.manual_seed(0)
    xs = torch.randn(3, 5, 4, dtype=torch.float64)
    outputs = [model(x) for x in xs]
    return [out.detach().clone() for out in outputs], xs


@pytest.mark.parametrize("settings", SETTINGS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_side_effects_are_those_of_the_plain_model(kind, settings):
    torch.manual_seed(1)
    model = kind().double()
    twin = copy.deepcopy(model)
    expected, altered = three_calls(twin)
    draws = float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    with LinBP(**settings).attach(model):
        found, given = three_calls(model)
        assert (float(np.random.rand()), float(torch.rand(()))) == draws  # noqa: NPY002
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(given, altered)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert three_calls_more(model) == three_calls_more(twin)


def three_calls_more(model):
    return [out.tolist() for out in three_calls(model)[0]]


class ChangingNumber(nn.Module):
    """As many activations as the call asks for, or as the input has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

    def forward(self, x, depth=None):
        for layer in self.layers[: depth or len(x)]:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("start", [-1, -2, 0.5, 0.3, 0])
def test_the_number_of_sites_may_change_from_call_to_call(start):
    torch.manual_seed(0)
    model = ChangingNumber().double()
    with LinBP(start=start).attach(model) as attached:
        for depth in (3, 5, 2, 4, 3):
            x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
            (found,) = torch.autograd.grad(model(x, depth=depth).square().sum(), x)
            first = int(start * depth) if isinstance(start, float) else start % depth
            assert [site.index for site in attached.sites] == list(range(first, depth))
            with attached.suspended():
                rewritten = Rewritten(model, first)
                (expected,) = torch.autograd.grad(rewritten(x, depth=depth).square().sum(), x)
            assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_graphs_of_several_calls_keep_their_own_numbers():
    # The range of a call is known at its end, so backward passes may come in any order, and later.
    torch.manual_seed(0)
    model = ChangingNumber().double()
    xs = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    depths = (4, 2, 5)
    with LinBP(start=-1).attach(model):
        outs = [model(x, depth=depth) for x, depth in zip(xs, depths, strict=True)]
    for x, out, depth in sorted(zip(xs, outs, depths, strict=True), key=lambda row: row[2]):
        (found,) = torch.autograd.grad(out.square().sum(), x)
        (expected,) = torch.autograd.grad(Rewritten(model, depth - 1)(x, depth=depth).square().sum(), x)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [0, -1, 0.5])
def test_a_gradient_inside_the_forward_is_a_part_of_it_and_stays_plain(start):
    """An energy model differentiates inside its forward; the rule acts on the gradient of its output alone."""

    class Energy(nn.Module):
        linear = False

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            with torch.enable_grad():
                energy = self.last(torch.tanh(self.first(x))).sum()
                (force,) = torch.autograd.grad(energy, x, create_graph=True)
            y = torch.tanh(force)
            return force + (y - force).detach() if self.linear else y

    torch.manual_seed(0)
    model = Energy().double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    plain = model(x)
    model.linear = True
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    model.linear = False
    with LinBP(start=start, where=lambda site: site.call == 1).attach(model):
        for _ in range(2):
            out = model(x)
            assert torch.equal(out, plain)
            (found,) = torch.autograd.grad(out.square().sum(), x)
            assert torch.allclose(found, expected, rtol=0, atol=1e-12)


class OfParts(nn.Module):
    """Activations of tensors with gaps in memory, on which torch may round differently than on their copies."""

    def __init__(self, activation, part):
        super().__init__()
        self.first, self.activation, self.part = nn.Linear(41, 41), activation, part

    def forward(self, x):
        return self.activation(self.part(self.first(x)))


PARTS = {
    "a part": lambda h: h[..., :-1],
    "every other": lambda h: h[..., ::2],
    "expanded": lambda h: h[:, :1].expand(-1, 16, -1),
    "a part that is expanded": lambda h: h[:, :1, :-1].expand(-1, 16, -1),
    "overlapping": lambda h: h.unfold(-1, 7, 1),
}


GAPS = [(activation, part) for part in PARTS for activation in (nn.GELU(), nn.Mish(), QuickGELU())]
GAPS += [(nn.SiLU(inplace=True), part) for part in ("a part", "every other")]


@pytest.mark.parametrize(("activation", "part"), GAPS, ids=str)
def test_the_forward_has_the_bits_of_the_plain_one_on_tensors_with_gaps(activation, part):
    torch.manual_seed(0)
    model = OfParts(activation, PARTS[part]).double()
    x = torch.randn(2, 16, 41).double()
    plain = model(x)
    with LinBP().attach(model):
        for _ in range(3):
            assert torch.equal(model(x), plain)
