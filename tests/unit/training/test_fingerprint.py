"""What a run depends on, in JSON's types: the same settings give the same words, other settings other words."""

import functools
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from backpass.training.fingerprint import describe, describe_model, describe_optimizer, differences


@dataclass(frozen=True)
class Setting:
    size: int
    of: tuple[float, ...]


class Bag:
    def __init__(self, shown):
        self.shown = shown
        self.callback = print


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, None),
        (0.5, 0.5),
        ({1: {"a": torch.float32}}, {"1": {"a": "torch.float32"}}),
        ((1, {2}), [1, [2]]),
        (Setting(3, (1.0, 2.0)), {"type": "Setting", "size": 3, "of": [1.0, 2.0]}),
        (nn.functional.gelu, "torch._C._nn.gelu"),
        (torch.Tensor.double, "torch._C.TensorBase.double"),
        (nn.Linear, "torch.nn.modules.linear.Linear"),
        (functools.partial(nn.Linear, 2, bias=False), ["torch.nn.modules.linear.Linear", [2], {"bias": False}]),
        (Bag("x"), {"type": "Bag", "shown": "x"}),
    ],
    ids=["none", "number", "dict", "tuple and set", "dataclass", "function", "C method", "class", "partial", "object"],
)
def test_a_value_has_words_in_json_s_types(value, words):
    assert describe(value) == words
    assert json.loads(json.dumps(words)) == words


def test_tensors_are_told_apart_by_values_type_and_shape():
    base = torch.arange(4.0)
    others = [base, base + 1, base.double(), base.view(2, 2)]
    assert len({describe(one) for one in others}) == 4
    assert describe(base) == describe(torch.arange(4.0))


def test_models_are_told_apart_by_structure_and_not_by_weights():
    same = describe_model(nn.Linear(2, 3)), describe_model(nn.Linear(2, 3))
    assert same[0] == same[1]
    assert describe_model(nn.Linear(2, 4)) != same[0] != describe_model(nn.Linear(2, 3).double())


def test_of_a_scheduled_rate_the_first_value_counts():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    before = describe_optimizer(optimizer)
    optimizer.step()
    schedule.step()
    assert describe_optimizer(optimizer) == before
    assert before["groups"][0]["lr"] == 0.5


def test_differences_name_the_place():
    before, now = {"a": {"b": [1, 2]}, "gone": 1}, {"a": {"b": [1, 3]}, "new": 2}
    assert differences(before, now) == [
        "a.b[1]: was 2, is 3",
        "gone: was 1, is None",
        "new: was None, is 2",
    ]
    assert differences(before, before) == []
