"""The papers' networks: parameters counted by hand, sites, and that they compute and learn anywhere."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from backpass import list_sites
from backpass.models import INPUT_SHAPES, MODELS, build


def conv(fan_in, out, size, bias=0):
    return size * size * fan_in * out + bias * out


def bn(channels):
    return 2 * channels


def linear(fan_in, out):
    return fan_in * out + out


def by_hand_mlp(*widths):
    return sum(linear(a, b) for a, b in itertools.pairwise(widths))


def by_hand_vgg16():
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    features = sum(conv(a, b, 3, bias=1) + bn(b) for a, b in itertools.pairwise(widths))
    return features + linear(512, 4096) + linear(4096, 4096) + linear(4096, 10)


def by_hand_resnet18():
    total = conv(3, 64, 3) + bn(64)
    before = 64
    for width in (64, 128, 256, 512):
        total += conv(before, width, 3) + 3 * conv(width, width, 3) + 4 * bn(width)
        total += (conv(before, width, 1) + bn(width)) if before != width else 0
        before = width
    return total + linear(512, 10)


def by_hand_resnet50():
    total = conv(3, 64, 3) + bn(64)
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        inner = conv(width, width, 3) + conv(width, 4 * width, 1) + 2 * bn(width) + bn(4 * width)
        total += blocks * inner + conv(before, width, 1) + (blocks - 1) * conv(4 * width, width, 1)
        total += conv(before, 4 * width, 1) + bn(4 * width)
        before = 4 * width
    return total + linear(2048, 10)


def by_hand_densenet161():
    total, channels = conv(3, 96, 3) + bn(96), 96
    for number, layers in enumerate((6, 12, 36, 24)):
        for _ in range(layers):
            total += bn(channels) + conv(channels, 192, 1) + bn(192) + conv(192, 48, 3)
            channels += 48
        if number < 3:
            total += bn(channels) + conv(channels, channels // 2, 1)
            channels //= 2
    return total + bn(channels) + linear(channels, 10)


def by_hand_mobilenetv2():
    total, channels = conv(3, 32, 3) + bn(32), 32
    for expansion, out, count in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(count):
            wide = expansion * channels
            total += (conv(channels, wide, 1) + bn(wide)) if expansion > 1 else 0
            total += 9 * wide + bn(wide) + conv(wide, out, 1) + bn(out)
            channels = out
    return total + conv(320, 1280, 1) + bn(1280) + linear(1280, 10)


def by_hand_wrn(depth, factor):
    total, before = conv(3, 16, 3), 16
    for width in (16 * factor, 32 * factor, 64 * factor):
        blocks = (depth - 4) // 6
        total += bn(before) + conv(before, width, 3) + conv(before, width, 1)
        total += blocks * (bn(width) + conv(width, width, 3)) + (blocks - 1) * (bn(width) + conv(width, width, 3))
        before = width
    return total + bn(before) + linear(before, 10)


COUNTS = {
    "mlp": (by_hand_mlp(64, 400, 200, 100, 10), 3),
    "lenet5": (conv(1, 6, 5, 1) + conv(6, 16, 5, 1) + by_hand_mlp(400, 120, 84, 10), 4),
    "cnn": (conv(1, 16, 3, 1) + conv(16, 16, 3, 1) + conv(16, 32, 3, 1) + by_hand_mlp(128, 64, 10), 4),
    "convnet": (conv(3, 16, 5, 1) + conv(16, 20, 5, 1) + conv(20, 20, 5, 1) + linear(20 * 8 * 8, 10), 3),
    "vgg16": (by_hand_vgg16(), 15),
    "resnet18": (by_hand_resnet18(), 17),
    "resnet50": (by_hand_resnet50(), 49),
    "densenet161": (by_hand_densenet161(), 161),
    "mobilenetv2": (by_hand_mobilenetv2(), 35),
    "wrn": (by_hand_wrn(16, 4), 13),
    "wrn-28-10": (by_hand_wrn(28, 10), 25),
}

PUBLISHED = {  # in millions, of the papers' networks for CIFAR-10
    "vgg16": 33.647,
    "resnet18": 11.174,
    "resnet50": 23.521,
    "densenet161": 26.483,
    "mobilenetv2": 2.237,
    "wrn-28-10": 36.479,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_activations_are_as_many_as_counted_by_hand(name):
    model, (parameters, sites) = build(name), COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list_sites(model, torch.rand(2, *INPUT_SHAPES[name]))) == sites


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    assert round(COUNTS[name][0] / 1e6, 3) == PUBLISHED[name]


def test_the_papers_mlp_on_mnist():
    model = build("mlp", shape=(1, 28, 28))
    assert sum(p.numel() for p in model.parameters()) == 785 * 400 + 401 * 200 + 201 * 100 + 101 * 10


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("vgg16", (64, 32, 32), (4096,)),
        ("resnet18", (64, 32, 32), (512, 2, 2)),
        ("resnet50", (64, 32, 32), (2048, 2, 2)),
        ("densenet161", (96, 32, 32), (2208, 2, 2)),
        ("mobilenetv2", (32, 32, 32), (1280, 4, 4)),
        ("wrn-28-10", (16, 32, 32), (640, 8, 8)),
        ("resnet", (16, 32, 32), (64, 8, 8)),
    ],
)
def test_of_a_32x32_image_is_left_what_the_variants_for_cifar10_leave(name, first, last):
    sites = list_sites(build(name).eval(), torch.rand(1, 3, 32, 32))
    assert (sites[0].shape[1:], sites[-1].shape[1:]) == (first, last)


def test_mobilenetv2_has_relu6():
    assert {site.function for site in list_sites(build("mobilenetv2"), torch.rand(2, 3, 32, 32))} == {"hardtanh"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_weight_gets_a_finite_gradient_in_either_memory_format(name, memory_format):
    model = build(name).to(memory_format=memory_format)
    x = torch.rand(2, *INPUT_SHAPES[name]).to(memory_format=memory_format)
    logits = model(x)
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    for parameter in filter(lambda one: one.requires_grad, model.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_images_below_32_pixels_are_padded_in_lenet5():
    """A 28x28 image gives what the 32x32 field with the image in its middle gives."""
    small, large = build("lenet5"), build("lenet5", shape=(1, 32, 32))
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(small(x), large(F.pad(x, (2, 2, 2, 2))))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet", "wrn:depth=10,width=1"])
def test_smaller_networks_compile_in_one_graph(name):
    torch.compiler.reset()
    model = build(name)
    x = torch.rand(3, *INPUT_SHAPES[name.partition(":")[0]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(x)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    (ours,) = torch.autograd.grad(compiled(x).sum(), [next(iter(model.parameters()))])
    (theirs,) = torch.autograd.grad(model(x).sum(), [next(iter(model.parameters()))])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
