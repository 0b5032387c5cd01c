"""Networks of other libraries by name: a real one of timm from the command line, and what is missing by name."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from backpass.data import load_data
from backpass.errors import BackpassError
from backpass.lab.subjects import load_subject
from backpass.models import libraries
from support.command_line import run
from support.torchvision_operators import define_missing_operators


class Library:
    """Stands for timm, torchvision.models and robustbench.utils."""

    @staticmethod
    def create_model(name, pretrained):
        if name != "net":
            raise RuntimeError(f"Unknown model ({name})")
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        torch.nn.init.constant_(model[1].bias, float(pretrained))
        return model

    @staticmethod
    def resolve_model_data_config(model):
        return {"mean": (0.5,), "std": (0.25,), "input_size": (1, 8, 8)}

    @staticmethod
    def load_model(model_name, dataset, threat_model):
        assert (dataset, threat_model) == ("digits", "L2")
        return Library.create_model(model_name, True)


def test_networks_of_other_libraries_by_name(monkeypatch):
    cpu = torch.device("cpu")
    for name in ("timm", "timm.data", "robustbench", "robustbench.utils"):
        monkeypatch.setitem(sys.modules, name, Library)
    data = load_data("digits")
    subject = load_subject("timm:net", None, device=cpu, data=data)
    x = data.images.x[:3]
    torch.testing.assert_close(subject.model(x), subject.network((x - 0.5) / 0.25))
    assert subject.weights == "those of timm"
    assert subject.network[1].bias[0].item() == 1
    own = load_subject("robustbench:net,threat=L2", None, device=cpu, data=data)
    torch.testing.assert_close(own.model(x), own.network(x))
    with pytest.raises(BackpassError, match=r"timm does not give 'nett': RuntimeError: Unknown model \(nett\)"):
        load_subject("timm:nett", None, device=cpu, data=data)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackpassError, match="needs 'timm', which cannot be imported"):
        load_subject("timm:net", None, device=cpu, data=data)


IMPORT_ERRORS = {
    "missing": ModuleNotFoundError("No module named 'robustbench'"),
    "built for another torch": RuntimeError("operator torchvision::nms does not exist"),
    "a library of the system is missing": OSError("libcudart.so: cannot open shared object file\nmore"),
}


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "robustbench:Standard"])
@pytest.mark.parametrize("error", IMPORT_ERRORS.values(), ids=IMPORT_ERRORS)
def test_a_library_that_cannot_be_imported_says_why(name, error, monkeypatch, tmp_path):
    def fail(module):
        raise error

    monkeypatch.setattr(libraries, "import_module", fail)
    refused = run("attack", "--model", name, "--data", "digits", "--eps", "0.1", "--out", str(tmp_path))
    assert isinstance(refused.exception, BackpassError)
    first = str(error).splitlines()[0]
    message = str(refused.exception)
    assert message.startswith(f"'{name}' needs '{name.split(':')[0]}', which cannot be imported: ")
    assert f"{first}. Install it, and what it needs, in versions that fit your torch." in message


def test_a_network_of_timm_with_weights_from_a_file(tmp_path):
    define_missing_operators()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "net.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    x = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    predicted = network((x - mean) / std).argmax(1)
    classes = sorted({0, 1, *predicted.tolist()})  # some without an image
    for label in classes:
        (tmp_path / "images" / f"{label:04d}").mkdir(parents=True)
    for row, label in enumerate(predicted.tolist()):
        Image.fromarray(pixels[row]).save(tmp_path / "images" / f"{label:04d}" / f"{row}.png")
    (tmp_path / "classes.txt").write_text("".join(f"{label}\n" for label in classes))
    ended = run(
        "attack",
        *("--model", "timm:test_resnet", "--weights", str(tmp_path / "net.pt"), "--data", str(tmp_path / "images")),
        *("--classes", str(tmp_path / "classes.txt"), "--eps", "8/255", "--steps", "3", "--curves", "0"),
        *("--out", str(tmp_path / "out")),
    )
    assert ended.exit_code == 0, ended.exception
    numbers = json.loads((tmp_path / "out" / "result.json").read_text())["numbers"]["rules"]["bp"]
    assert numbers["clean_accuracy"]["hits"] == 4
