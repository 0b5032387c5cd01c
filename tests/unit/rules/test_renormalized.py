"""Renormalized residual branches equal the rule of Guo et al. written out block by block."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import BackpassError, LinBP
from support.resnets import BasicBlock, PreActivationBlock, TinyResNet


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = TinyResNet().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def x():
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def input_gradient(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return gradient, out.detach()


def vjp(function, z, g):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(function(z), z, g)[0]


def block_gradient(block, z, g):
    """J_skip^T g + l |n| / |l|, with n and l from two separate graphs of the branch."""
    plain = vjp(block.branch, z, g)
    with LinBP().attach(block.branch_module):
        linear = vjp(block.branch_module, z, g)
    scale = plain.flatten(1).norm(dim=1) / linear.flatten(1).norm(dim=1)
    skip = getattr(block, "downsample", None)
    return (g if skip is None else vjp(skip, z, g)) + linear * scale.view(-1, 1, 1, 1)


class Branch(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, z):
        return self.block.branch(z)


def by_hand(net, x, blocks):
    """The gradient of |f(x)|^2, with the named blocks by Guo et al.'s rule and everything else plain."""
    zs = [F.relu(net.stem(x))]
    layers = [net.layer1, net.layer2, net.layer3]
    for layer in layers:
        zs.append(layer(zs[-1]))
    g = vjp(lambda z: net.fc(z.mean((2, 3))).square().sum(), zs[-1], None)
    for name, layer, z, after in zip(["layer3", "layer2", "layer1"], layers[::-1], zs[-2::-1], zs[:0:-1], strict=True):
        if name not in blocks:
            g = vjp(layer, z, g)
            continue
        object.__setattr__(layer, "branch_module", Branch(layer))
        masked = g * (after > 0) if isinstance(layer, BasicBlock) else g
        g = block_gradient(layer, z, masked)
    return vjp(lambda x: F.relu(net.stem(x)), x, g)


@pytest.mark.parametrize(
    ("start", "blocks"), [("layer3", {"layer3"}), ("layer2", {"layer2", "layer3"}), (1, {"layer1", "layer2", "layer3"})]
)
def test_the_gradient_equals_the_rule_by_hand(net, x, start, blocks):
    plain = net(x)
    with LinBP(start=start, residual="renormalized").attach(net) as attached:
        gradient, out = input_gradient(net, x)
    assert torch.equal(out, plain)
    assert torch.allclose(gradient, by_hand(net, x, blocks), rtol=0, atol=1e-12)
    assert {site.module.split(".")[0] for site in attached.sites} == blocks


def test_the_activation_after_the_sum_is_never_linear(net, x):
    with LinBP(residual="renormalized").attach(net) as attached:
        net(x)
    taken = [(site.module, site.call) for site in attached.sites]
    assert taken == [("relu", 0), ("layer1.relu", 0), ("layer2.relu", 0), ("layer3", 0), ("layer3", 1)]


def test_a_branch_without_linear_sites_keeps_the_plain_gradient(net, x):
    with LinBP(start=1, where=lambda site: site.module == "layer1.relu", residual="renormalized").attach(net):
        gradient, _ = input_gradient(net, x)
    assert torch.allclose(gradient, by_hand(net, x, {"layer1"}), rtol=0, atol=1e-12)


def test_weights_receive_the_linear_gradient_once(net, x):
    # With one linear block, nothing below the block's own weights is rescaled.
    def weight_gradient(residual):
        net.zero_grad()
        with LinBP(start="layer3", residual=residual).attach(net):
            net(x).square().sum().backward()
        return {k: p.grad.clone() for k, p in net.layer3.named_parameters()}

    renormalized, plain = weight_gradient("renormalized"), weight_gradient("plain")
    assert all(torch.allclose(renormalized[k], plain[k], rtol=0, atol=1e-12) for k in plain)


def test_running_statistics_move_once_in_training(net, x):
    net.train()
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    twin = TinyResNet().double()
    twin.load_state_dict(expected)
    twin.train()(x)
    with LinBP(residual="renormalized").attach(net):
        net(x)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in net.state_dict().items())


def test_active_dropout_scales_both_ways_through_the_branch_alike(net, x):
    class Dropped(nn.Module):
        kept = None

        def forward(self, z):
            if self.training:
                self.kept = F.dropout(torch.ones_like(z), 0.5)
            return z * self.kept

    dropped = Dropped()
    net.layer3.conv2 = nn.Sequential(dropped, net.layer3.conv2)
    dropped.train()
    with LinBP(start="layer3", residual="renormalized").attach(net):
        gradient, _ = input_gradient(net, x)
    dropped.eval()
    assert torch.allclose(gradient, by_hand(net, x, {"layer3"}), rtol=0, atol=1e-12)


def test_a_network_without_residual_blocks_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with LinBP(residual="renormalized").attach(model), pytest.raises(BackpassError, match="no residual block"):
        model(torch.randn(2, 4))


def test_a_scaled_skip_connection_is_one_too(net, x):
    class Scaled(PreActivationBlock):
        def forward(self, z):
            return (2 * z) + self.branch(z)

    net.layer3 = Scaled(8).double().eval()
    net.layer3.downsample = None
    with LinBP(start="layer3", residual="renormalized").attach(net) as attached:
        gradient, _ = input_gradient(net, x)
    assert {site.module for site in attached.sites} == {"layer3"}
    net.layer3.downsample = lambda z: 2 * z
    assert torch.allclose(gradient, by_hand(net, x, {"layer3"}), rtol=0, atol=1e-12)


def test_a_vanishing_branch_gradient_gives_no_nan(net, x):
    with torch.no_grad():
        net.layer3.conv2.weight.zero_()
    with LinBP(start="layer3", residual="renormalized").attach(net):
        gradient, _ = input_gradient(net, x)
    assert gradient.isfinite().all()


def test_under_no_grad_the_forward_is_plain(net, x):
    with torch.no_grad(), LinBP(residual="renormalized").attach(net):
        out = net(x)
    assert torch.equal(out, net(x))
