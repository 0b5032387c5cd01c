"""Invalid settings, data and models are refused before work is lost, and the message says what to do."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import Dataset

from backpass import BackpassError, LinBP
from backpass.attacks import PGD
from backpass.training import (
    AdversarialTraining,
    ControlledLR,
    CrossEntropy,
    Evaluated,
    PerSample,
    RobustEvaluation,
    Trainer,
)
from support.names import name_of

X, Y = torch.randn(20, 4), torch.arange(20) % 3
ATTACK = PGD(eps=0.1, step=0.1, steps=1)


def make(model=None, optimizer=None, data=(X, Y), scheduler=None, **settings) -> Trainer:
    """A trainer; a scheduler may be a class, to be made of the optimizer."""
    model = model or nn.Linear(4, 3)
    optimizer = optimizer or SGD(model.parameters(), 0.1)
    scheduler = scheduler(optimizer) if isinstance(scheduler, type) else scheduler
    return Trainer(model, optimizer, data, **{"epochs": 1, "batch_size": 5, "scheduler": scheduler, **settings})


class Samples(Dataset):
    count = 20

    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.sample(index)


class Metered:
    def step(self, metric):
        pass

    state_dict = load_state_dict = step


def optimizer_of(model, rate):
    return {"model": model, "optimizer": SGD(model.parameters(), rate)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be an int of at least 1; got 0"),
        ({"epochs": 1.5}, "epochs must be an int"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, or None"),
        ({"batch_size": 21}, "batch_size=21 is more than the 20 samples"),
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
        ({"dtype": torch.float64}, "bfloat16"),
        ({"dtype": torch.float16}, "float16 is for CUDA"),
        ({"average": "ema"}, "ema:0.999"),
        ({"average": "ema:1"}, "0 < d < 1"),
        ({"average": "polyak:0"}, "0 < f <= 1"),
        ({"robust": lambda *_: {}}, "evaluation"),
        ({"robust": RobustEvaluation(ATTACK), "evaluation": Samples(lambda i: (X[i], Y[i]))}, "as tensors"),
        ({"evaluation": {}}, "a dict without a data set"),
        ({"evaluation": {"": (X, Y)}}, "without a name"),
        ({"checkpoint_every": 10}, "folder"),
        ({"loggers": ("tensorboard",)}, "folder"),
        ({"on_progress": 3}, "on_progress must be a function or None"),
        ({"objective": lambda output, y: (output - y).square()}, r"PerSample\(loss\) makes one"),
        ({"objective": F.cross_entropy}, r"PerSample\(loss\) makes one"),
        ({"rules": ("linbp",)}, "LinBP"),
        ({"rules": LinBP()}, "sequence of rules"),
        ({"scheduler": "one_cycle"}, "Did you mean 'one-cycle'"),
        ({"scheduler": "cosine:warmup=2"}, "warmup must be a part of all steps"),
        ({"scheduler": Metered()}, r"step\(\) takes no argument"),
        ({"scheduler": StepLR(SGD([torch.zeros(1)], 0.1), 1)}, "scheduler has another optimizer"),
        ({"scheduler": ReduceLROnPlateau, "step_scheduler": "step"}, "needs the loss of an epoch"),
        ({"scheduler": ControlledLR}, 'step_scheduler="step"'),
        ({"scheduler": ControlledLR, "step_scheduler": "step", "accumulate": 2}, "accumulate=1, or a loop of your own"),
        ({"optimizer": "sgd"}, "optimizer must be one of torch's"),
        ({"optimizer": SGD(nn.Linear(4, 3).parameters(), 0.1)}, "no parameters of the model"),
        ({"optimizer": LBFGS(nn.Linear(4, 3).parameters())}, "no parameters of the model|LBFGS"),
        (optimizer_of(nn.Linear(4, 3), math.nan), "learning rate of the optimizer must be finite"),
        (optimizer_of(nn.Linear(4, 3), torch.tensor(math.inf)), "learning rate of the optimizer must be finite"),
        ({"model": nn.Linear(4, 3, device="meta")}, "device meta"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, "frozen"),
        ({"model": nn.LazyLinear(3)}, "lazy modules without a shape"),
        ({"data": (X[:0], Y[:0])}, "empty"),
        ({"data": "digits"}, "no samples by position"),
        ({"data": {"x": X, "y": Y}}, "no samples by position"),
        ({"data": (X[0, 0], Y[0])}, "pair"),
        ({"data": (X.to_sparse(), Y)}, "sparse Tensor"),
        ({"data": (X.to("meta"), Y.to("meta"))}, "on meta"),
        *(
            ({name: value}, name)
            for name in ("clip_norm", "diverged_above", "average", "compile", "folder", "prepare", "scheduler")
            for value in ([1], object())
        ),
        *(({name: "no"}, f"{name} must be True") for name in ("drop_last", "channels_last", "compile")),
        *(({"seed": seed}, "seed must be a whole number") for seed in (1.5, math.nan, "x", None, True, 10**30)),
    ],
    ids=name_of,
)
def test_refused_when_the_trainer_is_made(settings, message):
    with pytest.raises(BackpassError, match=message):
        make(**settings)


class Returning(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.linear, self.change = nn.Linear(4, 3), change

    def forward(self, x):
        return self.change(self.linear(x))


def normalized():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def losses(model, batch):
    return F.cross_entropy(model(batch.x), batch.y, reduction="none")


ONE_SAMPLE = "larger batch_size, fewer parts"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # labels
        ({"data": (X, Y + 1)}, r"0..2 for a model of 3 outputs, and these are 1 to 3"),
        ({"data": (X, Y - 1)}, "number the classes from 0"),
        ({"data": (X, Y.float())}, "labels are integers"),
        ({"data": (X, F.one_hot(Y))}, "labels are integers"),
        *(({"data": (X, Y.to(dtype))}, r"y\.long\(\)") for dtype in (torch.int32, torch.bool, torch.int8)),
        ({"evaluation": (X, Y + 5)}, "labels of the evaluation set are in 0..2"),
        ({"evaluation": (X, Y - 100)}, "labels of the evaluation set"),
        ({"evaluation": (X, Y.float())}, "labels of the evaluation set are integers"),
        ({"evaluation": (X[:, :3], Y)}, "does not take x of the evaluation set"),
        # samples
        ({"data": Samples(lambda i: (X[i], Y[i], 1))}, "list of 3"),
        ({"data": Samples(lambda i: X[i])}, "pair"),
        ({"data": Samples(lambda i: {"x": X[i], "y": Y[i]})}, "dict of 2"),
        ({"data": Samples(lambda i: ("a", "b"))}, "pair"),
        ({"data": Samples(lambda i: (X[i], 9))}, "number the classes from 0"),
        ({"data": Samples(lambda i: (X[i], -100))}, "number the classes from 0"),  # torch would leave it out
        ({"data": Samples(lambda i: (X[i], 1.5))}, "int64 or uint8"),
        # outputs
        ({"model": nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1)))}, r"logits \(B, K\), got \(5, 3, 1\)"),
        ({"model": Returning(lambda out: out[:2])}, r"\(2, 3\)"),
        ({"model": Returning(lambda out: out.long())}, "int64"),
        ({"model": Returning(lambda out: out.detach())}, "does not depend differentiably"),
        ({"model": normalized(), "batch_size": 1}, ONE_SAMPLE),
        ({"model": normalized(), "accumulate": 5}, ONE_SAMPLE),
        ({"model": normalized(), "data": (X[:11], Y[:11]), "drop_last": False}, ONE_SAMPLE),
        # objectives and measurements
        ({"objective": PerSample(lambda output, y: output.mean())}, "one number per sample"),
        ({"objective": lambda model, batch, plain: losses(model, batch).mean()}, r"Evaluated\(loss=...\).*got Tensor"),
        ({"objective": lambda model, batch, plain: Evaluated(loss=losses(model, batch))}, r"scalar loss, got \(\d+,\)"),
        (
            {
                "objective": lambda model, batch, plain: Evaluated(
                    loss=losses(model, batch).mean(), metrics={"loss": torch.ones(())}
                )
            },
            "a metric called 'loss'",
        ),
        *(
            ({"evaluation": (X, Y), "robust": lambda *_, measured=measured: measured}, "robust returns a dict of num")
            for measured in (None, [1], {"a": "x"}, {"a": torch.ones(2)})
        ),
    ],
    ids=name_of,
)
def test_refused_in_the_first_epoch(settings, message, tmp_path):
    with pytest.raises(BackpassError, match=message):
        make(**settings, folder=tmp_path / "run").fit()


def test_a_mistake_in_the_evaluation_set_is_found_before_the_first_step():
    trainer = make(evaluation=(X, Y + 5))
    before = trainer.model.weight.clone()
    with pytest.raises(BackpassError):
        trainer.fit()
    assert torch.equal(trainer.model.weight, before)


def test_data_that_changes_its_length_is_refused():
    data = Samples(lambda i: (X[i], Y[i]))
    with pytest.raises(BackpassError, match="had 20 samples when the trainer was made, and has 21 now"):
        make(data=data, epochs=2, on_step=lambda step: setattr(data, "count", 21)).fit()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackpassError, match="file cannot be made or locked: .*another path"):
        make(folder=tmp_path / "file").fit()


def test_tensorboard_that_is_not_installed(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackpassError, match=r"backpass\[lab\]"):
        make(loggers=("tensorboard",), folder=tmp_path).fit()


def test_resume_is_yes_no_or_auto():
    with pytest.raises(BackpassError, match="resume must be True"):
        make().fit(resume="yes")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda value=value: CrossEntropy(label_smoothing=value), "label_smoothing")
            for value in (2, "x", [], math.nan)
        ),
        *((lambda value=value: AdversarialTraining(ATTACK, trades=value), "trades") for value in ("x", [], math.nan)),
        *(
            (lambda name=name, value=value: RobustEvaluation(ATTACK, **{name: value}), name)
            for name, values in (("collapse", (1.0, "x")), ("stop", ("x", math.nan)), ("images", (0, "x", math.nan)))
            for value in values
        ),
        (lambda: RobustEvaluation(None), "untargeted attack"),
        (lambda: RobustEvaluation(ATTACK, training_attack=PGD(targeted=True)), "untargeted attack"),
    ],
)
def test_settings_beside_the_trainer(make, message):
    with pytest.raises(BackpassError, match=message):
        make()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_needs_no_gradient_mode_of_the_caller(mode):
    trainer = make()
    with mode():
        assert trainer.fit().steps == 4
        assert not torch.is_grad_enabled()


def test_a_last_step_that_ruins_the_weights_is_a_divergence():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)  # random weights may leave no gradient that is large enough
    result = make(model, SGD(model.parameters(), 1e38), batch_size=20, data=(1e3 * X, Y)).fit()
    assert result.diverged == "the weights after step 1 are not finite"
