"""ProxProp with solve="step" and optimizers of every kind: closures, several optimizers, wrappers, other trainers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from backpass import BackpassError, ProxProp
from support.proximal import relative
from support.torchvision_operators import define_missing_operators

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3
RULES = (ProxProp(tau=0.5, solve="step"), ProxProp(solve="step", memory=0.9, refresh=2))
both = pytest.mark.parametrize("rule", RULES, ids=["exact", "memory"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def trained(rule: ProxProp, batches: list[slice], rate: float = 0.1) -> nn.Module:
    """A plain loop of SGD, one step for each batch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with rule.attach(model, optimizer):
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(X[rows]), Y[rows]).backward()
            optimizer.step()
    return model


def assert_equal(model: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> None:
    for p, known in zip(model.parameters(), expected.parameters(), strict=True):
        assert relative(p, known) < tolerance


@both
def test_lbfgs_searches_along_directions(rule: ProxProp) -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.3, max_iter=4, history_size=4)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        losses.append(loss.item())
        return loss

    with rule.attach(model, optimizer):
        for _ in range(3):
            optimizer.step(closure)
    assert len(losses) > 6
    assert min(losses) < losses[0]
    # The first step without history is one along the direction, shortened by its own rule.
    other, first = network(), network()
    one = torch.optim.LBFGS(first.parameters(), 0.3, max_iter=1)
    with rule.attach(first, one):
        one.step(lambda: (one.zero_grad(), F.cross_entropy(first(X), Y).backward())[1] or torch.tensor(0.0))
    sgd = torch.optim.SGD(other.parameters(), 0.0)
    with rule.attach(other, sgd):
        F.cross_entropy(other(X), Y).backward()
        sgd.step()
    length = min(1.0, 1 / sum(p.grad.abs().sum() for p in other.parameters())) * 0.3
    for p, start, known in zip(first.parameters(), network().parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(start - p, length * known.grad, rtol=1e-4, atol=1e-6)


@both
def test_two_optimizers_of_one_model(rule: ProxProp) -> None:
    expected = trained(rule, [slice(0, 12), slice(12, 24)])
    for order in (1, -1):
        model = network()
        weights = torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], 0.1)
        biases = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], 0.1)
        optimizers = [weights, biases]
        with rule.attach(model, optimizers):
            for rows in (slice(0, 12), slice(12, 24)):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                F.cross_entropy(model(X[rows]), Y[rows]).backward()
                for optimizer in optimizers[::order]:
                    optimizer.step()
        assert_equal(model, expected)


def test_one_of_two_optimizers_is_missed_by_name() -> None:
    model = network()
    weights = torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], 0.1)
    with (
        RULES[0].attach(model, weights),
        pytest.raises(BackpassError, match=r"does not have '2.bias'.*\[first, second\]"),
    ):
        model(X).sum().backward()


@both
def test_a_step_that_a_scaler_skips(rule: ProxProp) -> None:
    expected = trained(rule, [slice(0, 12), slice(12, 24)])
    model = network()
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with rule.attach(model, optimizer):
        for rows, poison in ((slice(0, 12), 1.0), (slice(3, 9), float("inf")), (slice(12, 24), 1.0)):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(X[rows]), Y[rows]) * poison).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_equal(model, expected)


@both
def test_schedules_and_optimizers_written_by_users(rule: ProxProp) -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])
            return loss

    expected = trained(rule, [slice(0, 12), slice(12, 24)])
    model = network()
    optimizer = Own(model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    with rule.attach(model, optimizer):
        for rows in (slice(0, 12), slice(12, 24)):

            def closure(rows: slice = rows) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(X[rows]), Y[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()
    assert_equal(model, expected)


def test_something_else_in_the_optimizer_s_place() -> None:
    for wrong in (None, 3, [network()]):
        with pytest.raises(BackpassError, match=r"optimizer=optimizer.*got optimizer="):
            RULES[0].attach(network(), wrong)


@both
@pytest.mark.parametrize("parts", [1, 2])
def test_accelerate(rule: ProxProp, parts: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = trained(rule, [slice(0, 12), slice(12, 24)])
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=parts, cpu=True)
    model = network()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(TensorDataset(X, Y), 12 // parts)
    )
    with rule.attach(model, optimizer):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    assert_equal(accelerator.unwrap_model(model), expected)


@both
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_lightning_s_automatic_optimization(rule: ProxProp, parts: int, tmp_path) -> None:
    define_missing_operators()
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            rule.attach(self.network, optimizer)
            return optimizer

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=parts,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 12 // parts))
    assert_equal(module.network, trained(rule, [slice(0, 12), slice(12, 24)]))


@both
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers(rule: ProxProp, tmp_path) -> None:
    define_missing_operators()
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x, labels):
            return {"loss": F.cross_entropy(self.network(x), labels)}

    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
    )
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
    with rule.attach(model, optimizer):
        trainer.train()
    assert_equal(model.network, trained(rule, [slice(0, 12), slice(12, 24)]))


def test_a_copy_starts_without_the_optimizer() -> None:
    model = network()
    with RULES[1].attach(model, torch.optim.SGD(model.parameters(), 0.1)):
        twin = copy.deepcopy(model)
    with pytest.raises(BackpassError, match="to a copy"):
        twin(X).sum().backward()
