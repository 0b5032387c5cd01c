"""Values of a wrong kind, and bad luck, end in a message before work is lost, never in silence."""

import hashlib
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset

from backpass import BackpassError
from backpass.attacks import PGD
from backpass.training import (
    AdversarialTraining,
    ControlledLR,
    CrossEntropy,
    Evaluated,
    RobustEvaluation,
    Trainer,
    half_losses,
)
from support.names import name_of

X, Y = torch.randn(20, 4), torch.arange(20) % 3
ATTACK = PGD(eps=0.1, step=0.1, steps=1)


def make(model=None, optimizer=None, data=(X, Y), **settings) -> Trainer:
    model = model or nn.Linear(4, 3)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(model, optimizer, data, **{"epochs": 1, "batch_size": 5, **settings})


class Samples(Dataset):
    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.sample(index)


class Returning(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(4, 3), change

    def forward(self, x):
        return self.change(self.linear(x))


@pytest.mark.parametrize(
    "name", ["clip_norm", "diverged_above", "average", "compile", "folder", "prepare", "scheduler"]
)
@pytest.mark.parametrize("value", [[1], object()], ids=["list", "object"])
def test_a_setting_of_another_kind_is_named(name, value):
    with pytest.raises(BackpassError, match=name):
        make(**{name: value})


@pytest.mark.parametrize("name", ["drop_last", "channels_last", "compile"])
def test_a_word_is_no_switch(name):
    with pytest.raises(BackpassError, match=f"{name} must be True"):
        make(**{name: "no"})


@pytest.mark.parametrize("seed", [1.5, math.nan, "x", None, True, 10**30])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(BackpassError, match="seed must be a whole number"):
        make(seed=seed)


class Metered:
    def step(self, metric):
        pass

    state_dict = load_state_dict = step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_progress": 3}, "on_progress must be a function or None"),
        ({"robust": RobustEvaluation(ATTACK), "evaluation": Samples(lambda i: (X[i], Y[i]))}, "as tensors"),
        ({"data": "digits"}, "no samples by position"),
        ({"data": {"x": X, "y": Y}}, "no samples by position"),
        ({"data": (X[0, 0], Y[0])}, "pair"),
        ({"data": (X.to_sparse(), Y)}, "sparse Tensor"),
        ({"data": (X.to("meta"), Y.to("meta"))}, "on meta"),
        ({"model": nn.Linear(4, 3, device="meta")}, "device meta"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, "frozen"),
        ({"evaluation": {}}, "a dict without a data set"),
        ({"evaluation": {"": (X, Y)}}, "without a name"),
        ({"objective": nn.functional.cross_entropy}, r"PerSample\(loss\) makes one"),
        ({"model": nn.LazyLinear(3)}, "lazy modules without a shape"),
        ({"scheduler": Metered()}, r"step\(\) takes no argument"),
    ],
    ids=name_of,
)
def test_what_cannot_be_trained_on_is_told_when_the_trainer_is_made(settings, message):
    with pytest.raises(BackpassError, match=message):
        make(**settings)


@pytest.mark.parametrize("rate", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_learning_rate_is_finite(rate):
    model = nn.Linear(4, 3)
    with pytest.raises(BackpassError, match="learning rate of the optimizer must be finite"):
        make(model, torch.optim.SGD(model.parameters(), rate))


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 1}, {"accumulate": 10}, {"data": (X[:11], Y[:11]), "drop_last": False}],
    ids=["batch", "part", "last batch"],
)
def test_batch_norm_of_one_sample_says_what_to_change(settings):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(BackpassError, match="larger batch_size, fewer parts"):
        make(model, **{"batch_size": 10, **settings}).fit()


def test_data_that_changes_its_length_is_refused():
    class Growing(Samples):
        count = 20

        def __len__(self):
            return self.count

    data = Growing(lambda i: (X[i], Y[i]))
    with pytest.raises(BackpassError, match="had 20 samples when the trainer was made, and has 21 now"):
        make(data=data, epochs=2, on_step=lambda step: setattr(data, "count", 21)).fit()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackpassError, match="file cannot be made or locked: .*another path"):
        make(folder=tmp_path / "file").fit()


def test_an_optimizer_is_one_of_torchs():
    with pytest.raises(BackpassError, match="optimizer must be one of torch's"):
        make(optimizer="sgd")
    with pytest.raises(BackpassError, match="optimizer is one of torch's"):
        ControlledLR("sgd")


def test_a_plateau_is_one_of_epochs():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(BackpassError, match="epoch"):
        make(model, optimizer, scheduler=ReduceLROnPlateau(optimizer), step_scheduler="step")


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ((X, Y + 5), "labels of the evaluation set are in 0..2"),
        ((X, Y - 100), "labels of the evaluation set"),
        ((X, Y.float()), "labels of the evaluation set are integers"),
        ((X[:, :3], Y), "does not take x of the evaluation set"),
    ],
    ids=["range", "ignored by torch", "float", "width"],
)
def test_a_mistake_in_the_evaluation_set_is_told_before_the_first_step(evaluation, message):
    trainer = make(evaluation=evaluation)
    before = trainer.model.weight.clone()
    with pytest.raises(BackpassError, match=message):
        trainer.fit()
    assert torch.equal(trainer.model.weight, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.int8])
def test_labels_that_torch_does_not_take_are_refused(dtype):
    with pytest.raises(BackpassError, match=r"y\.long\(\)"):
        make(data=(X, Y.to(dtype))).fit()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out[:2], r"\(2, 3\)"),
        (lambda out: out.long(), "int64"),
        (lambda out: out.detach(), "does not depend differentiably"),
    ],
    ids=["rows", "whole numbers", "detached"],
)
def test_an_output_that_cannot_be_learned_from(change, message):
    with pytest.raises(BackpassError, match=message):
        make(Returning(change)).fit()


