"""The rules of transfer attacks equal their formulas, written out by hand for blocks of common networks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from backpass import BPA, PNA, SGM, TGR, BackpassError, Deconvnet, GuidedBackprop, LinBP, NoSiteError, parse_rule
from backpass.attacks import MIFGSM, evaluate
from support.names import name_of
from support.transfer import (
    BLOCKS,
    Ways,
    clamped,
    decayed,
    silu_relu,
    soft_pool,
    without_extreme_pairs,
    without_extremes,
)

ATTENTION = [name for name in BLOCKS if name.startswith(("vit", "swin"))]
RELU = [name for name in BLOCKS if name != "swin"]


def pass_through_relu(x):
    return x + (torch.relu(x) - x).detach()


def regularized(attention=0.25, qkv=0.75, mlp=0.5, count=1):
    return Ways(
        matrix=without_extreme_pairs(attention, count),
        qkv=without_extremes(qkv, count),
        mlp=without_extremes(mlp, count),
    )


RULES = {
    "tgr": (TGR(), regularized(), ATTENTION),
    "tgr, other settings": (
        TGR(attention=0.9, qkv=0.0, mlp=1.0, tokens=2),
        regularized(0.9, 0.0, 1.0, 2),
        ["swin", "vit, module"],
    ),
    "sgm": (SGM(decay=0.3), Ways(branch=decayed(0.3)), list(BLOCKS)),
    "sgm, nothing of a branch": (SGM(decay=0), Ways(branch=decayed(0.0)), list(BLOCKS)),
    "bpa": (BPA(temperature=3), Ways(relu=silu_relu, pool=soft_pool(3)), RELU),
    "pna": (PNA(), Ways(matrix=torch.detach), ATTENTION),
    "guided": (GuidedBackprop(), Ways(relu=clamped(torch.relu)), RELU),
    "deconvnet": (Deconvnet(), Ways(relu=clamped(pass_through_relu)), RELU),
}


def made(name):
    torch.manual_seed(0)
    model = BLOCKS[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, torch.randn(model.shape, dtype=torch.float64, requires_grad=True)


def gradients(model, x, run):
    """The output, and the gradients of the input and of the weights; zero where nothing arrives."""
    out = run(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    wanted = [x, *model.parameters()]
    found = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
    return out.detach(), [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def input_gradient(model, x, run):
    return gradients(model, x, run)[1][0]


@pytest.mark.parametrize(("rule", "name"), [(rule, name) for rule in RULES for name in RULES[rule][2]])
def test_a_rule_is_its_formula(rule, name):
    override, ways, _ = RULES[rule]
    model, x = made(name)
    plain = model(x).detach()
    _, expected = gradients(model, x, lambda x: model.by_hand(x, ways))
    assert not torch.allclose(expected[0], input_gradient(model, x, model))
    with override.attach(model) as attached:
        for _ in range(2):  # the second call follows what the first one showed
            out, found = gradients(model, x, model)
            assert torch.equal(out, plain)
            assert_close(found, expected)
        with torch.no_grad():
            without = model(x)
    with torch.no_grad():
        assert torch.equal(without, model(x))
    assert not attached.unreachable
    assert_close(gradients(model, x, model)[1], gradients(model, x, lambda x: model.by_hand(x, Ways()))[1])


@pytest.mark.parametrize(
    ("rule", "sites"),
    [
        (SGM(), {"resnet": 2, "densenet": 3, "mbconv": 1, "swin": 2, "vit, matmul": 2, "vit, module": 2}),
        (PNA(), dict.fromkeys(ATTENTION, 1)),
        (TGR(), dict.fromkeys(ATTENTION, 3)),
        (BPA(), {"resnet": 6, "densenet": 5, "mbconv": 3, "vit, sdpa": 1}),
    ],
    ids=name_of,
)
def test_the_sites_are_those_of_the_architecture(rule, sites):
    for name, count in sites.items():
        model, x = made(name)
        with rule.attach(model) as attached:
            model(x)
            assert len(attached.sites) == count, f"{name}\n{attached.seen}"


@pytest.mark.parametrize(
    "range_",
    [{"start": 1}, {"start": -1}, {"where": lambda site: site.index == 1}],
    ids=["from the front", "from the end", "where"],
)
def test_a_range_selects_blocks(range_):
    model, x = made("resnet")
    seen = []

    def second_only(x):
        seen.append(None)
        return decayed(0.3)(x) if len(seen) == 2 else x

    expected = gradients(model, x, lambda x: model.by_hand(x, Ways(branch=second_only)))[1]
    with SGM(decay=0.3, **range_).attach(model):
        for _ in range(2):
            assert_close(gradients(model, x, model)[1], expected)


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("rules", "ways", "name"),
    [
        ((SGM(decay=0.3), LinBP()), Ways(branch=decayed(0.3), relu=pass_through_relu), "resnet"),
        ((SGM(decay=0.3), BPA(temperature=3)), Ways(decayed(0.3), silu_relu, soft_pool(3)), "densenet"),
        ((PNA(), SGM(decay=0.3)), Ways(branch=decayed(0.3), matrix=torch.detach), "vit, matmul"),
        ((PNA(), SGM(decay=0.3)), Ways(branch=decayed(0.3), matrix=torch.detach), "vit, module"),
        ((TGR(), SGM(decay=0.3)), replace(regularized(), branch=decayed(0.3)), "vit, sdpa"),
        ((TGR(), LinBP()), replace(regularized(), relu=pass_through_relu), "vit, matmul"),
        ((PNA(), GuidedBackprop()), Ways(relu=clamped(torch.relu), matrix=torch.detach), "vit, module with weights"),
    ],
    ids=name_of,
)
def test_rules_for_different_operations_compose_in_either_order(rules, ways, name, order):
    model, x = made(name)
    expected = gradients(model, x, lambda x: model.by_hand(x, ways))[1]
    first, second = rules[::order]
    with first.attach(model), second.attach(model):
        for _ in range(2):
            assert_close(gradients(model, x, model)[1], expected)


@pytest.mark.parametrize(
    ("rules", "ways", "name"),
    [
        ((SGM(decay=0.5), SGM(decay=0.3)), Ways(branch=decayed(0.3)), "resnet"),
        ((LinBP(), BPA(temperature=3)), Ways(relu=silu_relu, pool=soft_pool(3)), "resnet"),
        ((BPA(), GuidedBackprop()), Ways(relu=clamped(torch.relu), pool=soft_pool(10)), "resnet"),
        *(((TGR(), PNA()), replace(regularized(), matrix=torch.detach), name) for name in ATTENTION),
        *(((PNA(), TGR()), regularized(), name) for name in ATTENTION),
        *(((TGR(tokens=2), TGR()), regularized(), name) for name in ("swin", "vit, matmul", "vit, module")),
    ],
    ids=name_of,
)
def test_of_two_rules_at_one_site_the_one_attached_last_acts(rules, ways, name):
    model, x = made(name)
    expected = gradients(model, x, lambda x: model.by_hand(x, ways))[1]
    with rules[0].attach(model), rules[1].attach(model):
        for _ in range(2):
            assert_close(gradients(model, x, model)[1], expected)


class Checkpointed(nn.Module):
    def __init__(self, part, reentrant):
        super().__init__()
        self.part, self.reentrant = part, reentrant

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("sgm", "resnet"),
        ("sgm", "swin"),
        ("bpa", "resnet"),
        ("pna", "swin"),
        ("pna", "vit, matmul"),
        ("tgr", "swin"),
        ("tgr", "vit, matmul"),
    ],
)
def test_checkpointing_keeps_the_gradients(rule, name, reentrant):
    override, ways, _ = RULES[rule]
    part, x = made(name)
    _, expected = gradients(part, x, lambda x: part.by_hand(x, ways))
    model = Checkpointed(part, reentrant)
    with override.attach(model):
        if reentrant and rule == "sgm":
            with pytest.raises(BackpassError, match="use_reentrant=False"):
                model(x)
            return
        for _ in range(2):
            x.grad = None
            out = model(x)
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype))
            torch.testing.assert_close(x.grad, expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, -1], ids=["forwards", "backwards"])
def test_sgm_and_renormalized_linbp_multiply_in_either_order(order):
    model, x = made("resnet")
    with LinBP(residual="renormalized", decay=0.3).attach(model):
        expected = input_gradient(model, x, model)
    first, second = (SGM(decay=0.3), LinBP(residual="renormalized"))[::order]
    with first.attach(model), second.attach(model):
        for _ in range(2):
            torch.testing.assert_close(input_gradient(model, x, model), expected, rtol=1e-10, atol=1e-10)


POOLS = {
    "3, 2, 1": (F.max_pool2d, (3, 2, 1), {}, (2, 2, 7, 6)),
    "default stride": (F.max_pool2d, (2,), {}, (1, 2, 5, 5)),
    "ceil": (F.max_pool2d, (3,), {"stride": 2, "ceil_mode": True}, (1, 1, 6, 8)),
    "dilated": (torch.max_pool2d, ((2, 3), (2, 1), (1, 0), (2, 1)), {}, (1, 2, 7, 6)),
    "1d": (F.max_pool1d, (3, 2, 1), {}, (2, 2, 9)),
    "3d": (F.max_pool3d, (2, 1), {}, (1, 1, 3, 4, 3)),
    "without a batch": (F.max_pool2d, (3, 1, 1), {}, (2, 4, 4)),
}


@pytest.mark.parametrize("name", POOLS)
def test_max_pooling_has_the_jacobian_of_the_softmax_formula(name):
    function, args, kwargs, shape = POOLS[name]
    torch.manual_seed(0)
    x, t = torch.randn(shape, dtype=torch.float64), 4.0

    class Pool(nn.Module):
        def forward(self, x):
            return function(x, *args, **kwargs)

    model = Pool()
    # Membership of windows, from the plain function: element p is in window w if it alone can be the maximum of w.
    elements = x.numel()
    member = torch.stack(
        [function((torch.arange(elements) == p).double().view(shape), *args, **kwargs) for p in range(elements)]
    )
    member = member.flatten(1).T
    weights = member * torch.exp(t * x.flatten())
    expected = weights / weights.sum(1, keepdim=True)
    with BPA(temperature=t).attach(model):
        found = torch.autograd.functional.jacobian(model, x)
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-10, atol=1e-12)


def test_a_soft_maximum_of_large_values_is_finite():
    x = (1e4 * torch.randn(1, 1, 6, 6)).requires_grad_()
    model = nn.Sequential(nn.MaxPool2d(2))
    with BPA().attach(model):
        (found,) = torch.autograd.grad(model(x).sum(), x)
    assert found.isfinite().all()
    assert found.sum() == 9


class Parallel(nn.Module):
    """x + f(x) + g(x), as in parallel transformer blocks: both branches begin with x."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x):
        return x + self.f(x) + self.g(x)


