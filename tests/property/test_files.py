"""Damaged files: each is seen and told, or read as it was; none crashes a reader, none gives other numbers."""

import json
import logging
import os
import pickle
from contextlib import suppress

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from backpass import BackpassError
from backpass.attacks import PGD, evaluate, load, save
from backpass.attacks.shards import read_tensors, write_tensors
from backpass.experiments.outcomes import Store, Task
from backpass.models.weights import read_weights, save_weights
from backpass.report.claims import judge
from backpass.report.overview import read_results, write_overview
from backpass.report.reading import read_result
from backpass.report.result import Curve, Finding, Result, Series, Table
from backpass.report.statistics import Interval
from backpass.training.checkpoint import Checkpoints
from support.experiments import Shift, draw

TENSORS = {"x": torch.arange(12.0).view(3, 4), "name": "a shard"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


def a_shard(folder):
    write_tensors(folder / "shard.pt", TENSORS)
    return folder / "shard.pt", read_tensors


def saved_images(folder):
    model, x, y, attack = network(), torch.rand(6, 4), torch.arange(6) % 3, PGD(eps=0.1, steps=2, restarts=1)
    save(folder / "images.pt", model, x, y, attack(model, x, y), attack)
    return folder / "images.pt", lambda path: vars(load(path))


def a_checkpoint(folder):
    kept = Checkpoints(folder, 1)
    return kept.save(3, {"weights": torch.ones(5), "step": 3}), lambda path: kept.load()


def an_outcome(folder):
    store, task = Store(folder), Task(label="one", work=draw, settings=Shift(shift=1.0), seed=0, device="cpu")
    store.write(task, {"value": [1.5, None]})
    # A damaged outcome is computed again, which gives the same value.
    return store.path(task), lambda path: store.read(task) or {"value": [1.5, None]}


def result():
    return Result(
        experiment="it", title="A", question="Is it?", scale="small", findings=[Finding("In short", "Yes.")],
        environment={"versions": {}}, settings={"seeds": [0, 1, 2]},
        series=[Series(id="l", title="L", description="d", x_label="x", y_label="y",
                       curves=[Curve(label="bp", x=range(2), runs=[[1.0, 2.0], [3.0, float("nan")]])])],
        claims=[judge("c", "Less", ours=[1.0, 1.1, 0.9], theirs=[2.0, 2.1, 2.2], direction="lower", quantity="loss")],
        tables=[Table(id="t", title="t", columns=("a", "b"), rows=[["one", Interval(1.0, 0.5, 1.5, 3)]])],
    )  # fmt: skip


def a_result(folder):
    path = folder / "result.json"
    path.write_text(result().as_json())
    return path, lambda path: json.loads(read_result(path).as_json())


def weights(folder):
    return save_weights(network(), folder / "net.safetensors"), read_weights


def weights_of_torch(folder):
    torch.save(network().state_dict(), folder / "net.pt")
    return folder / "net.pt", read_weights


MADE = [a_shard, saved_images, a_checkpoint, an_outcome, a_result, weights, weights_of_torch]
CHECKED = [a_shard, saved_images, a_checkpoint, an_outcome]  # a flipped bit is seen wherever it is


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every kind of file, its bytes, its reader, and what is in it."""
    found = {}
    for make in MADE:
        path, read = make(tmp_path_factory.mktemp(make.__name__))
        found[make] = path, path.read_bytes(), read, read(path)
    return found


@pytest.mark.parametrize("make", MADE)
@settings(deadline=None, max_examples=150)
@given(part=st.floats(0, 1))
def test_a_file_that_was_cut_off_is_told(files, make, part):
    path, whole, read, _ = files[make]
    cut = whole[: int(part * (len(whole) - 2))]
    path.write_bytes(cut)
    if make is an_outcome:
        assert read(path) == {"value": [1.5, None]}
    else:
        with pytest.raises(BackpassError):
            read(path)


@pytest.mark.parametrize("make", MADE)
@settings(deadline=None, max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_told_or_does_no_harm(files, make, place, bit):
    path, whole, read, content = files[make]
    flipped = bytearray(whole)
    flipped[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(flipped)
    try:
        found = read(path)
    except BackpassError:
        return
    if make in CHECKED:
        assert same(found, content)


@pytest.mark.parametrize("make", MADE)
@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=200) | st.text().map(str.encode))
@example(b"[" * 100_000)
@example(b'{"a": NaN}')
def test_bytes_that_are_something_else_are_told(files, make, content):
    path, _, read, _ = files[make]
    path.write_bytes(content)
    if make is an_outcome:
        assert read(path) == {"value": [1.5, None]}
    else:
        with pytest.raises(BackpassError):
            read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_result_of_other_values_is_shown_or_refused_with_a_message(tmp_path_factory, data):
    content = json.loads(result().as_json())
    place = content
    while True:  # down a random way, to a value that becomes another
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key]
    folder = tmp_path_factory.mktemp("results")
    (folder / "it").mkdir()
    (folder / "it" / "result.json").write_text(json.dumps(content))
    with suppress(BackpassError):
        write_overview(folder, read_results(folder))


class Code:
    """What a pickle of this does when it is read carelessly: make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda code, path: path.write_bytes(pickle.dumps(code))])
@pytest.mark.parametrize("make", MADE)
def test_no_file_runs_code(make, write, tmp_path):
    path, read = make(tmp_path)
    write({"x": Code(tmp_path / "ran")}, path)
    if make is an_outcome:
        read(path)
    else:
        with pytest.raises(BackpassError):
            read(path)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_shard_is_named_and_computed_again(tmp_path, caplog):
    model, x = network(), torch.rand(30, 4)
    data, attack = (x, model(x).argmax(1)), PGD(eps=0.1, step=0.05, steps=3, restarts=1)
    first = evaluate(model, data, attack, batch_size=10, resume=tmp_path)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        again = evaluate(model, data, attack, batch_size=10, resume=tmp_path)
    assert again.shards_computed == 3
    assert torch.equal(first.success, again.success)
    assert "computed again" in caplog.text
