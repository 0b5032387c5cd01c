"""evaluate: its numbers against a slow loop, its shards, and the same answer from several or killed processes."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from backpass.attacks import FGSM, PGD, Square, evaluate
from backpass.attacks.report import wilson
from backpass.errors import BackpassError

ATTACK = PGD(eps=0.08, step=0.03, steps=4, restarts=2)


@pytest.fixture
def data(held_out):
    return held_out.x[:150], held_out.y[:150]


def test_the_rates_are_those_of_a_slow_loop(cnn, data):
    x, y = data
    report = evaluate(cnn, data, ATTACK, batch_size=64)
    right = cnn(x).argmax(1) == y
    fooled = torch.zeros_like(right)
    for i in right.nonzero().flatten().tolist():
        fooled[i] = ATTACK(cnn, x[i : i + 1], y[i : i + 1], indices=torch.tensor([i])).success
    assert torch.equal(report.success, fooled)
    assert report.clean_accuracy == pytest.approx(right.float().mean().item())
    assert report.robust_accuracy == pytest.approx((right & ~fooled).float().mean().item())
    assert report.success_rate == pytest.approx((fooled.sum() / right.sum()).item())
    assert 0.05 < report.success_rate < 0.95


def test_nothing_is_hashed_unless_the_run_can_be_resumed(cnn, data, tmp_path, monkeypatch):
    def refuse(content=b""):
        raise AssertionError("hashed")

    expected = evaluate(cnn, data, ATTACK, batch_size=64).success
    monkeypatch.setattr("hashlib.sha256", refuse)
    assert torch.equal(evaluate(cnn, data, ATTACK, batch_size=64).success, expected)
    with pytest.raises(AssertionError, match="hashed"):
        evaluate(cnn, data, ATTACK, batch_size=64, resume=tmp_path)


def test_several_attacks_give_each_and_the_worst_case(cnn, data):
    report = evaluate(cnn, data, {"weak": FGSM(eps=0.03), "strong": ATTACK}, batch_size=64)
    weak, strong = (report.attacks[name].success for name in ("weak", "strong"))
    assert torch.equal(report.success, weak | strong)
    assert report.robust("weak").value > report.robust("strong").value >= report.robust_accuracy
    assert report.attacks["strong"].settings["eps"] == 0.08
    assert report.attacks["strong"].gradients > report.attacks["weak"].gradients > 0


def test_confusion_counts_what_becomes_what(cnn, data):
    report = evaluate(cnn, data, ATTACK, batch_size=64)
    confusion, record = report.confusion(), report.attacks["PGD"]
    assert confusion.shape == (10, 10)
    assert confusion.sum() == report.success.sum()
    assert confusion.diagonal().sum() == 0
    for i in report.success.nonzero().flatten().tolist():
        assert confusion[report.y[i], record.prediction[i]] > 0


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_intervals_are_the_published_ones(hits, trials, low, high):
    assert wilson(hits, trials) == pytest.approx((low, high), abs=1e-4)


def test_data_comes_as_tensors_a_data_set_or_a_loader(cnn, data):
    whole = evaluate(cnn, data, ATTACK, batch_size=40)
    for other in (TensorDataset(*data), DataLoader(TensorDataset(*data), batch_size=17)):
        report = evaluate(cnn, other, ATTACK, batch_size=40)
        assert torch.equal(report.attacks["PGD"].loss.nan_to_num(), whole.attacks["PGD"].loss.nan_to_num())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x, y: (x[:0], y[:0]), "the data is empty"),
        (lambda x, y: (x, y[:3]), r"a pair \(x, y\) of tensors of equal length"),
        (lambda x, y: DataLoader(TensorDataset(x, y), shuffle=True), "pass shuffle=False"),
        (lambda x, y: (2 * x, y), r"max is 2: did you normalise before the model\?"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(cnn, data, bad, message):
    with pytest.raises(BackpassError, match=message):
        evaluate(cnn, bad(*data), ATTACK)


def test_attacks_that_cannot_be_meant_are_refused(cnn, data):
    with pytest.raises(BackpassError, match="at least one"):
        evaluate(cnn, data, [])
    with pytest.raises(BackpassError, match="must be attacks, for instance PGD"):
        evaluate(cnn, data, ["pgd"])
    with pytest.raises(BackpassError, match="needs targets="):
        evaluate(cnn, data, PGD(targeted=True))


def test_targets_lead_targeted_attacks(cnn, data):
    attack = PGD(eps=0.3, step=0.05, targeted=True)
    report = evaluate(cnn, data, attack, targets=lambda y: (y + 1) % 10)
    hit = report.success
    assert hit.float().mean() > 0.5
    assert torch.equal(report.attacks["PGD"].prediction[hit], (report.y[hit] + 1) % 10)


def test_progress_counts_samples(cnn, data):
    seen = []
    evaluate(cnn, data, FGSM(eps=0.1), batch_size=64, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 150), (128, 150), (150, 150)]


def test_a_report_is_json_with_all_its_settings(cnn, data):
    import json

    written = json.loads(json.dumps(evaluate(cnn, data, ATTACK, batch_size=64).to_dict()))
    assert written["versions"]["torch"] == torch.__version__
    assert written["attacks"]["PGD"]["settings"] == {
        "attack": "PGD",
        **{f.name: getattr(ATTACK, f.name) for f in dataclasses.fields(ATTACK)},
        "bounds": [0.0, 1.0],
    }
    low, high = written["robust_accuracy"]["interval"]
    assert low < written["robust_accuracy"]["value"] < high


def test_nothing_is_computed_twice(cnn, data, tmp_path):
    first = evaluate(cnn, data, ATTACK, batch_size=64, resume=tmp_path)
    again = evaluate(cnn, data, ATTACK, batch_size=64, resume=tmp_path)
    assert (first.shards_computed, first.shards_reused) == (3, 0)
    assert (again.shards_computed, again.shards_reused) == (0, 3)
    assert again.to_dict() == first.to_dict()


def changed_weight(model):
    with torch.no_grad():
        model[-1].bias[0] += 1e-3


def attached_rule(model):
    from backpass import LinBP

    LinBP(start=-1).attach(model)


def other_behaviour(model):
    model.register_forward_hook(lambda module, args, output: 1.01 * output)


def test_a_changed_model_reuses_no_shard(cnn, data, tmp_path):
    evaluate(cnn, data, ATTACK, batch_size=64, resume=tmp_path)
    for change in (changed_weight, other_behaviour, attached_rule):
        change(cnn)
        assert evaluate(cnn, data, ATTACK, batch_size=64, resume=tmp_path).shards_reused == 0, change


@pytest.mark.parametrize(
    "setting",
    [{"eps": 0.081}, {"seed": 1}, {"steps": 5}, {"loss": "dlr"}, {"early_stop": False}, {"loss": lambda z, y: z[:, 0]}],
)
def test_a_changed_setting_reuses_no_shard(cnn, data, tmp_path, setting):
    evaluate(cnn, data, ATTACK, batch_size=64, resume=tmp_path)
    report = evaluate(cnn, data, dataclasses.replace(ATTACK, **setting), batch_size=64, resume=tmp_path)
    assert report.shards_reused == 0


def test_changed_data_reuses_no_shard_but_those_that_are_the_same(cnn, data, tmp_path):
    x, y = data
    evaluate(cnn, data, ATTACK, batch_size=64, resume=tmp_path)
    x = x.clone()
    x[100, 0, 0, 0] = 0.5
    report = evaluate(cnn, (x, y), ATTACK, batch_size=64, resume=tmp_path)
    assert (report.shards_computed, report.shards_reused) == (1, 2)
    assert evaluate(cnn, data, ATTACK, batch_size=64, resume=tmp_path, tag="b").shards_reused == 0


def test_a_setting_that_cannot_be_recognised_again_is_refused_with_resume(cnn, data, tmp_path):
    class Loss:
        def __call__(self, logits, y):
            return logits[:, 0]

    attack = PGD(loss=Loss(), steps=1, restarts=1)
    with pytest.raises(BackpassError, match="cannot be recognised again"):
        evaluate(cnn, data, attack, resume=tmp_path)
    evaluate(cnn, data, attack)


def test_square_needs_no_gradient_and_still_resumes(mlp, data, tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x.detach()).detach()

    for expected in (0, 1):
        report = evaluate(Masked(), data, Square(queries=5), resume=tmp_path)
        assert report.shards_reused == expected


SCRIPT = """
    import json, os, signal, sys
    import torch
    from sklearn.datasets import load_digits
    from backpass.attacks import FGSM, PGD, evaluate

    folder, kill_after = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    model = model.double()
    x = torch.tensor(load_digits().data[:100]).view(-1, 1, 8, 8) / 16
    y = model(x).argmax(1)
    calls = 0

    def count(*_):
        global calls
        calls += 1
        if calls == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(count)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    attacks = {"pgd": PGD(eps=0.1, step=0.03, steps=4, restarts=3), "fgsm": FGSM(eps=0.1)}
    report = evaluate(model, (x, y), attacks, batch_size=16, resume=folder or None)
    answer = report.to_dict()
    answer["loss"] = report.attacks["pgd"].loss.tolist()
    rank = os.environ.get("RANK", "0")
    shards = [report.shards_computed, report.shards_reused]
    with open(f"{sys.argv[3]}-{rank}.json", "w") as file:
        json.dump({"answer": answer, "shards": shards}, file)
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script: one process, or several under torchrun; returns (return code, what each rank wrote)."""
    import json

    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))

    def start(name, folder="", kill_after=0, processes=1):
        launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *launcher, str(path), str(folder), str(kill_after), str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode
        return code, [json.loads(file.read_text()) for file in sorted(tmp_path.glob(f"{name}-*.json"))]

    return start


def test_two_processes_answer_as_one(run):
    _, (one,) = run("one")
    code, both = run("two", processes=2)
    assert code == 0
    assert len(both) == 2
    for rank in both:
        assert rank == one


def test_a_killed_evaluation_goes_on_where_it_was(run, tmp_path):
    _, (whole,) = run("whole")
    code, nothing = run("killed", folder=tmp_path / "shards", kill_after=60)
    assert code == -9
    assert nothing == []
    finished = len(list((tmp_path / "shards").glob("*.pt")))
    _, (resumed,) = run("resumed", folder=tmp_path / "shards")
    assert resumed["answer"] == whole["answer"]
    computed, reused = resumed["shards"]
    assert computed + reused == whole["shards"][0] == 14  # seven batches, two attacks
    # Per batch there is one more file, of the clean predictions.
    assert 0 < reused < 14
    assert reused <= finished <= reused + reused // 2 + 1
