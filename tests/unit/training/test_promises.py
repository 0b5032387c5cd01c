"""Promises of the trainer, each against a slow, obvious implementation of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader, Dataset

from backpass import BackpassError
from backpass.attacks import PGD
from backpass.training import Batch, Interrupted, PerSample, RobustEvaluation, Trainer
from backpass.training.adversary import AdversarialExamples
from backpass.training.averaging import Averaging
from backpass.training.batches import Batches
from backpass.training.meter import Meter
from backpass.training.update import Update

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(40, 6, generator=GENERATOR), torch.arange(40) % 3


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def make(model, **settings):
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(model.parameters(), 0.5)
    return Trainer(model, optimizer, (X, Y), **{"epochs": 2, "batch_size": 10, **settings})


class Counting(nn.Module):
    """Its output depends on how often it was called in training, which a non-persistent buffer counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.linear(x) * (1 + 0.1 * self.calls)


def test_buffers_that_state_dicts_leave_out_are_restored(tmp_path):
    def run(folder, **settings):
        model = Counting()
        settings = {"optimizer": torch.optim.SGD(model.parameters(), 0.1), "checkpoint_every": 1, **settings}
        return make(model, folder=tmp_path / folder, **settings)

    def stop(step):
        if step == 6:
            raise Interrupted

    whole = run("whole")
    whole.fit()
    with pytest.raises(Interrupted):
        run("stopped", on_step=stop).fit()
    again = run("stopped")
    again.fit(resume=True)
    assert float(again.model.calls) == float(whole.model.calls) == 8
    assert torch.equal(again.model.linear.weight, whole.model.linear.weight)


OTHER = X[:10], (Y[:10] + 1) % 3  # its loss rises while that of training falls


@pytest.mark.parametrize(
    ("mode", "settings", "read"),
    [
        ("min", {"evaluation": OTHER}, lambda record: record["evaluation"]["loss"]),
        ("max", {"evaluation": OTHER}, lambda record: record["evaluation"]["accuracy"]),
        ("min", {"evaluation": {"other": OTHER, "own": (X[:10], Y[:10])}}, lambda r: r["evaluation"]["other"]["loss"]),
        ("min", {"evaluation": OTHER, "evaluate_every": 2}, lambda r: r.get("evaluation", {}).get("loss")),
        ("min", {"evaluation": OTHER, "evaluate_every": None}, lambda record: record["loss"]),
        ("min", {}, lambda record: record["loss"]),
    ],
)
def test_a_plateau_is_that_of_the_first_evaluation_set(mode, settings, read):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor=0.5, patience=0)

    model = nn.Linear(6, 3)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer, by_hand = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    settings = {"epochs": 5, "batch_size": 10, "scheduler": plateau(optimizer), **settings}
    scheduler, found = plateau(by_hand), Trainer(model, optimizer, (X[:10], Y[:10]), **settings).fit()
    for number in map(read, found.history):
        if number is not None:
            scheduler.step(number)
    assert optimizer.param_groups[0]["lr"] == by_hand.param_groups[0]["lr"]
    assert (optimizer.param_groups[0]["lr"] < 0.1) is ("evaluation" in found.history[-1])


def test_a_plateau_of_the_accuracy_needs_one():
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max")
    squares = PerSample(lambda output, y: (output - y).square().mean(1))
    with pytest.raises(BackpassError, match="follows the accuracy, which this objective does not report"):
        Trainer(model, optimizer, (X, X[:, :1]), epochs=1, batch_size=10, objective=squares, scheduler=plateau).fit()


