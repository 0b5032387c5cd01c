"""Models that do what models do: the right answer, or a message that says what to do."""

import logging
import re
import threading
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from backpass.attacks import APGD, FAB, FMN, PGD, AutoAttack, Square, evaluate, transfer
from backpass.errors import BackpassError

ATTACKS = {
    "pgd": PGD(eps=0.1, step=0.03, steps=4, restarts=2),
    "apgd": APGD(eps=0.1, steps=4),
    "fab": FAB(eps=0.1, steps=3, targets=2),
    "fmn": FMN(steps=4),
    "square": Square(eps=0.1, queries=10),
    "autoattack": AutoAttack(eps=0.1, steps=3, queries=5, targets=2),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


class Net(nn.Module):
    """A linear network; `before` sees the images, `after` the logits."""

    def __init__(self, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
        self.before, self.after = before, after

    def forward(self, x):
        return self.after((self.before(x).flatten(1) - 0.5) @ self.weight.t())


@pytest.fixture
def data():
    x = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    return x, Net()(x).argmax(1)


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


@dataclass(slots=True)
class Slotted:
    logits: torch.Tensor


class Named(NamedTuple):
    hidden: torch.Tensor
    logits: torch.Tensor


class Late(nn.Module):
    """A network that makes its layer in the first call."""

    def __init__(self):
        super().__init__()
        self.net = None

    def forward(self, x):
        if self.net is None:
            self.net = Net()
        return self.net(x)


SAME = {
    "writes into its input": Net(before=lambda x: x.sub_(0.25).mul_(4).div_(4).add_(0.25)),
    "writes through data": Net(before=lambda x: (x, x.data.mul_(1.0), x.data.add_(0.0))[0]),
    "clamps its input in place": Net(before=lambda x: x.clamp_(0, 1)),
    "returns a dict with logits": Net(after=lambda z: {"logits": z, "loss": None}),
    "returns a dataclass with logits": Net(after=lambda z: Output(z, z)),
    "returns a dataclass with slots": Net(after=lambda z: Slotted(z)),
    "returns a named tuple with logits": Net(after=lambda z: Named(z, z)),
    "makes its layer in the first call": Late(),
    "is scripted": torch.jit.trace(Net(), torch.zeros(1, 1, 4, 4)),
    "is frozen and scripted": torch.jit.freeze(torch.jit.trace(Net().eval(), torch.zeros(1, 1, 4, 4))),
    "is compiled": torch.compile(Net(), backend="eager"),
    "is wrapped in DataParallel": nn.DataParallel(Net()),
    "is checkpointed": Net(after=lambda z: checkpoint(torch.mul, z, 1.0, use_reentrant=False)),
    "has frozen weights": Net().requires_grad_(False),
}


@every_attack
@pytest.mark.parametrize("model", SAME.values(), ids=SAME)
def test_the_answer_is_that_of_the_plain_network(model, attack, data):
    x, y = data
    before = x.clone()
    plain, result = attack(Net(), x, y), attack(model, x, y)
    assert torch.equal(x, before)
    assert result.x_adv.min() >= 0
    assert result.x_adv.max() <= 1
    assert torch.equal(result.success, plain.success)
    torch.testing.assert_close(result.x_adv, plain.x_adv, atol=1e-5, rtol=0)


def test_evaluate_and_transfer_leave_the_images_of_a_model_that_writes_into_them(data):
    x = data[0]
    model, before = Net(before=lambda x: x.sub_(0.5)), x.clone()
    evaluate(model, data, ATTACKS["pgd"], batch_size=7)
    transfer({"a": model}, {"a": model}, data, ATTACKS["pgd"], batch_size=7)
    assert torch.equal(x, before)


@every_attack
def test_classes_masked_by_minus_infinity_are_excluded(attack, data):
    x, _ = data
    mask = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    model = Net(after=lambda z: z + mask)
    y = model(x).argmax(1)
    result = attack(model, x, y)
    assert result.success.any()
    assert not (result.prediction == 1).any()
    assert torch.equal(result.success, (model(result.x_adv).argmax(1) != y) & (result.distance <= attack.eps + 1e-6))
    three = Net(after=lambda z: z[:, [0, 2, 3]])
    labels = torch.tensor([0, 9, 1, 2])[y]
    if attack is not ATTACKS["autoattack"]:  # whose targeted loss needs four classes
        assert torch.equal(attack(three, x, labels).success, result.success)


REFUSED = {
    "its input is detached": (Net(before=lambda x: x.detach()), "detaches its input.*Use Square"),
    "its input is rounded": (Net(before=lambda x: x.round().detach() + 0 * x.detach()), "detaches its input"),
    "lazy modules": (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "call it once on a batch"),
    "plus infinity": (Net(after=lambda z: z + torch.tensor([torch.inf, 0, 0, 0])), "not finite"),
    "NaN": (Net(after=lambda z: z * torch.tensor([1.0, torch.nan, 1.0, 1.0])), "not finite"),
    "one class": (Net(after=lambda z: z[:, :1]), r"with C >= 2; got \(24, 1\)"),
    "a tuple": (Net(after=lambda z: (z, z)), "got tuple. Select it with logits="),
    "half precision": (Net().half(), r"pass dtype=torch\.bfloat16 to the attack"),
    "under no_grad": (Net(after=torch.no_grad()(lambda z: z.detach())), "works under no_grad"),
    "every class masked": (Net(after=lambda z: z - torch.inf), "not finite"),
    "an own key": (Net(after=lambda z: {"scores": z}), r"keys \['scores'\]. Select it with logits="),
    "an own attribute": (
        Net(after=lambda z: type("Own", (), {"__init__": lambda s: setattr(s, "scores", z)})()),
        r"got Own with keys \['scores'\]",
    ),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_the_others_are_refused_with_a_remedy(model, message, data):
    with pytest.raises(BackpassError, match=message):
        PGD(steps=2)(model, *data)
    with pytest.raises(BackpassError, match=message):
        evaluate(model, data, PGD(steps=2))


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which needs several processes."""

    __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"


class FSDPModule:
    __module__ = "torch.distributed.fsdp._fully_shard._fully_shard"


class FSDPNet(FSDPModule, Net):
    pass


@pytest.mark.parametrize("model", [FullyShardedDataParallel(), FSDPNet(), nn.Sequential(FSDPNet())])
def test_sharded_models_are_refused(model, data):
    for call in (lambda: PGD()(model, *data), lambda: evaluate(model, data, PGD())):
        with pytest.raises(BackpassError, match="load its full state dict into a plain copy"):
            call()


class Normalised(Net):
    """Batch statistics in eval mode."""

    def forward(self, x):
        return F.batch_norm(super().forward(x), None, None, training=True)


class Tracking(Normalised):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.norm(Net.forward(self, x))


@pytest.mark.parametrize("make", [Normalised, Tracking])
def test_batch_statistics_are_warned_of_once(make, data, caplog):
    model, attack = make(), PGD(steps=2, early_stop=False)
    with caplog.at_level(logging.WARNING, logger="backpass"):
        evaluate(model, data, attack, batch_size=8)
        attack(model, *data)
    assert caplog.text.count("depends on the other samples of its batch") == 1


def test_batch_statistics_of_one_sample_are_refused(data):
    x, y = data
    with pytest.raises(BackpassError, match="batch of one sample does not have. Give it running statistics"):
        PGD(steps=2)(Tracking(), x[:1], y[:1])


class Trains(Net):
    def forward(self, x):
        self.train()
        return super().forward(x)


WARNED = {
    "probabilities": (Net(after=lambda z: z.softmax(1)), "look like probabilities"),
    "dropout in forward": (Net(after=lambda z: F.dropout(z, 0.5)), "differ from call to call .* eot=20"),
    "noise": (Net(after=lambda z: z + 0.1 * torch.randn_like(z)), "differ from call to call"),
    "switches to training": (Trains(), "switches itself to training mode"),
    "rounded images": (Net(before=lambda x: (255 * x).round() / 255), "no gradient at 24 of 24 images"),
    "saturated": (Net(after=lambda z: 1e30 * z), "no gradient at 24 of 24 images: a saturated softmax"),
}


@pytest.mark.parametrize(("model", "message"), WARNED.values(), ids=WARNED)
def test_models_that_hide_gradients_or_draw_are_warned_of_once(model, message, data, caplog):
    x, _ = data
    with caplog.at_level(logging.WARNING, logger="backpass"):
        for _ in range(2):
            evaluate(model, (x, Net()(x).argmax(1)), PGD(steps=2), batch_size=24)
    assert len(re.findall(message, caplog.text)) == 1


@pytest.mark.parametrize(
    ("model", "eot"),
    [(Net(), 1), (Net(after=lambda z: F.dropout(z, 0.5)), 3), (nn.Sequential(Net(), nn.BatchNorm1d(4)), 1)],
)
def test_the_others_are_not_warned_of(model, eot, data, caplog):
    with caplog.at_level(logging.WARNING, logger="backpass"):
        PGD(steps=2, eot=eot)(model, *data)
    assert caplog.text == ""


def test_threads_that_attack_one_model_get_the_answers_of_one(data, tmp_path):
    x, y = data
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = [ATTACKS["pgd"](model, x[i::4], y[i::4]).x_adv for i in range(4)]
    found, failures = {}, []

    def run(i):
        try:
            for _ in range(4):
                found[i] = ATTACKS["pgd"](model, x[i::4], y[i::4]).x_adv
                evaluate(model, data, ATTACKS["pgd"], batch_size=6, resume=tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert all(torch.equal(found[i], alone[i]) for i in range(4))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob("*.partial"))
