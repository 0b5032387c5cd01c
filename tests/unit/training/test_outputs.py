"""Binary, multi-label and regression models, models with a dict of outputs, soft labels, mixup, and own metrics."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from backpass import BackpassError
from backpass.attacks import PGD
from backpass.training import (
    AdversarialTraining,
    BinaryCrossEntropy,
    ControlledLR,
    CrossEntropy,
    Evaluated,
    PerSample,
    RobustEvaluation,
    Trainer,
)
from backpass.training.batches import Batches

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 4, generator=GENERATOR)
BINARY = (X.sum(1) > 0).long()
SEVERAL = (X[:, :3] > 0).float()


def fit(model, y, x=X, **settings):
    torch.manual_seed(0)
    for one in model.modules():
        if hasattr(one, "reset_parameters"):
            one.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    settings = {"epochs": 5, "batch_size": 20, "evaluation": (x, y), **settings}
    return Trainer(model, optimizer, (x, y), **settings).fit().history[-1]


SHAPES = {
    "(B, 1) of (B,)": (nn.Linear(4, 1), BINARY),
    "(B,) of (B,)": (nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), BINARY),
    "(B, 1) of (B, 1)": (nn.Linear(4, 1), BINARY[:, None].float()),
    "(B,) of bool": (nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), BINARY.bool()),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_binary_classifier_has_the_accuracy_of_its_sign(case):
    model, y = SHAPES[case]
    record = fit(model, y, objective=BinaryCrossEntropy())
    logits = model(X).detach().flatten()
    expected = float(((logits > 0) == BINARY.bool()).double().mean())
    assert record["evaluation"]["accuracy"] == expected > 0.9
    loss = F.binary_cross_entropy_with_logits(logits, BINARY.float())
    assert record["evaluation"]["loss"] == pytest.approx(float(loss), abs=1e-6)
    assert record["accuracy"] > 0.8


def test_one_logit_under_a_loss_of_ones_own_has_no_accuracy():
    loss = PerSample(lambda z, y: F.binary_cross_entropy_with_logits(z.squeeze(1), y.float(), reduction="none"))
    record = fit(nn.Linear(4, 1), BINARY, objective=loss)
    assert "accuracy" not in record
    assert record["evaluation"].keys() == {"loss"}


def test_several_labels_have_the_loss_of_all_and_metrics_of_ones_own():
    def exact_match(output, y):
        return ((output > 0) == (y > 0.5)).all(1).float().mean()

    model = nn.Linear(4, 3)
    record = fit(model, SEVERAL, objective=BinaryCrossEntropy(), metrics={"exact_match": exact_match})["evaluation"]
    logits = model(X).detach()
    assert record.keys() == {"loss", "exact_match"}
    assert record["exact_match"] == pytest.approx(float(exact_match(logits, SEVERAL)))
    assert record["loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, SEVERAL)), abs=1e-6)


def rank_correlation(output, y):
    """A metric of all samples at once, which is no mean of parts."""
    ranks = [one.argsort().argsort().double() for one in (output[:, 0], y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_a_metric_is_of_the_whole_evaluation_set():
    y = X.sum(1).exp()
    model = nn.Linear(4, 1)
    loss = PerSample(lambda output, y: (output[:, 0] - y.log()).square())
    record = fit(model, y, objective=loss, metrics={"rank": rank_correlation})["evaluation"]
    assert record["rank"] == pytest.approx(rank_correlation(model(X).detach(), y))
    assert record["rank"] > 0.99


def test_an_objective_of_ones_own_decides_about_its_targets():
    def regression(model, batch, plain):
        return Evaluated(loss=(model(batch.x)[:, 0] - batch.y).square().mean())

    regression_losses = PerSample(lambda output, y: (output[:, 0] - y).square())
    record = fit(nn.Linear(4, 1), X.sum(1), objective=regression, evaluation=None)
    assert record["loss"] < 1e-3
    assert fit(nn.Linear(4, 1), X.sum(1), objective=regression_losses)["evaluation"]["loss"] < 1e-3


class Wrapped(nn.Module):
    """Returns its logits in a container, as models of other libraries do."""

    def __init__(self, container):
        super().__init__()
        self.inner, self.container = nn.Linear(4, 2), container

    def forward(self, x):
        return self.container(self.inner(x), x)


CONTAINERS = {
    "dict": (lambda z, x: {"logits": z, "hidden": x}, "logits"),
    "attribute": (lambda z, x: SimpleNamespace(logits=z), "logits"),
    "tuple": (lambda z, x: (x, z), 1),
    "function": (lambda z, x: [z], lambda output: output[0]),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_logits_are_selected_from_any_output(case):
    container, logits = CONTAINERS[case]
    plain = fit(nn.Linear(4, 2), BINARY)
    metrics = {"mean": lambda output, y: output.mean()}
    record = fit(Wrapped(container), BINARY, objective=CrossEntropy(logits=logits), metrics=metrics)
    assert record["evaluation"].pop("mean") != 0
    assert record == plain


@pytest.mark.parametrize("trades", [None, 2.0])
def test_adversarial_training_selects_logits_as_its_attack_does(trades):
    def run(model, logits):
        attack = PGD(eps=0.05, step=0.02, steps=2, logits=logits, restarts=1)
        judge = RobustEvaluation(attack, images=50)
        settings = {"objective": AdversarialTraining(attack, trades=trades), "robust": judge}
        return fit(model, BINARY, X.sigmoid(), **settings)

    assert run(Wrapped(CONTAINERS["dict"][0]), "logits") == run(nn.Linear(4, 2), None)


def test_a_loss_of_ones_own_gets_the_output_as_it_is():
    loss = PerSample(lambda output, y: F.cross_entropy(output["logits"], y, reduction="none"))
    metrics = {"accuracy": lambda output, y: (output["logits"].argmax(1) == y).float().mean()}
    model = Wrapped(lambda z, x: {"logits": z, "attentions": None})
    record = fit(model, BINARY, objective=loss, metrics=metrics)
    assert record["evaluation"]["accuracy"] > 0.9
    loss = PerSample(lambda output, y: F.cross_entropy(output.logits, y, reduction="none"))
    with pytest.raises(BackpassError, match="the model returns a SimpleNamespace"):
        fit(Wrapped(CONTAINERS["attribute"][0]), BINARY, objective=loss, metrics=metrics)


@pytest.mark.parametrize(
    ("model", "y", "objective", "message"),
    [
        (Wrapped(CONTAINERS["dict"][0]), BINARY, CrossEntropy(), r"dict with keys \['hidden', 'logits'\].*logits="),
        (Wrapped(CONTAINERS["dict"][0]), BINARY, CrossEntropy(logits="logit"), "logits='logit' selects nothing"),
        (nn.Linear(4, 1), BINARY, CrossEntropy(), r"one output.*BinaryCrossEntropy\(\)"),
        (nn.Linear(4, 2), BINARY, BinaryCrossEntropy(), "as many logits as targets"),
        (nn.Linear(4, 1), BINARY + 1, BinaryCrossEntropy(), r"targets must be in \[0, 1\], and these are 1 to 2"),
        (nn.Linear(4, 2), torch.ones(200, 2), CrossEntropy(), "rows that sum to 1"),
        (nn.Linear(4, 2), torch.ones(200, 3) / 3, CrossEntropy(), r"shape \(N, 2\)"),
    ],
)
def test_outputs_and_targets_that_do_not_fit(model, y, objective, message):
    with pytest.raises(BackpassError, match=message):
        fit(model, y, objective=objective)


def test_probabilities_are_targets():
    soft = torch.stack([0.9 - 0.8 * BINARY, 0.1 + 0.8 * BINARY], 1)
    model = nn.Linear(4, 2)
    record = fit(model, soft)
    assert record["evaluation"]["loss"] == pytest.approx(float(F.cross_entropy(model(X), soft).detach()), abs=1e-6)
    assert "accuracy" not in record


def test_mixup_is_its_definition():
    """x <- w x + (1 - w) x', and the loss is w loss(y) + (1 - w) loss(y'), over one permutation of the batch."""
    seen = []

    class Recording(nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    model = Recording(4, 2)
    labels = torch.arange(4) % 2
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.0),
        (torch.eye(4), labels),
        epochs=1,
        batch_size=4,
        objective=CrossEntropy(mixup=0.4, label_smoothing=0.1),
    )
    loss = trainer.fit().history[-1]["loss"]
    mixed = seen[-1]
    order = torch.cat([batch.index for parts, _, _ in Batches(trainer, 0, 1).epoch(0) for batch in parts])
    weight = float(mixed.gather(1, order[:, None]).min())
    assert 0 < weight < 1
    # A row that is its own partner stays a unit vector; every other one has w at itself and 1 - w at its partner.
    partner = (mixed - weight * torch.eye(4)[order]).argmax(1)
    torch.testing.assert_close(mixed, weight * torch.eye(4)[order] + (1 - weight) * torch.eye(4)[partner])
    assert sorted(partner.tolist()) == [0, 1, 2, 3]
    output = model(mixed)
    parts = [F.cross_entropy(output, labels[rows], label_smoothing=0.1) for rows in (order, partner)]
    assert loss == pytest.approx(float((weight * parts[0] + (1 - weight) * parts[1]).detach()), abs=1e-6)


class Named(nn.Module):
    """Takes its inputs by keyword and returns a dict, as models of language do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 2)

    def forward(self, words, mask):
        return {"logits": self.head((self.embedding(words) * mask[..., None]).mean(1))}


