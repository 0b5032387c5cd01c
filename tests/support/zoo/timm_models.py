"""Networks of timm. The counts are read off their code; E and D stand for stages and depths there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from support.straight_through import straight_through
from support.torchvision_operators import define_missing_operators
from support.zoo.architecture import Architecture

__all__ = ["TIMM"]


def timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        define_missing_operators()
        from timm import create_model

        return create_model(name, **{"num_classes": 7, **settings})

    return build


def mixer() -> nn.Module:
    define_missing_operators()
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=7, img_size=32, patch_size=8, num_blocks=3, embed_dim=24)


def caformer() -> nn.Module:
    define_missing_operators()
    from timm.models.metaformer import MetaFormer, SepConv

    return MetaFormer(
        num_classes=7, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), token_mixers=SepConv, use_mlp_head=False
    )


def star_relus_rewritten(model: nn.Module, start: int, stop: int | None) -> Callable[[Tensor], Tensor]:
    """The network with ``scale * s(x) + bias`` in its StarReLUs, s = relu^2 straight-through from ``start``."""

    def rewritten(x: Tensor) -> Tensor:
        numbers = itertools.count()

        def forward(star: Any, z: Tensor) -> Tensor:
            selected = start <= next(numbers) < (math.inf if stop is None else stop)
            square = straight_through(z, squared_relu) if selected else squared_relu(z)
            return star.scale * square + star.bias

        with ExitStack() as stack:
            for module in model.modules():
                if type(module).__name__ == "StarReLU":
                    stack.enter_context(patch.object(module, "forward", partial(forward, module)))
            return model(x)

    return rewritten


def squared_relu(x: Tensor) -> Tensor:
    return x.relu() ** 2


def narrow_vgg() -> nn.Module:
    define_missing_operators()
    from timm.models.vgg import VGG

    return VGG([8, "M", 16, "M", 16, 16, "M", 32, 32, "M", 32, 32, "M"], num_classes=7, mlp_ratio=0.01)


def timm_class_act(name: str) -> Callable[[], nn.Module]:
    """A ResNet whose activation is a class of timm that `create_model` no longer chooses by itself."""

    def build() -> nn.Module:
        define_missing_operators()
        from timm.layers import activations, activations_me

        kind = getattr(activations, name, None) or getattr(activations_me, name)
        return timm("resnet18", layers=[1, 1, 1, 1], channels=NARROW, act_layer=kind)()

    return build


SE = ("*.se.gate",)
NARROW = (16, 32, 48, 64)
ATTENTION = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
ONE_EACH = {"depths": (1, 1, 1, 1)}

TIMM: dict[str, Architecture] = {
    # The stem, and two or three for each block.
    "resnet18": Architecture(build=timm("resnet18", channels=NARROW), sites=1 + 8 * 2),
    "resnext50": Architecture(build=timm("resnext50_32x4d", layers=[1, 1, 2, 1], channels=NARROW), sites=1 + 5 * 3),
    "seresnet": Architecture(
        # One more in each squeeze-and-excitation, whose sigmoid is a gate.
        build=timm("seresnet18", layers=[1, 1, 1, 1], channels=NARROW),
        sites=1 + 4 * 3,
        gates=SE,
    ),
    "regnetx": Architecture(build=timm("regnetx_002"), sites=1 + 13 * 3),
    "regnety": Architecture(build=timm("regnety_002"), sites=1 + 13 * 4, gates=SE),
    # Stem and head; a first block with two SiLUs and one in its squeeze-and-excitation; 15 blocks with three.
    "efficientnet_b0": Architecture(build=timm("efficientnet_b0"), sites=2 + 2 + 15 * 3, gates=SE),
    # Stem, head and the last convolution; 6 + 2 + 2 blocks: two each (the first one), and one in each of nine
    # squeeze-and-excitations, whose hardsigmoid is a gate.
    "mobilenetv3_small": Architecture(build=timm("mobilenetv3_small_050"), sites=33, gates=SE),
    # MBConv without squeeze-and-excitation: depthwise-separable blocks with one, inverted residuals with two.
    "mobilenetv2": Architecture(build=timm("mobilenetv2_035"), sites=2 + 1 + 16 * 2),
    "convnext": Architecture(build=timm("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), sites=5),
    "swin": Architecture(
        build=timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(2, 1, 1)),
        sites=4,
    ),
    # The stem; four blocks of an MBConv with three (one in its squeeze-and-excitation) and two MLPs after attention.
    "maxvit": Architecture(build=timm("test_maxvit", img_size=64), sites=1 + 4 * 5, shape=(2, 3, 64, 64), gates=SE),
    # The stem; two MBConv blocks with three; three transformer blocks.
    "coatnet": Architecture(
        build=timm("test_coatnet", img_size=64), sites=1 + 2 * 3 + 3, shape=(2, 3, 64, 64), gates=SE
    ),
    "vit": Architecture(build=timm("vit_tiny_patch16_224", **ATTENTION), sites=3),
    "deit": Architecture(build=timm("deit_tiny_distilled_patch16_224", **ATTENTION), sites=3),
    "beit": Architecture(build=timm("beit_base_patch16_224", **ATTENTION), sites=3),
    "mixer": Architecture(
        # An MLP over the tokens and one over the channels in each block.
        build=mixer,
        sites=3 * 2,
    ),
    # A stem with three; four blocks with four, and one in the squeeze-and-excitation of each; the last one.
    "nfnet": Architecture(build=timm("test_nfnet"), sites=3 + 4 * 5 + 1, gates=("*.gate",)),
    # The same with activations that are scaled in a module of their own, which is one activation.
    "nfnet_scaled": Architecture(
        build=timm("test_nfnet", act_layer="gelu", gamma_in_act=True),
        sites=3 + 4 * 5 + 1,
        gates=("*.gate",),
        elementwise=("GammaAct",),
    ),
    "vgg11": Architecture(build=narrow_vgg, sites=8 + 2),
    "densenet121": Architecture(build=timm("densenet121", growth_rate=8), sites=121),
    "inception_v3": Architecture(build=timm("inception_v3"), sites=94, shape=(1, 3, 75, 75), slow=True),
    # Stem 2 and stage 1 with 3; transitions 2, 1, 1; stages 2 to 4 with blocks 8, 12, 16 and fusions 2, 4, 8;
    # the head with four bottlenecks 12, three downsamplings and the last layer.
    "hrnet": Architecture(build=timm("hrnet_w18_small"), sites=5 + 4 + 36 + 14 + 12 + 3 + 1, slow=True),
    "eva02": Architecture(build=timm("eva02_tiny_patch14_224", **{**ATTENTION, "embed_dim": 24}), sites=3),
    # Activations written as autograd functions or by hand, in modules of their own: one site each.
    "hard_mish": Architecture(
        build=timm("resnet18", layers=[1, 1, 1, 1], channels=NARROW, act_layer="hard_mish"), sites=1 + 4 * 2
    ),
    "swish_by_hand": Architecture(build=timm_class_act("Swish"), sites=1 + 4 * 2),
    "vit_quick_gelu": Architecture(build=timm("vit_tiny_patch16_224", act_layer="quick_gelu", **ATTENTION), sites=3),
    # Global response normalisation after the GELU.
    "convnextv2": Architecture(build=timm("convnextv2_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), sites=5),
    # Stem, head, and a gated CNN in each of six blocks: act(g) * x, an ordinary site.
    "mambaout": Architecture(build=timm("test_mambaout"), sites=1 + 1 + 6),
    # StarReLU, scale * relu(x) ** 2 + bias with learned scale and bias: the squared ReLU is the activation. One in each
    # of four separable convolutions, and in each of four MLPs.
    "caformer": Architecture(build=caformer, sites=4 + 4, shape=(2, 3, 64, 64), reference=star_relus_rewritten),
    # Stem, two in the head; two in the first half of each of 16 blocks; one in each of 7 squeeze-and-excitations.
    "ghostnet": Architecture(build=timm("ghostnet_050"), sites=3 + 16 * 2 + 7, gates=SE),
    # The same, and a gate in all but two blocks: the sigmoid of an image of half the size, which is then enlarged.
    "ghostnetv2": Architecture(
        build=timm("ghostnetv2_100"), sites=3 + 16 * 2 + 7, gates=(*SE, "*.gate_fn"), shape=(2, 3, 64, 64), slow=True
    ),
    # Stem; three in each of eight blocks, and one in its squeeze-and-excitation.
    "legacy_seresnet": Architecture(
        build=timm("legacy_seresnet18"), sites=1 + 8 * 4, gates=("*.se_module.sigmoid",), slow=True
    ),
    # Two in the stem; two blocks with one in the local interaction and one in the MLP; two class-attention blocks.
    "xcit": Architecture(
        build=timm("xcit_nano_12_p8_224", img_size=32, embed_dim=16, depth=2, num_heads=2), sites=2 + 2 * 2 + 2
    ),
}
