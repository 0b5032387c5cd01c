"""The renormalized residual rule in MBConv, ConvNeXt, Swin and ViT blocks, against the rule written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backpass import LinBP
from support.residual import Block, Stage, guo_gradient
from support.straight_through import Rewritten, renormalized
from support.torchvision_operators import define_missing_operators
from support.zoo.timm_models import TIMM


def vit(model):
    def blocks(block):
        return [
            Block(lambda z: block.ls1(block.attn(block.norm1(z))), has_activation=False),
            Block(lambda z: block.ls2(block.mlp(block.norm2(z)))),
        ]

    return [
        Stage(lambda x: model.norm_pre(model._pos_embed(model.patch_embed(x)))),
        *[part for block in model.blocks for part in blocks(block)],
        Stage(lambda z: model.forward_head(model.norm(z))),
    ]


def swin(model):
    def blocks(block):
        return [
            Block(lambda z: block._attn(block.norm1(z)), has_activation=False),
            Block(lambda z: block.mlp(block.norm2(z.flatten(1, 2))).view_as(z)),
        ]

    stages = [Stage(model.patch_embed)]
    for layer in model.layers:
        stages += [Stage(layer.downsample), *[part for block in layer.blocks for part in blocks(block)]]
    return [*stages, Stage(lambda z: model.forward_head(model.norm(z)))]


def convnext(model):
    def branch(block):
        return lambda z: block.mlp(block.norm(block.conv_dw(z))) * block.gamma.view(1, -1, 1, 1)

    stages = [Stage(model.stem)]
    for stage in model.stages:
        stages += [Stage(stage.downsample), *[Block(branch(block)) for block in stage.blocks]]
    return [*stages, Stage(lambda z: model.forward_head(model.norm_pre(z)))]


def mbconv(model):
    def run(block):
        names = ["conv_pw", "bn1", "conv_dw", "bn2", "se", "conv_pwl", "bn3"]
        if not hasattr(block, "conv_pwl"):  # the depthwise-separable block at the front
            names = ["conv_dw", "bn1", "se", "conv_pw", "bn2"]
        parts = [getattr(block, name) for name in names]

        def chain(z):
            for part in parts:
                z = part(z)
            return z

        return Block(chain) if block.has_skip else Stage(chain)

    blocks = [run(block) for stage in model.blocks for block in stage]
    return [
        Stage(lambda x: model.bn1(model.conv_stem(x))),
        *blocks,
        Stage(lambda z: model.forward_head(model.bn2(model.conv_head(z)))),
    ]


class PostNorm(nn.Module):
    """norm(z + f(z)), as in the first transformers, and a projection beside the branch in the first block."""

    class Part(nn.Module):
        def __init__(self, width, out) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(width, 12), nn.Linear(12, out), nn.LayerNorm(out)
            self.project = nn.Linear(width, out) if width != out else nn.Identity()

        def branch(self, z):
            return self.down(F.gelu(self.up(z)))

        def forward(self, z):
            return self.norm(self.branch(z) + self.project(z))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = self.Part(5, 6), self.Part(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


def post_norm(model):
    parts = [Block(part.branch, skip=part.project, after=part.norm) for part in (model.first, model.second)]
    return [*parts, Stage(model.last)]


NETWORKS = {
    # With the last block that has an activation in its branch.
    "vit": (vit, "blocks.2"),
    "swin": (swin, "layers.2.blocks.0"),
    "convnext": (convnext, "stages.3.blocks.0"),
    "mobilenetv2": (mbconv, "blocks.5.2"),
    "efficientnet_b0": (mbconv, "blocks.5.3"),
}


@pytest.fixture(params=[*NETWORKS, "post_norm"])
def case(request):
    if request.param == "post_norm":
        torch.manual_seed(0)
        model = PostNorm().double()
        return model, torch.randn(3, 4, 5, dtype=torch.float64), post_norm(model), (), "second"
    define_missing_operators()
    pytest.importorskip("timm")
    architecture, (decompose, last) = TIMM[request.param], NETWORKS[request.param]
    model, given = architecture.make(torch.float64)
    return model, given["x"].detach(), decompose(model), architecture.gates, last


def input_gradient(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    return torch.autograd.grad(out.square().sum() / 2, x)[0], out.detach()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_the_stages_are_the_network(case):
    model, x, stages, *_ = case
    z = x
    for stage in stages:
        z = stage.run(z)
    assert relative(z, model(x)) < 1e-12


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.01])
def test_the_gradient_equals_the_rule_block_by_block(case, decay):
    model, x, stages, gates, _ = case
    plain = model(x)
    with LinBP(residual="renormalized", decay=decay).attach(model):
        found, out = input_gradient(model, x)
    assert torch.equal(out, plain)
    expected = guo_gradient(stages, x, Rewritten(model, 0, gates=gates).running, decay)
    assert relative(found, expected) < 1e-10


@pytest.mark.parametrize("start", [None, -1])
def test_each_activation_may_be_renormalized_by_itself(case, start):
    model, x, _, gates, _ = case
    counted = Rewritten(model, 0, gates=gates)
    counted(x)
    plain = model(x)
    with LinBP(residual="per_activation", start=start).attach(model):
        found, out = input_gradient(model, x)
    assert torch.equal(out, plain)
    first = 0 if start is None else counted.count - 1
    expected, _ = input_gradient(Rewritten(model, first, gates=gates, rewrite=renormalized), x)
    assert relative(found, expected) < 1e-10


def test_weights_of_a_branch_receive_the_linear_gradient(case):
    # The scale acts on what the block passes down; with one linear block nothing else changes in its own weights.
    model, x, _, _, last = case

    def gradients(residual):
        model.zero_grad()
        with LinBP(where=lambda site: site.inside(last), residual=residual).attach(model) as attached:
            model(x).square().sum().backward()
        assert attached.sites
        return {name: p.grad.clone() for name, p in model.get_submodule(last).named_parameters()}

    changed, linear = gradients("renormalized"), gradients("plain")
    if "norm1.weight" in linear:  # the attention of a transformer block stands before its activation
        changed, linear = ({k: v for k, v in found.items() if k.startswith("mlp")} for found in (changed, linear))
    assert all(relative(changed[name], linear[name]) < 1e-10 for name in linear)


def test_a_decay_without_renormalization_is_refused():
    with pytest.raises(ValueError, match="decay"):
        LinBP(residual="plain", decay=0.5)
