"""From what a user names to a network: the lab's, or a user's own module."""

import sys

import pytest
from torch import nn

from backpass.errors import BackpassError, UnknownNameError
from backpass.models.lookup import find, parse_shape


def test_a_network_of_the_lab_comes_with_its_shape():
    model, shape = find("lenet5:activation=tanh")
    assert shape == (1, 28, 28)
    assert isinstance(model.get_submodule("act1"), nn.Tanh)
    assert find("mlp", shape=(3, 5, 5), classes=4)[1] == (3, 5, 5)


def test_a_misspelt_network_with_options_is_not_taken_for_a_users_module():
    with pytest.raises(UnknownNameError, match="Did you mean 'resnet50'"):
        find("resnet5O:activation=silu")


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


def test_a_file_of_the_current_folder_hides_no_package(tmp_path, monkeypatch):
    (tmp_path / "my_net_beside.py").write_text("from torch import nn\nimport this\ndef make():\n    return nn.Tanh()\n")
    for name in ("jinja2", "this"):  # `this` is of Python itself, and not imported yet
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert isinstance(find("my_net_beside:make")[0], nn.Tanh)
    with pytest.raises(BackpassError, match=r"jinja2.py has the name of another module, .*: rename it"):
        find("jinja2:Environment")


@pytest.mark.parametrize("text", ["3x32x16", "3,32,16", "3X32x16"])
def test_a_shape_is_read_from_words(text):
    assert parse_shape(text) == (3, 32, 16)


@pytest.mark.parametrize("text", ["", "3x", "3x0x2", "-1", "big"])
def test_no_other_shape_is_read(text):
    with pytest.raises(BackpassError, match="as in 3x224x224"):
        parse_shape(text)
