"""Networks by name: shapes, classes, seeds, options, normalisation."""

import pytest
import torch
from torch import nn

from backpass.data.normalisation import Normalisation
from backpass.errors import BackpassError, UnknownNameError
from backpass.models import INPUT_SHAPES, MODELS, Normalize, build

SMALL = ("cnn", "lenet5", "mlp", "resnet", "wrn:depth=10,width=1")


@pytest.mark.parametrize("name", SMALL)
def test_shape_and_classes_come_from_the_data(name):
    assert build(name, shape=(2, 12, 20), classes=7)(torch.rand(5, 2, 12, 20)).shape == (5, 7)


@pytest.mark.parametrize("name", [*SMALL, "mobilenetv2"])
def test_weights_depend_on_the_seed_alone(name):
    before = torch.get_rng_state()
    one, same, other = (nn.utils.parameters_to_vector(build(name, seed=s).parameters()) for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_he_normal():
    weight = build("mlp", shape=(1, 20, 20), widths=(1000,)).get_submodule("linear1").weight
    assert weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.01)
    # The ResNet's paper counts the fan out, 9 * 64 of the 3x3 convolutions of layer1.
    weight = build("resnet18").get_submodule("layer1.1.conv2").weight
    assert weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)


def test_an_mlp_has_the_widths_and_the_activation_that_were_asked_for():
    for model in (
        build("mlp", shape=(1, 3, 4), widths=(7, 5), activation="silu"),
        build("mlp:widths=7-5,activation=silu", shape=(1, 3, 4)),
    ):
        linear = [module for module in model if isinstance(module, nn.Linear)]
        assert [tuple(module.weight.shape) for module in linear] == [(7, 12), (5, 7), (10, 5)]
        others = [type(module) for module in model if not isinstance(module, nn.Linear)]
        assert others == [Normalize, nn.Flatten, nn.SiLU, nn.SiLU]


@pytest.mark.parametrize("name", ["mlp:widths=7-5", "cnn"])
def test_batch_normalisation_stands_before_every_activation(name):
    plain, normalised = build(name), build(f"{name}:batch_norm=true" if ":" not in name else f"{name},batch_norm=true")
    kinds = [type(module) for module in normalised]
    norms = [place for place, kind in enumerate(kinds) if kind in (nn.BatchNorm1d, nn.BatchNorm2d)]
    assert [place + 1 for place in norms] == [place for place, kind in enumerate(kinds) if kind is nn.ReLU]
    assert [kind for place, kind in enumerate(kinds) if place not in norms] == [type(module) for module in plain]
    weights = dict(plain.named_parameters())
    assert all(torch.equal(weights[n], p) for n, p in normalised.named_parameters() if not n.startswith("bn"))


@pytest.mark.parametrize("name", MODELS)
def test_another_activation_stands_everywhere(name):
    model = build(name, activation="mish")
    kinds = {type(module) for module in model.modules()}
    assert nn.Mish in kinds
    assert not kinds & {nn.ReLU, nn.ReLU6}


def test_a_resnet_has_the_blocks_and_the_width_that_were_asked_for():
    """He et al., Section 4.2: n blocks in each of three stages make 6 n + 2 layers with weights, shortcuts apart."""
    model = build("resnet:blocks=3-3-3,width=16")
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    assert len(layers) == 20
    assert model.get_submodule("layer3.2.conv2").weight.shape == (64, 64, 3, 3)
    assert build("resnet:blocks=2-1,bottleneck=true,width=8").get_submodule("layer2.0.conv3").weight.shape[:2] == (
        64,
        16,
    )


def test_images_are_normalised_inside_and_weights_carry_the_normalisation():
    cifar = Normalisation((0.49, 0.48, 0.45), (0.20, 0.19, 0.21))
    model, plain = build("resnet", normalisation=cifar).eval(), build("resnet").eval()
    x = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in ((0.49, 0.48, 0.45), (0.20, 0.19, 0.21)))
    torch.testing.assert_close(model(x), plain((x - mean) / std))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))
    assert "mean=[0.49" in repr(model)


def test_a_normalisation_may_be_one_for_all_channels_and_must_fit():
    model = build("resnet", normalisation=Normalisation((0.5,), (0.25,)))
    assert torch.equal(model.normalize(torch.full((1, 3, 2, 2), 0.75)), torch.ones(1, 3, 2, 2))
    with pytest.raises(BackpassError, match="the images have 1 channels, the normalisation 3"):
        build("mlp", normalisation=Normalisation((0.1, 0.2, 0.3), (1.0, 1.0, 1.0)))


def test_without_a_normalisation_nothing_is_changed():
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(Normalize(3)(x), x)
    assert Normalize(3).changes_nothing


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cmn", {}, "unknown model 'cmn'. Did you mean 'cnn'"),
        ("resnt18:activation=silu", {}, "unknown model 'resnt18'. Did you mean 'resnet18'"),
        ("mlp", {"activation": "rely"}, "Did you mean 'relu'"),
        ("mlp:activation=rely", {}, "Did you mean 'relu'"),
        ("mlp:width=30", {}, "unknown option of model 'mlp' 'width'. Did you mean 'widths'"),
        ("resnet18", {"width": 30}, "unknown option of model 'resnet18' 'width'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, options, message):
    with pytest.raises(UnknownNameError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp:widths=400-big", "widths of 'mlp:widths=400-big' must be whole numbers as in 400-200-100, got '400-big'"),
        ("mlp:widths=0", "at least one hidden width, all positive"),
        ("mlp:30", "cannot read '30' in 'mlp:30': expected option=value"),
        ("cnn:width=8,width=9", "option 'width' stands twice"),
        ("cnn:width=2.5", "must be a whole number, got '2.5'"),
        ("resnet:bottleneck=perhaps", "must be true or false"),
        ("resnet:blocks=1-0", "at least one stage, blocks in each"),
        ("wrn:depth=20", "depth 10, 16, 22, 28"),
    ],
)
def test_a_text_form_that_cannot_be_meant_is_told(name, message):
    with pytest.raises(BackpassError, match=message):
        build(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vgg16", "shape": (3, 28, 28)}, "vgg16 takes images of at least 32x32 pixels, got 28x28"),
        ({"name": "lenet5", "shape": (1, 8, 8)}, "at least 12x12"),
        ({"name": "mlp", "shape": (28, 28)}, "channels, height and width"),
        ({"name": "mlp", "classes": 0}, "at least 1, got 0"),
    ],
)
def test_data_that_a_network_cannot_take_is_told(options, message):
    with pytest.raises(BackpassError, match=message):
        build(**options)


def test_default_shapes_are_known_for_every_network():
    assert set(INPUT_SHAPES) == set(MODELS)
    assert INPUT_SHAPES["lenet5"] == (1, 28, 28)
    assert INPUT_SHAPES["resnet50"] == (3, 32, 32)