def losses(model, batch):
    return torch.nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda model, batch, plain: losses(model, batch).mean(), r"returns Evaluated\(loss=...\).*got Tensor"),
        (lambda model, batch, plain: Evaluated(loss=losses(model, batch)), r"scalar loss, got \(\d+,\)"),
        (
            lambda model, batch, plain: Evaluated(loss=losses(model, batch).mean(), metrics={"loss": torch.ones(())}),
            "a metric called 'loss'",
        ),
    ],
    ids=["a tensor", "one number a sample", "a metric for the loss"],
)
def test_an_objective_gives_a_scalar_loss_and_metrics_of_other_names(objective, message):
    with pytest.raises(BackpassError, match=message):
        make(objective=objective).fit()


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda i: (X[i], Y[i], 1), "list of 3"),
        (lambda i: X[i], "pair"),
        (lambda i: {"x": X[i], "y": Y[i]}, "dict of 2"),
        (lambda i: ("a", "b"), "pair"),
        (lambda i: (X[i], 9), "number the classes from 0"),
        (lambda i: (X[i], -100), "number the classes from 0"),
        (lambda i: (X[i], 1.5), "int64 or uint8"),
    ],
    ids=["three", "one", "dict", "words", "range", "ignored by torch", "float"],
)
def test_a_dataset_of_other_than_labelled_samples(sample, message):
    with pytest.raises(BackpassError, match=message):
        make(data=Samples(sample)).fit()


@pytest.mark.parametrize("measured", [None, [1], {"a": "x"}, {"a": torch.ones(2)}], ids=name_of)
def test_robust_gives_numbers_by_name(measured):
    with pytest.raises(BackpassError, match="robust returns a dict of numbers"):
        make(evaluation=(X, Y), robust=lambda *_: measured).fit()


def test_resume_is_yes_no_or_auto():
    with pytest.raises(BackpassError, match="resume must be True"):
        make().fit(resume="yes")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_needs_no_gradient_mode_of_the_caller(mode):
    trainer = make()
    with mode():
        assert trainer.fit().steps == 4
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("value", ["x", [], math.nan])
def test_settings_beside_the_trainer(value):
    optimizer = torch.optim.SGD(nn.Linear(3, 1).parameters(), 0.1)
    for name in ("lr_max", "window", "slope", "every"):
        with pytest.raises(BackpassError, match=name):
            ControlledLR(optimizer, **{name: value})
    with pytest.raises(BackpassError, match="label_smoothing"):
        CrossEntropy(label_smoothing=value)
    with pytest.raises(BackpassError, match="trades"):
        AdversarialTraining(ATTACK, trades=value)
    for name in ("collapse", "stop", "images"):
        with pytest.raises(BackpassError, match=name):
            RobustEvaluation(ATTACK, **{name: value})
    with pytest.raises(BackpassError, match="untargeted attack"):
        RobustEvaluation(None)


@pytest.mark.parametrize(
    "losses", [None, [torch.ones(())] * 2, [lambda: 1.0] * 2, [lambda: torch.ones(())] * 2], ids=name_of
)
def test_measure_takes_two_functions_with_graph(losses):
    scheduler = ControlledLR(torch.optim.SGD(nn.Linear(3, 1).parameters(), 0.1))
    with pytest.raises(BackpassError, match="half"):
        scheduler.measure(losses)


def test_half_losses_take_tensors_with_rows():
    with pytest.raises(BackpassError, match="NoneType"):
        half_losses(nn.Linear(3, 1), nn.functional.mse_loss, None, None)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _replace(folder, content):
    for path in (folder / "checkpoints").glob("*.pt"):
        path.write_bytes(content)
        path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")


def _saved(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path):
    make(folder=tmp_path / "run").fit()
    for content in (pickle.dumps(Touch(tmp_path / "run-by-it")), _saved({"model": Touch(tmp_path / "run-by-it")})):
        _replace(tmp_path / "run", content)
        with pytest.raises(BackpassError, match="without running code"):
            make(folder=tmp_path / "run").fit(resume=True)
    assert not (tmp_path / "run-by-it").exists()


@pytest.mark.parametrize("content", [b"words", _saved({"x": 1}), _saved([1])], ids=["words", "dict", "list"])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    make(folder=tmp_path).fit()
    _replace(tmp_path, content)
    with pytest.raises(BackpassError, match="Start anew|start anew"):
        make(folder=tmp_path).fit(resume=True)


def test_a_damaged_sum_is_a_damaged_checkpoint(tmp_path):
    make(folder=tmp_path).fit()
    for path in (tmp_path / "checkpoints").glob("*.sha256"):
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BackpassError, match="is whole"):
        make(folder=tmp_path).fit(resume=True)


def test_a_log_that_was_lost_is_not_filled_with_zeros(tmp_path, caplog):
    make(folder=tmp_path).fit()
    (tmp_path / "log.jsonl").unlink()
    make(folder=tmp_path, epochs=2).fit(resume=True)
    assert b"\0" not in (tmp_path / "log.jsonl").read_bytes()
    assert "records are missing" in caplog.text


def test_a_last_step_that_ruins_the_weights_is_a_divergence():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)  # random weights may leave no gradient that is large enough
    optimizer = torch.optim.SGD(model.parameters(), 1e38)
    result = make(model, optimizer, batch_size=20, data=(1e3 * X, Y)).fit()
    assert result.diverged == "the weights after step 1 are not finite"
