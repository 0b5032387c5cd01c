"""PGD: what it promises of a result, and that its answer does not depend on how it is computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass.attacks import PGD, evaluate
from backpass.attacks.jobs import batch_sizes

NORMS = pytest.mark.parametrize(("norm", "eps", "step"), [("linf", 0.1, 0.03), ("l2", 0.8, 0.25)])


def size(norm, delta):
    return delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)


@NORMS
def test_success_and_loss_are_those_of_the_plain_model(cnn, held_out, norm, eps, step):
    x, y = held_out.x[:64], held_out.y[:64]
    result = PGD(eps=eps, step=step, norm=norm, restarts=2)(cnn, x, y)
    with torch.no_grad():
        logits = cnn(result.x_adv)
    assert torch.equal(result.success, logits.argmax(1) != y)
    assert torch.equal(result.prediction, logits.argmax(1))
    torch.testing.assert_close(result.loss, F.cross_entropy(logits, y, reduction="none"))
    assert 10 < result.success.sum() < 64


@NORMS
def test_the_image_stays_in_ball_and_bounds(cnn, held_out, norm, eps, step):
    x, y = held_out.x[:64], held_out.y[:64]
    x_adv = PGD(eps=eps, step=step, norm=norm)(cnn, x, y).x_adv
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert size(norm, (x_adv - x).double()).max() <= eps + 1e-6


@NORMS
@pytest.mark.parametrize("early_stop", [True, False])
def test_the_answer_is_that_of_any_batch_size(cnn, held_out, norm, eps, step, early_stop):
    cnn, x, y = cnn.double(), held_out.x[:64].double(), held_out.y[:64]
    attack = PGD(eps=eps, step=step, norm=norm, restarts=3, early_stop=early_stop)
    whole = attack(cnn, x, y)
    for batch_size in (1, 7, 64):
        part = attack(cnn, x, y, batch_size=batch_size)
        # The kernels round differently for other batch sizes; l_inf keeps only signs, so nothing of it is left.
        torch.testing.assert_close(part.x_adv, whole.x_adv, atol=0 if norm == "linf" else 1e-9, rtol=0)
        assert torch.equal(part.success, whole.success)


@NORMS
def test_in_float32_the_success_is_that_of_any_batch_size(cnn, held_out, norm, eps, step):
    x, y = held_out.x[:64], held_out.y[:64]
    attack = PGD(eps=eps, step=step, norm=norm, restarts=3)
    whole = attack(cnn, x, y)
    for batch_size in (1, 7, 64):
        assert torch.equal(attack(cnn, x, y, batch_size=batch_size).success, whole.success)


def test_the_verdict_is_in_float32_under_autocast_too(cnn, held_out):
    x, y = held_out.x[:64], held_out.y[:64]
    with torch.autocast("cpu", torch.bfloat16):
        result = PGD(eps=0.1, step=0.03)(cnn, x, y)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, F.cross_entropy(cnn(result.x_adv), y, reduction="none"))


def test_indices_name_the_draws_so_that_a_slice_of_the_data_gets_the_same(cnn, held_out):
    cnn, x, y = cnn.double(), held_out.x[:32].double(), held_out.y[:32]
    attack = PGD(eps=0.1, step=0.03, restarts=3)
    whole = attack(cnn, x, y)
    part = attack(cnn, x[20:], y[20:], indices=torch.arange(20, 32))
    assert torch.equal(part.x_adv, whole.x_adv[20:])
    assert not torch.equal(attack(cnn, x[20:], y[20:]).x_adv, whole.x_adv[20:])


def test_a_seed_changes_the_start_and_the_same_seed_does_not(cnn, held_out):
    x, y = held_out.x[:8], held_out.y[:8]
    first, again, other = (PGD(steps=1, restarts=1, seed=s, early_stop=False)(cnn, x, y).x_adv for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_start_may_be_drawn_from_a_smaller_ball(cnn, held_out):
    x, y = held_out.x[:32] * 0.5 + 0.25, held_out.y[:32]
    settings = {"eps": 0.2, "step": 1e-6, "steps": 1, "restarts": 1, "early_stop": False}
    whole, half = ((PGD(**settings, start_eps=s)(cnn, x, y).x_adv - x).abs().max() for s in (None, 0.1))
    assert 0.19 < whole <= 0.2 + 1e-6
    assert 0.09 < half <= 0.1 + 2e-6


def test_targeted_leads_to_the_target(cnn, held_out):
    x, y = held_out.x[:64], held_out.y[:64]
    result = PGD(eps=0.3, step=0.05, steps=20, targeted=True)(cnn, x, (y + 1) % 10)
    assert result.success.sum() > 50
    assert torch.equal(result.success, cnn(result.x_adv).argmax(1) == (y + 1) % 10)


def test_without_early_stop_every_step_of_every_restart_is_taken(cnn, held_out):
    x, y = held_out.x[:16], held_out.y[:16]
    result = PGD(eps=0.1, steps=4, restarts=3, early_stop=False)(cnn, x, y)
    assert result.gradients == 16 * 4 * 3
    assert result.forwards == 16 * 3


def test_early_stop_saves_gradients_and_keeps_the_success(cnn, held_out):
    x, y = held_out.x[:200], held_out.y[:200]
    slow = PGD(eps=0.15, step=0.03, steps=20, restarts=1, early_stop=False)(cnn, x, y)
    fast = PGD(eps=0.15, step=0.03, steps=20, restarts=1)(cnn, x, y)
    assert fast.gradients < 0.8 * slow.gradients
    assert fast.success.sum() >= slow.success.sum()


def test_restarts_only_add_successes(cnn, held_out):
    x, y = held_out.x[:128], held_out.y[:128]
    one, five = (PGD(eps=0.07, step=0.03, steps=4, restarts=r)(cnn, x, y).success for r in (1, 5))
    assert bool((five | ~one).all())
    assert five.sum() > one.sum()


def test_the_batch_shrinks_in_a_few_steps(cnn, held_out):
    seen = []
    cnn.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    PGD(eps=0.1, step=0.02, steps=20, restarts=1)(cnn, held_out.x[:100], held_out.y[:100], batch_size=64)
    assert len(batch_sizes(64)) == 16
    assert len(set(seen[: seen.index(36)])) <= 16


@pytest.mark.parametrize("count", [1, 3, 6])
def test_no_gradient_is_computed_for_padding(cnn, held_out, count):
    attack = PGD(eps=0.1, steps=10, restarts=1, early_stop=False)
    right = (cnn(held_out.x).argmax(1) == held_out.y).nonzero().squeeze(1)[:count]
    data = held_out.x[right], held_out.y[right]
    assert attack(cnn, *data, batch_size=256).gradients == 10 * count
    assert evaluate(cnn, data, attack).attacks["PGD"].gradients == 10 * count


@pytest.mark.parametrize("dynamic", [None, False])
def test_a_compiled_model_is_compiled_a_few_times_and_gives_the_same(mlp, held_out, dynamic):
    x, y = held_out.x[:64], held_out.y[:64]
    graphs = []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph

    attack = PGD(eps=0.1, step=0.02, steps=12, restarts=3)
    torch.compiler.reset()
    compiled = torch.compile(mlp, backend=backend, dynamic=dynamic, fullgraph=True)
    expected = attack(mlp, x, y)
    first = attack(compiled, x, y)
    torch.testing.assert_close(first.x_adv, expected.x_adv)
    assert torch.equal(first.success, expected.success)
    # Sizes with a gradient, and some of them again without.
    assert 1 < len(graphs) <= 2 * len(batch_sizes(64, compiled=True))
    known = len(graphs)
    attack(compiled, x, y)
    assert len(graphs) == known


def test_half_precision_searches_but_float32_judges(cnn, held_out):
    x, y = held_out.x[:128], held_out.y[:128]
    full = PGD(eps=0.1, step=0.03)(cnn, x, y)
    half = PGD(eps=0.1, step=0.03, dtype=torch.bfloat16)(cnn, x, y)
    assert half.x_adv.dtype == torch.float32
    assert torch.equal(half.success, cnn(half.x_adv).argmax(1) != y)
    assert abs(int(half.success.sum()) - int(full.success.sum())) <= 3


def test_own_loss_takes_the_place_of_a_named_one(cnn, held_out):
    x, y = held_out.x[:16], held_out.y[:16]
    named = PGD(eps=0.1)(cnn, x, y)
    own = PGD(eps=0.1, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none"))(cnn, x, y)
    assert torch.equal(own.x_adv, named.x_adv)


def test_eot_averages_over_draws_and_asks_every_draw_for_the_verdict(held_out):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            x = x.flatten(1)
            return self.linear(x + 0.2 * torch.randn_like(x))

    x, y = held_out.x[:32], held_out.y[:32]
    result = PGD(eps=0.05, steps=3, restarts=1, eot=4, early_stop=False)(Noisy(), x, y)
    assert result.gradients == 32 * 3 * 4
    assert result.forwards == 32 * 4


@pytest.mark.parametrize("selector", ["logits", lambda output: output["logits"]])
def test_logits_are_selected_from_a_dict(mlp, held_out, selector):
    class InDict(nn.Module):
        def forward(self, x):
            return {"logits": mlp(x), "features": x}

    x, y = held_out.x[:8], held_out.y[:8]
    assert torch.equal(PGD(logits=selector)(InDict(), x, y).x_adv, PGD()(mlp, x, y).x_adv)


def test_fresh_noise_is_seen_by_the_gradient_only(cnn, held_out):
    x, y = held_out.x[:16], held_out.y[:16]
    plain = PGD(eps=0.1, random_start=False, early_stop=False, restarts=1)(cnn, x, y)
    noisy = PGD(eps=0.1, random_start=False, early_stop=False, restarts=1, noise=0.1)(cnn, x, y)
    assert not torch.equal(plain.x_adv, noisy.x_adv)
    # Ten sign steps of 2/255 from x itself: what moved is a multiple of the step, noise would not be.
    moved = (noisy.x_adv - x) / (2 / 255)
    inside = (noisy.x_adv > 0) & (noisy.x_adv < 1)
    torch.testing.assert_close(moved[inside], moved[inside].round(), atol=1e-4, rtol=0)


def test_a_linear_rule_on_the_model_acts_on_the_gradient():
    from backpass import LinBP

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x, y = torch.rand(5, 6), torch.arange(5) % 4
    attack = PGD(eps=0.2, step=0.2, steps=1, random_start=False, early_stop=False)
    with LinBP(start=0).attach(model):
        x_adv = attack(model, x, y).x_adv
    residual = F.softmax(model(x), 1) - F.one_hot(y, 4)
    linear = residual @ model[2].weight @ model[0].weight
    torch.testing.assert_close(x_adv, (x + 0.2 * linear.sign()).clamp(0, 1))


def test_nothing_of_the_attack_is_kept_alive(cnn, held_out):
    import gc
    import weakref

    x = held_out.x[:8].clone()
    result = PGD(steps=2)(cnn, x, held_out.y[:8])
    assert not result.x_adv.requires_grad
    alive = weakref.ref(x)
    del x
    gc.collect()
    assert alive() is None