def test_the_average_of_bfloat16_weights_is_kept_in_float32():
    model = network().bfloat16()
    path = []
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    optimizer.register_step_post_hook(lambda *_: path.append(model[0].weight.detach().float().clone()))
    trainer = make(model, optimizer=optimizer, average="ema:0.99", epochs=10, prepare=lambda x, batch: x.bfloat16())
    states = []
    update = Averaging.update

    def record(self, step):
        update(self, step)
        states.append(self.values[0].clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Averaging, "update", record)
        trainer.fit()
    expected = path[0]
    for one in path[1:]:
        expected = 0.99 * expected + 0.01 * one
    assert states[-1].dtype == torch.float32
    torch.testing.assert_close(states[-1], expected, rtol=1e-6, atol=1e-7)


class Noise(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, place):
        return torch.rand(3), place


def test_workers_of_two_processes_draw_other_numbers():
    """Each rank reads its own part; were the seeds equal, the first sample of each would have the same noise."""

    def first(rank: int) -> torch.Tensor:
        model = nn.Linear(3, 16)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        trainer = Trainer(model, optimizer, DataLoader(Noise(), num_workers=1), epochs=1, batch_size=8)
        return next(Batches(trainer, rank, 2).epoch(0))[0][0].x

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_robust_evaluation_names_each_sample_by_its_position():
    seen = []

    class Recording(PGD):
        def __call__(self, model, x, y, **settings):
            seen.append(settings["indices"].clone())
            return super().__call__(model, x, y, **settings)

    model = network()
    RobustEvaluation(Recording(eps=0.1, step=0.05, steps=1, restarts=1), batch_size=7)(model, X, Y)
    right = (model(X).argmax(1) == Y).nonzero().squeeze(1)
    assert 0 < len(right) < len(X)  # positions in the data differ from those among the right ones
    assert torch.equal(torch.cat(seen), right)


@pytest.mark.parametrize(("epoch", "part"), [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (7, 1.0)])
def test_warmup_scales_every_length_of_the_attack(epoch, part):
    seen = []

    class Recording(PGD):
        def search(self, model, x, y, **settings):
            seen.append(self)
            return x

    lengths = {"eps": 0.4, "step": 0.1, "start_eps": 0.2, "noise": 0.05}
    batch = Batch(x=X, y=Y, index=torch.arange(40), epoch=epoch, step=0, seed=0)
    AdversarialExamples(Recording(**lengths, steps=2), None, 3)(network(), batch, lambda: torch.enable_grad())
    assert {name: getattr(seen[0], name) for name in lengths} == pytest.approx(
        {name: part * value for name, value in lengths.items()}
    )


@pytest.mark.parametrize("settings", [{"clip_norm": 0.05}, {"normalize_gradient": "model"}], ids=str)
def test_scaled_losses_are_unscaled_before_the_gradient_is_measured(settings):
    plain, scaled = network(), network()
    for model, scaler in ((plain, None), (scaled, GradScaler("cpu", init_scale=1024.0))):
        trainer = make(model, **settings)
        update = Update(trainer, model, (), Meter(torch.device("cpu")))
        update.scaler = scaler
        update([Batch(x=X, y=Y, index=torch.arange(40), epoch=0, step=0, seed=0)], 40)
        assert update.gradient_norm() == pytest.approx(gradient_norm(network()), rel=1e-5)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 1e-2}, {"normalize_gradient": "tensor"}], ids=str)
def test_sparse_gradients_of_embeddings_are_those_of_dense_ones(settings):
    def trained(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
        x = torch.arange(80).view(40, 2) % 5
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        result = Trainer(model, optimizer, (x, Y), epochs=2, batch_size=10, log_every=1, **settings).fit()
        return [*model.parameters(), torch.tensor(result.history[-1]["loss"])]

    for a, b in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(a, b)


def gradient_norm(model) -> float:
    loss = F.cross_entropy(model(X), Y)
    return float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm())


def test_a_normalised_tensor_has_norm_one_and_moves_by_the_rate():
    model = network()
    before = copy.deepcopy(model)
    make(model, epochs=1, batch_size=40, normalize_gradient="tensor").fit()
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert float((a - b).norm().detach()) == pytest.approx(0.5, rel=1e-5)
