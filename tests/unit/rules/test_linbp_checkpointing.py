"""LinBP under activation checkpointing, and models whose calls cannot be told apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from backpass import BackpassError, LinBP
from support.networks import CASES, Functional, gradients


def close(one, other, tolerance=1e-12):
    assert torch.allclose(one[0], other[0], rtol=0, atol=tolerance)
    assert all(torch.allclose(one[1][k], other[1][k], rtol=0, atol=tolerance) for k in one[1])


class Checkpointed(nn.Module):
    """The residual network with each block under activation checkpointing."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        for block in self.inner.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.inner.head(x)


@pytest.mark.parametrize("start", [0, 1, -1, "inner.blocks.1"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_module_changes_nothing(reentrant, start):
    model, x = CASES["residual"].make()
    wrapped = Checkpointed(model, reentrant)
    inner_start = start.removeprefix("inner.") if isinstance(start, str) else start
    with LinBP(start=inner_start).attach(model):
        expected = gradients(model, model, x)
    with LinBP(start=start).attach(wrapped):
        close(gradients(wrapped, model, x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_sequential_changes_nothing(reentrant):
    torch.manual_seed(0)
    inner = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4)]).double()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint_sequential(self.inner, 2, x, use_reentrant=reentrant)

    x = torch.randn(3, 4, dtype=torch.float64)
    wrapped = Wrapped()
    with LinBP(start=1).attach(inner):
        expected = gradients(inner, inner, x)
    with LinBP(start=1).attach(wrapped):
        close(gradients(wrapped, inner, x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_function_is_refused_with_the_way_out(reentrant):
    class Model(Functional):
        def forward(self, x):
            return self.layers[1](checkpoint(lambda h: F.relu(self.layers[0](h)), x, use_reentrant=reentrant))

    model = Model()
    with LinBP().attach(model), pytest.raises(BackpassError, match="Checkpoint a module"):
        model(torch.randn(2, 5, requires_grad=True))


def test_activations_without_gradients_are_no_sites_and_not_taken_for_checkpointing():
    class Model(Functional):
        def forward(self, x):
            with torch.no_grad():
                gate = F.relu(self.layers[0](x))
            return F.relu(self.layers[1](x)) * gate

    model, x = Model(), torch.randn(2, 5)
    with LinBP().attach(model) as attached:
        assert torch.equal(model(x), Model.forward(model, x))
    assert len(attached.sites) == 1  # the gradient does not reach the other
    assert not attached.unreachable


def test_a_part_called_by_itself_before_the_whole_is_an_error():
    model, x = CASES["residual"].make()
    with LinBP(start=-1).attach(model):
        with pytest.raises(BackpassError, match="call the model once first"):
            model.blocks[0](x)
        model(x)
        model.blocks[0](x)


def test_a_block_that_runs_twice_is_ambiguous_only_where_its_calls_differ():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x):
            return self.block(self.block(x))

    model, x = Twice(), torch.randn(2, 4)
    with LinBP().attach(model):
        model(x)
        model.block(x)
    with LinBP(start=1).attach(model):
        model(x)
        with pytest.raises(BackpassError, match="ambiguous"):
            model.block(x)
