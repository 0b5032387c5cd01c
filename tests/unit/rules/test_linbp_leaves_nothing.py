"""LinBP in threads, through exceptions and copies: what it leaves behind, and what it refuses."""

import copy
import gc
import io
import pickle
import threading
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from backpass import BackpassError, LinBP, NoSiteError
from backpass.rules import attachments
from support.networks import CASES, Functional, Reused, gradients


def close(one, other, tolerance=1e-12):
    assert torch.allclose(one[0], other[0], rtol=0, atol=tolerance)
    assert all(torch.allclose(one[1][k], other[1][k], rtol=0, atol=tolerance) for k in one[1])


@pytest.fixture(params=["functional", "reused-in-place", "residual", "conv-bn-relu"])
def case(request):
    return CASES[request.param].make()


def test_another_thread_with_another_model_stays_plain():
    model, x = CASES["functional"].make()
    other = copy.deepcopy(model)
    plain = gradients(other, other, x)
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, h):
            inside.set()
            assert go_on.wait(20)
            return h

    waiting = nn.Sequential(Waiting(), model)
    results = {}

    def attached_thread():
        with LinBP().attach(waiting):
            results["linear"] = gradients(waiting, model, x)

    thread = threading.Thread(target=attached_thread)
    thread.start()
    # The other thread's model probes first, then runs: each time it waits here while this thread goes on.
    assert inside.wait(20)
    results["plain"] = gradients(other, other, x)
    go_on.set()
    thread.join(20)
    close(results["plain"], plain)
    with LinBP().attach(model):
        close(results["linear"], gradients(model, model, x))


def test_threads_that_find_the_sites_at_the_same_time_are_all_linear():
    model, x = CASES["functional"].make()
    begin = threading.Barrier(4)

    class Slow(nn.Module):
        def forward(self, h):
            time.sleep(0.02)  # so that the threads' calls overlap
            return h

    shared = nn.Sequential(Slow(), model, Slow())
    results = {}

    def run(name):
        leaf = x.clone().requires_grad_()
        begin.wait(20)
        for _ in range(5):
            (results[name],) = torch.autograd.grad(shared(leaf).sum(), leaf)

    with LinBP(start=-1).attach(shared):
        threads = [threading.Thread(target=run, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    with LinBP(start=-1).attach(model):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf).sum(), leaf)
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results.values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_forward_leaves_no_mode(error):
    class Failing(Functional):
        fail = False

        def forward(self, x):
            x = F.relu(self.layers[0](x))
            if self.fail:
                raise error
            return F.relu(self.layers[1](x))

    model, x = Failing().double(), torch.randn(2, 5, dtype=torch.float64)
    with LinBP(start=-1).attach(model) as attached:
        expected = gradients(lambda x: model(x), model.layers[:2], x)
        model.fail = True
        with pytest.raises(error):
            model(x)
        if error is RuntimeError:
            assert _get_current_function_mode_stack() == []
        model.fail = False
        close(gradients(lambda x: model(x), model.layers[:2], x), expected)
        assert [site.index for site in attached.sites] == [1]
        model.fail = True
        with pytest.raises(error):
            model(x)
    assert _get_current_function_mode_stack() == []


def test_a_recursive_model_numbers_its_sites_through():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, depth=2):
            x = F.relu(self.layer(x))
            return self(x, depth - 1) if depth else x

    model = Recursive()
    with LinBP(start=-1).attach(model) as attached:
        model(torch.randn(2, 4))
        assert [site.index for site in attached.seen] == [0, 1, 2]
        assert [site.index for site in attached.sites] == [2]


def test_a_failing_pre_hook_of_someone_else_leaves_no_mode():
    model, x = CASES["residual"].make()

    def fail(module, args):
        raise RuntimeError("not mine")

    handle = model.blocks[1].V.register_forward_pre_hook(fail, prepend=True)
    with LinBP().attach(model):
        with pytest.raises(RuntimeError, match="not mine"):
            model(x)
        assert _get_current_function_mode_stack() == []
        handle.remove()
        with LinBP().attach(model) as again:
            model(x)
        assert len(again.sites) == 4


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("called", [True, False])
def test_a_copy_of_an_attached_model_carries_the_rule_with_its_own_weights(duplicate, called):
    model, x = CASES["reused-in-place"].make()
    plain = gradients(model, model, x)
    with LinBP(start=-1).attach(model):
        expected = gradients(model, model, x) if called else None
        twin = duplicate(model)
    with LinBP(start=-1).attach(model):
        expected = gradients(model, model, x)
    close(gradients(twin, twin, x), expected)
    with torch.no_grad():
        twin.layers[0].weight.mul_(2)
    assert not torch.equal(gradients(twin, twin, x)[0], expected[0])
    close(gradients(model, model, x), plain)
    (attached,) = attachments(twin)
    assert attached.rule == LinBP(start=-1)
    attached.remove()
    assert attachments(twin) == []
    with torch.no_grad():
        twin.layers[0].weight.div_(2)
    close(gradients(twin, twin, x), plain)