def test_both_branches_of_a_parallel_block_are_decayed():
    model = Parallel().double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    down = decayed(0.3)
    expected = input_gradient(model, x, lambda x: x + down(model.f(x)) + down(model.g(x)))
    with SGM(decay=0.3).attach(model) as attached:
        torch.testing.assert_close(input_gradient(model, x, model), expected, rtol=1e-12, atol=1e-12)
    assert len(attached.sites) == 2


class Plain(nn.Module):
    """Sums and concatenations that are no skip connections."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.position = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        x = self.stem(x) + self.position.expand(2, 4, 5, 5)
        x = self.a(x) + self.b(x)  # two equal ways
        one, two = x.chunk(2, 1)
        return torch.cat([one, two, self.a(x)[:, :1] + 1], 1)


@pytest.mark.parametrize(
    ("rule", "model", "shape"),
    [
        (SGM(), Plain(), (2, 3, 5, 5)),
        (PNA(), Plain(), (2, 3, 5, 5)),
        (TGR(), Plain(), (2, 3, 5, 5)),
        (BPA(), nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Hardtanh()), (2, 3)),
        (GuidedBackprop(), nn.Sequential(nn.Linear(3, 3), nn.GELU()), (2, 3)),
    ],
    ids=name_of,
)
def test_a_network_without_a_site_is_refused_by_name_and_left_plain_without_gradients(rule, model, shape):
    x = torch.randn(shape, requires_grad=True)
    with rule.attach(model), pytest.raises(NoSiteError, match=rule.name):
        model(x)
    if rule.name in ("sgm", "pna", "tgr"):
        with rule.attach(model), torch.no_grad():
            model(x)


@pytest.mark.parametrize(
    "text",
    [
        "sgm:decay=2",
        "sgm:decay=true",
        "bpa:temperature=0",
        "bpa:temperature=none",
        "pna:start=1.5",
        "tgr:qkv=-1",
        "tgr:tokens=0",
    ],
)
def test_settings_out_of_their_range_are_refused(text):
    with pytest.raises(BackpassError, match=text.split(":")[1].split("=")[0]):
        parse_rule(text)


@pytest.mark.parametrize(
    "text",
    [
        "sgm",
        "sgm:start=layer3,decay=0.2",
        "bpa:start=-2,temperature=5.0",
        "pna",
        "tgr:mlp=0.7",
        "guided",
        "deconvnet:gates=true",
    ],
)
def test_the_text_form_is_the_rule(text):
    assert str(parse_rule(text)) == text


@pytest.mark.parametrize("range_", [{"start": 1}, {"start": -2, "stop": -1}], ids=["from the front", "from the end"])
@pytest.mark.parametrize("name", ["vit, sdpa", "vit, matmul", "vit, module", "swin"])
def test_tgrs_sites_are_numbered_as_they_are_called(range_, name):
    """Layers of queries, keys and values, the attention, and the MLP."""
    model, x = made(name)
    kept = ("matrix", "mlp") if range_ == {"start": 1} else ("matrix",)
    ways = Ways(**{one: getattr(regularized(), one) for one in kept})
    expected = gradients(model, x, lambda x: model.by_hand(x, ways))[1]
    with TGR(**range_).attach(model) as attached:
        for _ in range(2):
            assert_close(gradients(model, x, model)[1], expected)
        assert len(attached.seen) == 3


class Classifier(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.block = BLOCKS[name]()
        self.head = nn.Linear(self.block(torch.zeros(self.block.shape)).flatten(1).shape[1], 3)

    def forward(self, x):
        return self.head(self.block(x).flatten(1))


@pytest.mark.parametrize("rule", RULES)
def test_an_evaluation_under_a_rule_leaves_no_trace(rule):
    override, _, names = RULES[rule]
    torch.manual_seed(0)
    model = Classifier(names[-1]).double().train()
    x = torch.rand(model.block.shape, dtype=torch.float64)
    data = x, torch.arange(len(x))
    attack = MIFGSM(eps=0.1, step=0.05, steps=2, early_stop=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = evaluate(model, data, attack).to_dict()
    generator = torch.get_rng_state()
    with override.attach(model):
        evaluate(model, data, attack)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    after = evaluate(model, data, attack).to_dict()
    assert {**after, "seconds": 0} == {**plain, "seconds": 0}
