"""A run that was stopped anywhere and resumed is the run that was never stopped, to the bit."""

import os
import signal
import warnings
from itertools import cycle

import pytest
import torch

from backpass import BackpassError
from backpass.training import Interrupted, Progress, Trainer
from support.training import KINDS, jitter, outcome, trainer


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask_to_stop_at(step: int, number: signal.Signals):
    """The preparation of `support.training`, which a signal interrupts while this step runs."""
    calls = []

    def prepare(x, batch):
        if batch.step == step and not calls:
            calls.append(step)
            os.kill(os.getpid(), number)
        return jitter(x, batch)

    prepare.__module__, prepare.__qualname__ = jitter.__module__, jitter.__qualname__  # the same to a checkpoint
    return prepare


@pytest.mark.parametrize(("kind", "optimizer"), list(zip(KINDS, cycle(["momentum", "adamw"]), strict=False)))
def test_every_stop_between_two_steps_leaves_no_trace(kind, optimizer, tmp_path):
    whole = trainer(kind, tmp_path / "whole", optimizer)
    expected = outcome(whole, whole.fit())
    for step in (0, 3, 4, 14):
        folder = tmp_path / str(step)
        with pytest.raises(Interrupted, match="resume=True"):
            trainer(kind, folder, optimizer, prepare=ask_to_stop_at(step, signal.SIGINT)).fit()
        again = trainer(kind, folder, optimizer)
        assert outcome(again, again.fit(resume=True)) == expected, step


@pytest.mark.parametrize(
    "changed", [{"average": "polyak:0.5"}, {"drop_last": False, "batch_size": 22, "accumulate": 3}]
)
def test_other_averages_and_incomplete_batches(changed, tmp_path):
    whole = trainer("BP", tmp_path / "whole", **changed)
    expected = outcome(whole, whole.fit())
    for step in (2, 10):
        with pytest.raises(Interrupted):
            trainer("BP", tmp_path / str(step), prepare=ask_to_stop_at(step, signal.SIGTERM), **changed).fit()
        again = trainer("BP", tmp_path / str(step), **changed)
        assert outcome(again, again.fit(resume=True)) == expected


def test_the_result_of_a_resumed_run_has_all_epochs(tmp_path):
    with pytest.raises(Interrupted):
        trainer("BP", tmp_path, prepare=ask_to_stop_at(7, signal.SIGINT)).fit()
    result = trainer("BP", tmp_path).fit(resume=True)
    assert [record["epoch"] for record in result.history] == [1, 2, 3]
    assert result.steps == 15


@pytest.mark.parametrize("kind", ["BP", "LinBP"])
def test_a_finished_run_resumes_to_its_end_without_a_word(kind, tmp_path):
    first = trainer(kind, tmp_path)
    expected = outcome(first, first.fit())
    again = trainer(kind, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = again.fit(resume=True)
    assert outcome(again, result) == expected


def test_more_epochs_continue_a_finished_run(tmp_path):
    long = trainer("BP", tmp_path / "long", epochs=3)
    expected = outcome(long, long.fit())
    trainer("BP", tmp_path / "short", epochs=2).fit()
    again = trainer("BP", tmp_path / "short", epochs=3)
    assert outcome(again, again.fit(resume=True)) == expected


def test_auto_begins_anew_where_there_is_nothing(tmp_path):
    whole = trainer("BP", tmp_path / "whole")
    expected = outcome(whole, whole.fit())
    auto = trainer("BP", tmp_path / "auto")
    assert outcome(auto, auto.fit(resume="auto")) == expected


def test_how_a_run_is_watched_and_kept_does_not_change_it(tmp_path):
    whole = trainer("BP", tmp_path / "whole")
    expected = outcome(whole, whole.fit())
    seen: list[Progress] = []
    other = trainer(
        "BP", tmp_path / "other", checkpoint_every=None, keep=1, on_progress=seen.append, loggers=("tensorboard",)
    )
    assert outcome(other, other.fit()) == expected
    assert seen[-1].step == seen[-1].steps == 15
    assert len(list((tmp_path / "other" / "checkpoints").glob("*.pt"))) == 1


def test_the_seed_names_the_run_and_the_callers_random_numbers_stay():
    def run(seed: int) -> dict[str, bytes]:
        one = trainer("BP", None, checkpoint_every=None, seed=seed)
        return outcome(one, one.fit())

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = run(3)
    assert torch.equal(torch.rand(3), expected)
    assert run(3) == first
    assert run(4) != first


@pytest.fixture
def heeded():
    """Ctrl-C is heeded, also where the shell that started the tests has switched it off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_stops_at_once(tmp_path, heeded):
    def twice(x, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second Ctrl-C came too late")

    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer("BP", tmp_path, prepare=twice).fit()
    assert not isinstance(stopped.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class TestRefusals:
    def test_a_folder_that_holds_a_run(self, tmp_path):
        trainer("BP", tmp_path).fit()
        with pytest.raises(BackpassError, match="holds a run already.*resume=True"):
            trainer("BP", tmp_path).fit()

    def test_nothing_to_resume_from(self, tmp_path):
        with pytest.raises(BackpassError, match="no checkpoint"):
            trainer("BP", tmp_path).fit(resume=True)
        with pytest.raises(BackpassError, match="no folder"):
            trainer("BP", None, checkpoint_every=None).fit(resume=True)

    @pytest.mark.parametrize(
        ("name", "changed"),
        [
            ("batch_size", {"batch_size": 20}),
            ("seed", {"seed": 8}),
            ("average", {"average": None}),
            ("accumulate", {"accumulate": 1}),
            ("objective", KINDS["adversarial"]),
            ("rules", KINDS["LinBP"]),
            ("epochs", {"epochs": 2}),
            ("optimizer", {"optimizer": "adamw"}),
            ("log_every", {"log_every": 4}),
            ("prepare", {"prepare": lambda x, batch: x.float()}),
        ],
    )
    def test_a_checkpoint_of_other_settings_names_them(self, name, changed, tmp_path):
        trainer("BP", tmp_path).fit()
        with pytest.raises(BackpassError, match=f"other settings: {name}"):
            trainer("BP", tmp_path, **changed).fit(resume=True)

    def test_other_data_and_other_models(self, tmp_path):
        def run(model: torch.nn.Module, x: torch.Tensor) -> Trainer:
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            return Trainer(model, optimizer, (x, torch.arange(200) % 2), epochs=1, batch_size=50, folder=tmp_path)

        x = torch.randn(200, 3)
        run(torch.nn.Linear(3, 2), x).fit()
        with pytest.raises(BackpassError, match="data.sha256"):
            run(torch.nn.Linear(3, 2), x.index_add(0, torch.tensor([1]), torch.ones(1, 3))).fit(resume=True)  # one row
        with pytest.raises(BackpassError, match="model.sha256"):
            run(torch.nn.Linear(3, 2, bias=False), x).fit(resume=True)