def test_torch_save_of_an_attached_model_can_be_loaded():
    model, x = CASES["modules"].make()
    buffer = io.BytesIO()
    with LinBP(start=1).attach(model):
        expected = gradients(model, model, x)
        torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    close(gradients(loaded, loaded, x), expected)


def test_an_attached_rule_does_not_keep_the_model_alive():
    model = Reused()
    attached = LinBP().attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(BackpassError, match="gone"):
        attached.model  # noqa: B018


@pytest.mark.parametrize("training", [True, False])
def test_resolving_the_sites_leaves_buffers_and_random_states(training):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.register = nn.BatchNorm1d(4), nn.Dropout(), None
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            x.mul_(2)
            return F.relu(self.drop(self.norm(x)))

    torch.manual_seed(0)
    model, twin = Model().train(training), Model().train(training)
    x = torch.randn(8, 4)
    torch.manual_seed(1)
    expected = twin(x.clone())
    state = torch.get_rng_state()
    torch.manual_seed(1)
    given = x.clone()
    with LinBP(start=-1).attach(model):
        assert torch.equal(model(given), expected)
    assert torch.equal(given, 2 * x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("start", [-1, 0.5, 1])
def test_a_model_whose_number_of_sites_changes_is_exact_in_every_call(start):
    class Deeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.depth = nn.Linear(4, 4), 2

        def forward(self, x, linear=None):
            for index in range(self.depth):
                h = self.layer(x)
                y = F.relu(h) if linear is None else torch.relu(h)
                x = y if linear is None or index not in linear else h + (y - h).detach()
            return x

    model, x = Deeper().double(), torch.randn(8, 4, dtype=torch.float64)
    with LinBP(start=start).attach(model) as attached:
        for model.depth in (2, 3, 3, 5, 5, 1 + (start == 1), 4, 3):
            got = gradients(model, model, x)
            first = {-1: model.depth - 1, 0.5: model.depth // 2, 1: 1}[start]
            assert [site.index for site in attached.sites] == list(range(first, model.depth))
            with attached.suspended():
                linear = range(first, model.depth)
                close(got, gradients(lambda z, linear=linear: model(z, linear=linear), model, x))


def test_lazy_modules_take_a_rule_before_they_are_called():
    model, x = nn.Sequential(nn.LazyLinear(4), nn.ReLU()), torch.randn(2, 3)
    with LinBP(start=-1).attach(model) as attached:
        model(x)
        assert len(attached.sites) == 1


def test_train_and_eval_are_resolved_apart():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = F.relu(self.layer(x))
            return F.relu(self.layer(x)) if self.training else x

    model, x = Auxiliary(), torch.randn(2, 4)
    with LinBP(start=-1).attach(model) as attached:
        for mode, last in ((True, 1), (False, 0), (True, 1)):
            model.train(mode)(x)
            assert [site.index for site in attached.sites] == [last]


@pytest.mark.parametrize("start", [None, -1])
def test_models_without_sites_raise(start):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with LinBP(start=start).attach(model), pytest.raises(NoSiteError, match=r"finds no site|none of the 0"):
        model(torch.randn(2, 3))


def traced(model):
    return torch.jit.trace(model, torch.randn(2, 3))


@pytest.mark.parametrize("make", [torch.jit.script, traced])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_models_raise(make):
    model = make(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(NoSiteError, match="scripted"):
        LinBP().attach(model)
    outer = nn.Sequential()
    outer.inner = model
    with pytest.raises(NoSiteError, match=r"inner: the module is scripted"):
        LinBP().attach(outer, strict=True)
    with LinBP().attach(outer) as attached, pytest.raises(NoSiteError, match=r"inner: the module is scripted"):
        outer(torch.randn(2, 3))
    assert list(attached.unreachable) == ["inner"]


def test_exported_models_raise():
    exported = torch.export.export(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.randn(2, 3),))
    with pytest.raises(BackpassError, match=r"expected an nn.Module, got ExportedProgram"):
        LinBP().attach(exported)
    model = exported.module()
    with LinBP().attach(model), pytest.raises(NoSiteError, match="exported model shows no sites"):
        model(torch.randn(2, 3))
