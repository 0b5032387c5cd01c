"""Every test here runs in a user's folder, with a network of theirs and its weights."""

import importlib
import sys

import pytest
import torch

from support.users_network import NETWORK, train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with `mymodel.py` and weights for its two networks."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mymodel.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    module = importlib.import_module("mymodel")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(train(module.Net(), 0).state_dict(), folder / "net.pt")
        torch.save({"state_dict": train(module.wide(), 1).state_dict()}, folder / "wide.pt")
    yield folder
    sys.path.remove(str(folder))
    del sys.modules["mymodel"]


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    monkeypatch.setenv("BACKPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BACKPASS_DATA", raising=False)
    sys.modules["mymodel"].Net.calls = 0
