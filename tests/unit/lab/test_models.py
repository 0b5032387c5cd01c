"""Networks by name: shapes, seeds, and names that a user may get wrong."""

import pytest
import torch
from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.models import INPUT_SHAPES, MODELS, build
from backpass.lab.models.lookup import find, parse_shape


@pytest.mark.parametrize("name", MODELS)
def test_images_go_in_and_logits_come_out(name):
    assert build(name)(torch.rand(5, *INPUT_SHAPES[name])).shape == (5, 10)


@pytest.mark.parametrize("name", MODELS)
def test_weights_depend_on_the_seed_alone(name):
    before = torch.get_rng_state()
    one, same, other = (nn.utils.parameters_to_vector(build(name, seed=s).parameters()) for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_he_normal():
    weight = build("mlp", widths=(400, 1000, 10)).get_submodule("linear1").weight
    assert weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.01)


def test_an_mlp_has_the_widths_and_the_activation_that_were_asked_for():
    model = build("mlp", widths=(12, 7, 3), activation="silu")
    linear = [module for module in model if isinstance(module, nn.Linear)]
    assert [tuple(module.weight.shape) for module in linear] == [(7, 12), (3, 7)]
    assert [type(module) for module in model if not isinstance(module, nn.Linear)] == [nn.Flatten, nn.SiLU]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("cmn"), "unknown model 'cmn'. Did you mean 'cnn'"),
        (lambda: build("mlp", activation="rely"), "Did you mean 'relu'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(call, message):
    with pytest.raises(UnknownNameError, match=message):
        call()


def test_an_mlp_of_one_width_is_refused():
    with pytest.raises(BackpassError, match="at least an input and an output"):
        build("mlp", widths=(10,))


def test_a_users_own_network_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_nets_for_lookup.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Tanh()\nready = nn.ReLU()\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert isinstance(find("my_nets_for_lookup:make")[0], nn.Tanh)
    assert isinstance(find("my_nets_for_lookup:ready")[0], nn.ReLU)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'make'\? Known: make, ready\."):
        find("my_nets_for_lookup:made")
    with pytest.raises(BackpassError, match=r"must give an nn\.Module, got int"):
        find("my_nets_for_lookup:number")
    with pytest.raises(BackpassError, match="without arguments"):
        find("torch.nn:Linear")
    with pytest.raises(BackpassError, match="cannot import 'no_such_module'"):
        find("no_such_module:net")


@pytest.mark.parametrize("text", ["3x32x16", "3,32,16", "3X32x16"])
def test_a_shape_is_read_from_words(text):
    assert parse_shape(text) == (3, 32, 16)


@pytest.mark.parametrize("text", ["", "3x", "3x0x2", "-1", "big"])
def test_no_other_shape_is_read(text):
    with pytest.raises(BackpassError, match="as in 3x224x224"):
        parse_shape(text)
