"""LinBP works where PyTorch works, and gives the same gradients there."""

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
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from backpass import BackpassError, LinBP, NoSiteError
from backpass.rules import attachments
from support.networks import CASES, Functional, Reused, gradients


def close(one, other, tolerance=1e-12):
    assert torch.allclose(one[0], other[0], rtol=0, atol=tolerance)
    assert all(torch.allclose(one[1][k], other[1][k], rtol=0, atol=tolerance) for k in one[1])


@pytest.fixture(params=["functional", "reused-in-place", "residual", "conv-bn-relu"])
def case(request):
    return CASES[request.param].make()


def test_func_grad(case):
    model, x = case
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return 0.5 * torch.func.functional_call(model, parameters, (x,)).square().sum()

    with LinBP(start=-1).attach(model):
        by_weight, by_input = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
        expected = gradients(model, model, x)
    close((by_input, by_weight), expected)


def test_vmap_of_grad_gives_per_sample_gradients(case):
    model, x = case
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return 0.5 * torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    with LinBP(start=1).attach(model):
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        _, by_weight, _ = gradients(model, model, x)
    for name, value in by_weight.items():
        assert torch.allclose(per_sample[name].sum(0), value, rtol=0, atol=1e-10)


def test_vmap_outside_of_the_model(case):
    model, x = case
    with LinBP(start=1).attach(model):
        whole = gradients(model, model, x)
        mapped = gradients(lambda x: torch.func.vmap(lambda s: model(s[None])[0])(x), model, x)
    close(mapped, whole, 1e-10)


def test_forward_mode_gives_the_same_linear_derivative():
    model, x = CASES["silu"].make()
    direction = torch.randn_like(x)
    with LinBP(start=1).attach(model):
        value, tangent = torch.func.jvp(model, (x,), (direction,))
        jacobian = torch.func.vmap(torch.func.jacrev(lambda s: model(s[None])[0]))(x)
    assert torch.equal(value, model(x))
    assert torch.allclose(tangent, torch.einsum("noi,ni->no", jacobian, direction), atol=1e-12)


def test_double_backward_sees_a_linear_activation():
    model, x = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh()).double(), torch.randn(2, 3, dtype=torch.float64)
    x.requires_grad_()
    with LinBP().attach(model):
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (by_weight,) = torch.autograd.grad(first.sum(), model[0].weight)
    assert torch.allclose(first, model[0].weight.sum(0).expand(2, 3))
    assert torch.equal(by_weight, torch.full((3, 3), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Softplus, nn.SiLU, nn.Tanh])
def test_bf16_autocast_keeps_the_forward_and_the_dtypes(activation):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), activation(), nn.Linear(6, 3)), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
        with LinBP().attach(model):
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            out.sum().backward()
    assert torch.equal(out, plain)
    assert leaf.grad.dtype == torch.float32
    weight = (model[2].weight.to(torch.bfloat16).sum(0) @ model[0].weight.to(torch.bfloat16)).float()
    assert torch.allclose(leaf.grad, weight.expand(4, 6), rtol=2e-2, atol=2e-2)


def test_prelu_learns_its_slope_as_before():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)).double(), torch.randn(5, 4, dtype=torch.float64)
    plain = gradients(model, model, x)
    with LinBP().attach(model):
        linear = gradients(model, model, x)
    assert torch.equal(linear[2], plain[2])
    assert torch.equal(linear[1]["1.weight"], plain[1]["1.weight"])
    assert torch.allclose(linear[0], linear[2] @ model[0].weight)


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


def test_a_users_own_no_grad_block_is_not_taken_for_checkpointing():
    class Model(Functional):
        def forward(self, x):
            with torch.no_grad():
                gate = F.relu(self.layers[0](x))
            return F.relu(self.layers[1](x)) * gate

    model, x = Model(), torch.randn(2, 5)
    with LinBP().attach(model) as attached:
        assert torch.equal(model(x), Model.forward(model, x))
    assert len(attached.sites) == 2


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


def test_of_two_rules_the_one_attached_last_acts():
    model, x = CASES["functional"].make()
    with LinBP(start=1, stop=2, slope=0.5).attach(model) as outer:
        only_outer = gradients(model, model, x)
        with LinBP(start=1).attach(model) as inner:
            both = gradients(model, model, x)
            assert [site.index for site in inner.sites] == [1, 2]
        close(gradients(model, model, x), only_outer)
    with LinBP(start=1).attach(model):
        close(both, gradients(model, model, x))
    assert outer.rule.slope == 0.5


def test_a_site_that_the_inner_rule_leaves_goes_to_the_outer_one():
    model, x = CASES["functional"].make()
    with LinBP(start=2).attach(model), LinBP(start=0, stop=1).attach(model):
        got = gradients(model, model, x)
    with LinBP(where=lambda site: site.index != 1).attach(model):
        close(got, gradients(model, model, x))


def test_rules_on_nested_modules_number_their_own_sites():
    model, x = CASES["nested-sequential"].make()
    with LinBP(start=2).attach(model) as outer, LinBP(start=0, stop=1).attach(model.body[0]) as inner:
        got = gradients(model, model, x)
        assert [s.module for s in outer.sites] == ["body.1.1"]
        assert [s.module for s in inner.sites] == ["1"]
    with LinBP(where=lambda site: site.index in (0, 2)).attach(model):
        close(got, gradients(model, model, x))


def test_removal_out_of_order_leaves_the_other_rule():
    model, x = CASES["functional"].make()
    first, second = LinBP(start=2).attach(model), LinBP(start=0, stop=1).attach(model)
    first.remove()
    got = gradients(model, model, x)
    second.remove()
    with LinBP(start=0, stop=1).attach(model):
        close(got, gradients(model, model, x))


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


def test_the_gradient_of_a_batch_is_the_sum_over_its_parts(case):
    model, x = case
    with LinBP(start=1).attach(model):
        whole = gradients(model, model, x)
        parts = [gradients(model, model, x[k : k + 1]) for k in range(len(x))]
    close((torch.cat([p[0] for p in parts]), {k: sum(p[1][k] for p in parts) for k in whole[1]}), whole, 1e-10)


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


def test_a_model_whose_sites_change_is_not_silently_misread():
    class Deeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.depth = nn.Linear(4, 4), 2

        def forward(self, x):
            for _ in range(self.depth):
                x = F.relu(self.layer(x))
            return x

    model, x = Deeper(), torch.randn(2, 4)
    with LinBP(start=-1).attach(model):
        model(x)
        model.depth = 3
        with pytest.raises(BackpassError, match="2 sites when .* and 3 in this call"):
            model(x)
    with LinBP(start=1).attach(model) as attached:
        for model.depth in (2, 3):
            model(x)
            assert len(attached.sites) == model.depth - 1


def test_lazy_modules_are_to_be_called_first():
    model, x = nn.Sequential(nn.LazyLinear(4), nn.ReLU()), torch.randn(2, 3)
    with LinBP(start=-1).attach(model), pytest.raises(BackpassError, match="call it once before"):
        model(x)
    model(x)
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
    with pytest.raises(NoSiteError, match=r"its module 'inner' is scripted"):
        outer = nn.Sequential()
        outer.inner = model
        LinBP().attach(outer)


def test_exported_models_raise():
    exported = torch.export.export(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.randn(2, 3),))
    with pytest.raises(BackpassError, match=r"expected an nn.Module, got ExportedProgram"):
        LinBP().attach(exported)
    model = exported.module()
    with LinBP().attach(model), pytest.raises(NoSiteError, match="exported model shows no sites"):
        model(torch.randn(2, 3))
