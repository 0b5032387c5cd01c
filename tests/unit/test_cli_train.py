"""`backpass train` and `backpass runs`: a user's own network, recipes, resumption, mistakes that are told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import torch
from typer.testing import CliRunner

from backpass import cli
from backpass.attacks import PGD, evaluate
from backpass.data import load_data
from backpass.lab.subjects import load_subject
from backpass.lab.training.parts import load_parts

NETWORK = '''
from torch import nn

class Net(nn.Module):
    """Takes digits."""

    def __init__(self, classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.head = nn.Linear(48, classes)

    def forward(self, x):
        return self.head(self.body(x))

def few():
    return Net(4)

class Smooth(nn.Module):
    """Without an activation that a rule could act on."""

    def __init__(self):
        super().__init__()
        self.flatten, self.head = nn.Flatten(), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.flatten(x))

def broken():
    raise RuntimeError("no such wheel")
'''

ADAM = ["--optimizer", "adam", "--lr", "0.005"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "trained_nets.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "trained_nets", raising=False)
    yield tmp_path
    sys.modules.pop("trained_nets", None)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def train(out, *arguments, data="digits", model="trained_nets:Net"):
    ended = run("train", "--data", data, "--model", model, *arguments, "--out", out)
    assert ended.exit_code == 0, f"{ended.output} {ended.exception}"
    return ended.output


def test_a_users_own_network_is_trained_and_then_attacked_as_the_last_line_says(here):
    told = train("net", *ADAM, "--epochs", 3, "--rule", "linbp:start=-1")
    test = load_data("digits").images
    subject = load_subject("trained_nets:Net", here / "net/weights.safetensors", device=torch.device("cpu"))
    accuracy = (subject.network(test.x).argmax(1) == test.y).double().mean().item()
    assert accuracy > 0.85
    assert f"test accuracy {accuracy:.2%}" in told
    command = re.search(r"Attack it: backpass (.*)", told)[1]
    ended = run(*command.split(), "--curves", 0)
    assert ended.exit_code == 0, ended.output


def test_the_recipe_in_the_folder_repeats_the_run_to_the_bit(here):
    train(
        "one", *ADAM, "--epochs", 2, "--augment", "crop=1,flip", "--scheduler", "cosine", "--clip-norm", 1, "--seed", 3
    )
    again = run("train", "--recipe", "one/recipe.toml", "--out", "two")
    assert again.exit_code == 0, again.output
    for name in ("log.jsonl", "weights.safetensors", "recipe.toml"):
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes()


def test_the_settings_of_the_trainer_are_options(here):
    options = ["--checkpoint-every", 20, "--keep", 9, "--log-every", 10, "--scheduler", "one-cycle", "--mixup", 0.2]
    train("out", *ADAM, *options, "--max-steps", 50, "--epochs", 3, "--no-drop-last", "--loggers", "tensorboard")
    kept = [path.stem for path in sorted((here / "out/checkpoints").glob("*.pt"))]
    assert kept == [f"step-{step:08d}" for step in (0, 20, 22, 40, 44, 50)]
    recipe = tomllib.loads((here / "out/recipe.toml").read_text())
    assert (recipe["checkpoint_every"], recipe["loggers"], recipe["drop_last"]) == (20, ["tensorboard"], False)
    assert list((here / "out/tensorboard").iterdir())
    train("timed", *ADAM, "--checkpoint-every", "10min")
    assert tomllib.loads((here / "timed/recipe.toml").read_text())["checkpoint_every"] == "10min"


def test_options_override_the_recipe(here):
    (here / "mine.toml").write_text('data = "digits"\nmodel = "mlp:widths=32"\nepochs = 7\nrule = "linbp:start=0"\n')
    ended = run("train", "--recipe", "mine.toml", "--epochs", 1, "--rule", "bp", "--lr", "0.02", "--out", "out")
    assert ended.exit_code == 0, ended.output
    recipe = tomllib.loads((here / "out/recipe.toml").read_text())
    assert (recipe["model"], recipe["epochs"], recipe["rule"], recipe["lr"]) == ("mlp:widths=32", 1, ["bp"], 0.02)


def test_adversarial_training_makes_a_network_robust(here):
    adversary = "pgd:eps=0.15,steps=7"
    train("plain", *ADAM, "--epochs", 8)
    told = train("robust", *ADAM, "--epochs", 8, "--adversary", adversary, "--adversary-rule", "linbp:start=-1")
    test = load_data("digits").images
    judge = PGD(eps=0.15, step=0.15 * 2.5 / 20, steps=20, restarts=1)
    robust = {}
    for name in ("plain", "robust"):
        subject = load_subject("trained_nets:Net", here / name / "weights.safetensors", device=torch.device("cpu"))
        robust[name] = evaluate(subject.network, (test.x, test.y), judge).robust_accuracy
    assert robust["robust"] > robust["plain"] + 0.2
    assert f"robust accuracy {robust['robust']:.1%}" in told
    assert "--attack apgd --eps 0.15" in told
    recipe = tomllib.loads((here / "robust/recipe.toml").read_text())
    assert recipe["adversary"].startswith("pgd:eps=0.15,step=0.0535")


def test_trades_warmup_and_averages(here):
    told = train(
        "a",
        *ADAM,
        "--adversary",
        "pgd:eps=0.1,steps=2",
        "--trades",
        4,
        "--warmup",
        1,
        "--average",
        "ema:0.9",
        "--robust",
        "none",
    )
    assert "averaged" in told
    assert "robust" not in told
    assert (here / "a/weights-last.safetensors").is_file()
    assert (here / "a/weights-last.safetensors").read_bytes() != (here / "a/weights.safetensors").read_bytes()


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "step:every=1,gamma=0.5", "exponential", "controlled"])
def test_every_scheduler_moves_the_rate(here, scheduler):
    train("out", "--optimizer", "sgd", "--lr", 0.3, "--epochs", 2, "--scheduler", scheduler, model="mlp:widths=32")
    rates = [json.loads(line)["lr"] for line in (here / "out/log.jsonl").read_text().splitlines()]
    assert rates[-1] < 0.3 or scheduler == "controlled"
    assert rates[-1] <= rates[0]


def test_the_weights_of_a_run_are_where_another_starts(here):
    train("first", *ADAM, "--epochs", 3)
    told = train("second", "--weights", "first/weights.safetensors", "--lr", 1e-6, "--epochs", 1)
    assert float(re.search(r"test accuracy ([\d.]+)%", told)[1]) > 85


def test_folders_of_classes_without_parts_have_a_tenth_held_out(here):
    from PIL import Image

    digits = load_data("digits", split="train").images
    for row in range(400):
        place = here / "images" / f"digit{digits.y[row]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.pixels[row, 0] * 15).numpy()).save(place / f"{row}.png")
    told = train("out", *ADAM, "--epochs", 10, "--limit", 300, data="images")
    assert "300 of them" in told
    assert float(re.search(r"test accuracy ([\d.]+)%", told)[1]) > 60
    assert "--split held-out" in told  # or the attack would be on images that were learned from
    parts, held = load_parts("images"), load_data("images", split="held-out")
    assert f"{len(held.images)} held out" in told
    assert 35 <= len(held.images) <= 45
    assert torch.equal(held.images.pixels, parts.test.images.pixels)
    assert len(parts.train.images) + len(held.images) == len(load_data("images").images) == 400


def test_a_run_that_diverges_says_so(here):
    ended = run("train", "--data", "digits", "--model", "mlp", "--lr", 1e6, "--out", "out")
    assert ended.exit_code == 1
    assert "diverged" in ended.output
    assert "A lower --lr" in ended.output


def test_ctrl_c_saves_and_resume_goes_on(here):
    command = [sys.executable, "-m", "backpass", "train", "--out", "out", "--epochs", "400", "--batch-size", "32"]
    process = subprocess.Popen(
        [*command, "--data", "digits", "--model", "trained_nets:Net", "--average", "ema:0.9"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (
        not (here / "out/log.jsonl").exists() or not (here / "out/log.jsonl").read_text()
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Continue: backpass train --resume --out out" in told
    listed = json.loads(run("runs", "out", "--json").output)
    assert listed[0]["status"] == "interrupted"
    done = listed[0]["epoch"]
    refused = run("train", "--resume", "--out", "out", "--lr", 0.5)
    assert refused.exit_code != 0
    assert "lr: was 0.01, is 0.5" in str(refused.exception)
    again = run("train", "--data", "digits", "--model", "trained_nets:Net", "--out", "out")
    assert "continue it with --resume" in str(again.exception)
    assert done < 400


def test_two_processes_by_torchrun(here):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "backpass", "train", "--data", "digits", "--model", "trained_nets:Net", *ADAM, "--epochs", "2"]
    more = ["--adversary", "pgd:eps=0.05,steps=2", "--trades", "1", "--out", "two", "--robust-images", "50"]
    ended = subprocess.run(
        [*torchrun, *command, *more],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("Attack it:") == 1
    train("one", *ADAM, "--epochs", 2, "--adversary", "pgd:eps=0.05,steps=2", "--trades", 1, "--robust-images", 50)
    one, two = (json.loads((here / name / "log.jsonl").read_text().splitlines()[0]) for name in ("one", "two"))
    assert one["loss"] == pytest.approx(two["loss"], abs=0.02)


def test_runs_lists_and_sorts(here):
    train("all/good", *ADAM, "--epochs", 3)
    train("all/bad", *ADAM, "--lr", "1e-5", "--adversary", "pgd:eps=0.05,steps=2", "--robust-images", 40)
    listed = json.loads(run("runs", "all", "--json", "--sort", "accuracy").output)
    assert [one["folder"] for one in listed] == ["all/good", "all/bad"]
    assert listed[0]["status"] == "finished"
    assert listed[0]["robust_accuracy"] is None
    assert listed[1]["robust_accuracy"] is not None
    assert listed[1]["adversary"].startswith("pgd:eps=0.05")
    table = run("runs", "all").output
    assert f"{listed[0]['accuracy']:.2%}" in table


MISTAKES = {
    "no data": (["--model", "mlp"], "does not name data:"),
    "nothing": ([], "does not name data and model"),
    "unknown data": (["--data", "digit", "--model", "mlp"], "Did you mean 'digits'"),
    "unknown model": (["--data", "digits", "--model", "lenet"], "Did you mean 'lenet5'"),
    "model too small": (["--data", "digits", "--model", "lenet5"], "at least 12x12"),
    "no such module": (["--data", "digits", "--model", "nowhere:Net"], "cannot import"),
    "no such class": (["--data", "digits", "--model", "trained_nets:Ned"], "Did you mean 'Net'"),
    "broken model": (["--data", "digits", "--model", "trained_nets:broken"], "no such wheel"),
    "too few classes": (["--data", "digits", "--model", "trained_nets:few"], "4 outputs"),
    "unknown rule": (["--data", "digits", "--model", "mlp", "--rule", "linpb"], "Did you mean 'linbp'"),
    "rule without site": (["--data", "digits", "--model", "trained_nets:Smooth", "--rule", "linbp"], "finds no site"),
    "adversary without eps": (["--data", "digits", "--model", "mlp", "--adversary", "pgd:steps=3"], "add eps"),
    "eps of 8": (["--data", "digits", "--model", "mlp", "--adversary", "pgd:eps=8"], "Did you mean 8/255"),
    "unknown adversary": (["--data", "digits", "--model", "mlp", "--adversary", "pdg:eps=0.1"], "Did you mean 'pgd'"),
    "unknown setting": (
        ["--data", "digits", "--model", "mlp", "--adversary", "pgd:eps=0.1,stesp=3"],
        "Did you mean 'step'",
    ),
    "wrong setting": (["--data", "digits", "--model", "mlp", "--adversary", "pgd:eps=0.1,steps=few"], "a whole number"),
    "trades alone": (["--data", "digits", "--model", "mlp", "--trades", "6"], "give an adversary too"),
    "trades negative": (
        ["--data", "digits", "--model", "mlp", "--adversary", "pgd:eps=.1", "--trades", "-1"],
        "beta, a positive",
    ),
    "trades of FAB": (
        ["--data", "digits", "--model", "mlp", "--adversary", "fab:eps=.1", "--trades", "1"],
        "chooses its losses",
    ),
    "unknown optimizer": (["--data", "digits", "--model", "mlp", "--optimizer", "adamm"], "Did you mean 'adam'"),
    "unknown momentum": (
        ["--data", "digits", "--model", "mlp", "--optimizer", "sgd:momentun=0.9"],
        "Did you mean 'momentum'",
    ),
    "momentum a word": (["--data", "digits", "--model", "mlp", "--optimizer", "sgd:momentum=big"], "cannot be made"),
    "negative lr": (["--data", "digits", "--model", "mlp", "--lr", "-1"], "a finite number above 0"),
    "unknown scheduler": (["--data", "digits", "--model", "mlp", "--scheduler", "cosin"], "Did you mean 'cosine'"),
    "scheduler's setting": (["--data", "digits", "--model", "mlp", "--scheduler", "step:every=x"], "numbers above 0"),
    "unknown dtype": (["--data", "digits", "--model", "mlp", "--dtype", "bf16"], "Did you mean 'bfloat16'"),
    "float16 on the CPU": (["--data", "digits", "--model", "mlp", "--dtype", "float16"], "float16 is for CUDA"),
    "unknown device": (["--data", "digits", "--model", "mlp", "--device", "gpu"], "cannot be used here"),
    "augmentation": (["--data", "digits", "--model", "mlp", "--augment", "rotate"], "unknown augmentation"),
    "crop of what": (["--data", "digits", "--model", "mlp", "--augment", "crop=big"], "crop=2"),
    "average": (["--data", "digits", "--model", "mlp", "--average", "ema:2"], "ema:d"),
    "large batch": (["--data", "digits", "--model", "mlp", "--batch-size", "5000"], "lower it"),
    "accumulate": (["--data", "digits", "--model", "mlp", "--accumulate", "100"], "accumulate=100"),
    "clip": (["--data", "digits", "--model", "mlp", "--clip-norm", "0"], "clip_norm must be a finite number above 0"),
    "smoothing": (["--data", "digits", "--model", "mlp", "--label-smoothing", "2"], "label_smoothing must be in"),
    "no weights": (["--data", "digits", "--model", "mlp", "--weights", "none.pt"], "no file of weights"),
    "nothing to resume": (["--data", "digits", "--model", "mlp", "--resume"], "no run in"),
    "no recipe": (["--recipe", "none.toml"], "there is no recipe"),
    "recipe no TOML": (["--recipe", "trained_nets.py"], "is no TOML file"),
    "recipe's key": (["--recipe", "key.toml"], "Did you mean 'epochs'"),
    "recipe's type": (["--recipe", "type.toml"], "a whole number, got 2.5"),
    "recipe's rule": (["--recipe", "rule.toml"], "rule of rule.toml must be text in quotes, or a list"),
    "unknown split": (["--data", "digits", "--model", "mlp", "--test-split", "val"], "unknown split"),
}


@pytest.mark.parametrize("arguments", [case[0] for case in MISTAKES.values()], ids=MISTAKES)
def test_mistakes_are_told_in_one_message(here, arguments, request):
    (here / "key.toml").write_text('data = "digits"\nmodel = "mlp"\nepoch = 2\n')
    (here / "type.toml").write_text('data = "digits"\nmodel = "mlp"\nepochs = 2.5\n')
    (here / "rule.toml").write_text('data = "digits"\nmodel = "mlp"\nrule = [1]\n')
    expected = MISTAKES[request.node.callspec.id][1]
    ended = run("train", *arguments, "--out", "out")
    assert isinstance(ended.exception, cli.entry.BackpassError), f"{ended.exception!r} {ended.output}"
    assert expected in str(ended.exception)
    assert not (here / "out/checkpoints").exists()  # so that the corrected command may use the folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "there is no folder"),
        (["."], "there is no training run"),
        (["damaged"], "not that of a training run"),
        (["damaged", "--sort", "speed"], "not that of a training run"),
    ],
)
def test_runs_tells_mistakes(here, arguments, expected):
    (here / "damaged").mkdir()
    (here / "damaged/run.json").write_text("{}" if arguments == ["."] else '{"status": "finished"')
    if arguments == ["."]:
        (here / "damaged/run.json").unlink()
    ended = run("runs", *arguments)
    assert expected in str(ended.exception)
