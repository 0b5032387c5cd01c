"""Invalid settings are refused before anything is trained or written, and the message says what to do."""

import pytest
import torch
from torch import nn

from backpass import BackpassError, LinBP
from backpass.training import ControlledLR, CrossEntropy, PerSample, Trainer
from support.names import name_of

X, Y = torch.randn(20, 4), torch.arange(20) % 3


def make(model=None, optimizer=None, data=(X, Y), **settings) -> Trainer:
    model = model or nn.Linear(4, 3)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(model, optimizer, data, **{"epochs": 1, "batch_size": 5, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be an int of at least 1; got 0"),
        ({"epochs": 1.5}, "epochs must be an int"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, or None"),
        ({"log_every": True}, "log_every must be an int"),
        ({"accumulate": 6}, "accumulate=6 parts of a batch_size=5"),
        ({"clip_norm": 0.0}, "clip_norm must be a finite number above 0"),
        ({"diverged_above": 1.0}, "diverged_above must be a finite number above 1"),
        ({"clip_norm": 1.0, "normalize_gradient": "model"}, "leave out clip_norm"),
        ({"step_scheduler": "steps"}, "Did you mean 'step'"),
        ({"normalize_gradient": "models"}, "Did you mean 'model'"),
        ({"checkpoint_every": "10 minutes", "folder": "x"}, "10min"),
        ({"evaluate_at": (1.5,)}, "evaluate_at must be numbers of steps"),
        ({"metrics": {"loss": max}, "evaluation": (X, Y)}, "choose another"),
        ({"metrics": {"f1": max}}, "metrics is measured on the evaluation set"),
        ({"loggers": ("tensorbord",), "folder": "x"}, "Did you mean 'tensorboard'"),
        ({"scheduler": "one_cycle"}, "Did you mean 'one-cycle'"),
        ({"scheduler": "cosine:warmup=2"}, "warmup must be a part of all steps"),
        ({"dtype": torch.float64}, "bfloat16"),
        ({"dtype": torch.float16}, "float16 is for CUDA"),
        ({"average": "ema"}, "ema:0.999"),
        ({"average": "ema:1"}, "0 < d < 1"),
        ({"average": "polyak:0"}, "0 < f <= 1"),
        ({"robust": lambda *_: {}}, "evaluation"),
        ({"checkpoint_every": 10}, "folder"),
        ({"loggers": ("tensorboard",)}, "folder"),
        ({"objective": lambda output, y: (output - y).square()}, r"PerSample\(loss\) makes one"),
        ({"rules": ("linbp",)}, "LinBP"),
        ({"rules": LinBP()}, "sequence of rules"),
        ({"data": (X[:0], Y[:0])}, "empty"),
        ({"optimizer": torch.optim.SGD(nn.Linear(4, 3).parameters(), 0.1)}, "no parameters of the model"),
        ({"optimizer": torch.optim.LBFGS(nn.Linear(4, 3).parameters())}, "no parameters of the model|LBFGS"),
        (
            {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 1)},
            "scheduler has another optimizer",
        ),
    ],
    ids=name_of,
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(BackpassError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, 'step_scheduler="step"'),
        ({"step_scheduler": "step", "accumulate": 2}, "accumulate=1, or a loop of your own"),
    ],
    ids=name_of,
)
def test_a_scheduler_that_measures_steps_needs_each_of_them_whole(settings, message):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(BackpassError, match=message):
        make(model, optimizer, scheduler=ControlledLR(optimizer), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 21}, "batch_size=21 is more than the 20 samples"),
        ({"data": (X, Y + 1)}, r"0..2 for a model of 3 outputs, and these are 1 to 3"),
        ({"data": (X, Y - 1)}, "number the classes from 0"),
        ({"data": (X, Y.float())}, "labels are integers"),
        ({"data": (X, nn.functional.one_hot(Y))}, "labels are integers"),
        ({"model": nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)))}, r"logits \(B, K\), got \(5, 3, 1\)"),
        ({"objective": PerSample(lambda output, y: output.mean())}, "one number per sample"),
    ],
    ids=name_of,
)
def test_data_and_model_that_do_not_fit(settings, message, tmp_path):
    with pytest.raises(BackpassError, match=message):
        make(**settings, folder=tmp_path / "run").fit()


def test_label_smoothing():
    with pytest.raises(BackpassError, match="label_smoothing"):
        CrossEntropy(label_smoothing=2)


def test_tensorboard_that_is_not_installed(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackpassError, match=r"backpass\[lab\]"):
        make(loggers=("tensorboard",), folder=tmp_path).fit()