class Sentences(Dataset):
    words = torch.randint(7, (40, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 40

    def __getitem__(self, place):
        words = self.words[place]
        return {"words": words, "mask": (words > 1).float()}, words.sum() % 2


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"step_scheduler": "step"}], ids=["", "parts", "halves"])
def test_inputs_in_a_dict_are_the_models_keywords(settings):
    model, reference, data = Named(), Named(), Sentences()
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (model, reference)]
    settings["scheduler"] = ControlledLR(optimizers[0]) if "step_scheduler" in settings else None
    loader = DataLoader(data, batch_size=20)
    objective = CrossEntropy(logits="logits")
    trainer = Trainer(model, optimizers[0], loader, epochs=1, objective=objective, evaluation=data, **settings)
    found = trainer.fit().history[-1]["evaluation"]
    for x, y in loader:
        loss = F.cross_entropy(reference(**x)["logits"], y)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    x, y = torch.utils.data.default_collate([data[place] for place in range(40)])
    assert found["loss"] == pytest.approx(float(F.cross_entropy(reference(**x)["logits"], y).detach()), rel=1e-5)


def test_mixup_of_words_is_refused():
    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    objective = CrossEntropy(logits="logits", mixup=0.2)
    with pytest.raises(BackpassError, match="leave mixup out"):
        Trainer(model, optimizer, Sentences(), epochs=1, batch_size=10, objective=objective).fit()


def test_a_measuring_schedule_sees_the_same_mixture():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    halves = []

    class Spy(ControlledLR):
        def measure(self, losses):
            halves.append(sum(float(loss().detach()) for loss in losses) / 2)

    settings = {"objective": CrossEntropy(mixup=1.0), "scheduler": Spy(optimizer), "step_scheduler": "step"}
    losses = []
    Trainer(
        model,
        optimizer,
        (X, BINARY),
        epochs=1,
        batch_size=20,
        log_every=1,
        on_progress=lambda progress: losses.append(progress.record["loss"]),
        **settings,
    ).fit()
    assert halves == pytest.approx(losses[:-1], abs=1e-5)  # the last record is the epoch's
