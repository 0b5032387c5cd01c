"""A user's own networks in a file of theirs, and the command line called as a user does."""

import json
import sys

import torch
import torch.nn.functional as F

from backpass.data import load_data

NETWORK = '''
import os, signal
import torch
from torch import nn

class Net(nn.Module):
    """A user's own network; the environment can make it die or be interrupted at a certain call."""
    calls = 0

    def __init__(self, width=48):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x):
        Net.calls += 1
        if os.environ.get("DIE_AT") == str(Net.calls):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("INTERRUPT_AT") == str(Net.calls):
            raise KeyboardInterrupt
        x = torch.relu(self.first(x.flatten(1)))
        return self.last(torch.relu(self.second(x)))

def wide():
    return Net(64)

class Pair(Net):
    def forward(self, x):
        return {"logits": super().forward(x), "features": x}

class Scores(Net):
    def forward(self, x):
        return {"scores": super().forward(x), "features": x}

class Undefined(Net):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)

class Detached(Net):
    def forward(self, x):
        return super().forward(x.detach())

def broken():
    raise RuntimeError("no such wheel")
'''


def train(network, seed):
    data = load_data("digits", split="train").images
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(8):
        for rows in torch.randperm(len(data), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    return network.eval()


def net(name="Net", file="net.pt"):
    module = sys.modules["mymodel"]
    model = module.Net() if name == "Net" else module.wide()
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state.get("state_dict", state))
    return model


def timeless(path):
    """A result without what differs between two runs of one command."""
    result = json.loads(path.read_text())
    del result["sha256"]  # of the whole file, times included
    for key in ("seconds", "date", "command", "parts"):
        result["environment"].pop(key, None)
    outcomes = result["numbers"]["outcomes"].items()
    result["numbers"]["outcomes"] = {name: digest for name, digest in outcomes if "clock" not in name}
    return result


BASE = ["--model", "mymodel:Net", "--weights", "net.pt", "--data", "digits", "--limit", "120", "--step", "0.02"]
ATTACK = ["attack", *BASE, "--eps", "0.1"]
