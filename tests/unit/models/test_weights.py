"""Weights from files: every usual form is read, nothing is run, and what does not fit is named."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from backpass.data.normalisation import Normalisation
from backpass.errors import BackpassError
from backpass.models import build
from backpass.models.weights import load_weights, save_weights, weights_hash


def net(width=3):
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.BatchNorm1d(width), nn.Linear(width, 2))


@pytest.mark.parametrize("form", ["safetensors", "bare", "state_dict", "model", "ddp", "compiled"])
def test_every_usual_form_is_read(tmp_path, form):
    torch.manual_seed(0)
    source, target = net(), net()
    state = source.state_dict()
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pt")
    prefix = {"ddp": "module.", "compiled": "_orig_mod."}.get(form, "")
    if form == "safetensors":
        save_file(state, path)
    elif form in ("state_dict", "model"):
        torch.save({form: state, "epoch": 3}, path)
    else:
        torch.save({prefix + key: value for key, value in state.items()}, path)
    assert weights_hash(target) != weights_hash(source)
    load_weights(target, path)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), target.state_dict().values(), strict=True))
    assert weights_hash(target) == weights_hash(source)


class Payload:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_a_file_never_runs_code(tmp_path, capsys):
    path = tmp_path / "net.pt"
    path.write_bytes(pickle.dumps({"state_dict": Payload()}, protocol=2))
    with pytest.raises(BackpassError, match="without running code"):
        load_weights(net(), path)
    torch.save(net(), path)
    with pytest.raises(BackpassError, match="without running code"):
        load_weights(net(), path)
    assert capsys.readouterr().out == ""


def test_weights_of_another_model_are_refused_whole_and_the_first_differences_named(tmp_path):
    model = net()
    before = weights_hash(model)
    torch.save(net(4).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(BackpassError, match=r"0.weight is 4x2 in the file and 3x2 in the model.* and \d more"):
        load_weights(model, tmp_path / "wide.pt")
    torch.save({f"body.{key}": value for key, value in net().state_dict().items()}, tmp_path / "other.pt")
    with pytest.raises(BackpassError, match=r"lacks 0.weight, 0.bias, 2.weight and 6 more; the model lacks body.0"):
        load_weights(model, tmp_path / "other.pt")
    assert weights_hash(model) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pt", None, "there is no file of weights"),
        ("cut.safetensors", b"\x10", "cannot be read as safetensors"),
        ("empty.pt", b"", "cannot be read as weights"),
        ("list.pt", [1, 2], "holds list, not a state dict"),
        ("numbers.pt", {"lr": 0.1}, "'?lr'? is something else"),
        ("nothing.pt", {}, "not a state dict"),
    ],
)
def test_what_is_no_file_of_weights_is_told(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(BackpassError, match=message):
        load_weights(net(), path)


def test_a_cut_off_checkpoint_is_told(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BackpassError, match="cut off"):
        load_weights(net(), path)


def test_saved_weights_come_back_to_the_bit_also_those_of_a_compiled_model(tmp_path):
    source, target = net(), net()
    path = save_weights(torch.compile(source, backend="eager"), tmp_path / "net.safetensors")
    load_weights(target, path)
    assert weights_hash(target) == weights_hash(source)
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_two_names_of_one_tensor_are_saved_as_two(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    load_weights(
        copy := nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), save_weights(tied, tmp_path / "t.safetensors")
    )
    assert torch.equal(copy[0].weight, copy[1].weight)


def test_weights_of_another_library_leave_a_lab_networks_normalisation(tmp_path, caplog):
    model, other = build("mlp", normalisation=Normalisation((0.25,), (0.5,))), build("mlp", seed=1)
    bare = {key: value for key, value in other.state_dict().items() if not key.startswith("normalize.")}
    torch.save(bare, tmp_path / "bare.pt")
    load_weights(model, tmp_path / "bare.pt")
    assert torch.equal(model.linear2.weight, other.linear2.weight)
    assert model.normalize.mean.item() == 0.25
    assert "keeps its own: Normalize(mean=[0.25], std=[0.5])" in caplog.text
    torch.save(other.state_dict(), tmp_path / "whole.pt")
    load_weights(model, tmp_path / "whole.pt")
    assert model.normalize.mean.item() == 0
