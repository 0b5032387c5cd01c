"""The command line: class files, target classes, transfer that goes on, several processes, SIGTERM, progress."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from backpass.cli import printing
from backpass.data import load_data
from backpass.data.class_map import match_classes
from backpass.errors import BackpassError
from support.command_line import run
from support.users_network import BASE, timeless

SMALL = [*BASE[:-3], "60", "--step", "0.05"]


def folder(tmp_path, names):
    """Digits as a folder of named classes."""
    digits = load_data("digits").images
    for label, name in names.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for row in (digits.labels == label).nonzero().flatten()[:8].tolist():
            stream = io.BytesIO()
            Image.fromarray(np.asarray(digits.pixels[row, 0] * 15, dtype=np.uint8)).save(stream, format="PNG")
            (tmp_path / "images" / name / f"{row}.png").write_bytes(stream.getvalue())
    return str(tmp_path / "images")


NAMES = {7: "alpha", 2: "beta", 4: "gamma"}
WORDS = ["zero", "one", "beta", "three", "gamma", "five", "six", "alpha", "eight", "nine"]
FILES = {
    "names.txt": "\n".join(WORDS),
    "numbers.txt": "7\n2\n4\n",
    "identifiers.txt": "\n".join(f"n{i:04} {word}, digit {i}" for i, word in enumerate(WORDS)),
    "names.json": json.dumps(WORDS),
    "numbers.json": "[7, 2, 4]",
    "outputs.json": '{"alpha": 7, "beta": 2, "gamma": 4}',
    "imagenet.json": json.dumps({str(i): [f"n{i:04}", word] for i, word in enumerate(WORDS)}),
}


@pytest.mark.parametrize("file", FILES)
def test_labels_become_the_outputs_that_the_file_says(file, tmp_path):
    path = tmp_path / file
    path.write_text(FILES[file])
    data = match_classes(load_data(folder(tmp_path, NAMES)), path, 10, "net")
    assert data.classes == 10
    assert sorted(set(data.images.labels.tolist())) == [2, 4, 7]
    assert [data.class_name(label) for label in (7, 2, 4)] == ["alpha", "beta", "gamma"]
    assert torch.bincount(data.images.labels.long()).tolist() == [0, 0, 8, 0, 8, 0, 0, 8]


WRONG = {
    "missing.txt": ("alpha\nbeta\n", "does not name 1 of the data's 3 classes, for instance 'gamma'"),
    "near.txt": ("alpha\nbeta\ngama\n", "Did you mean 'gama'"),
    "few.txt": ("1\n2\n", "holds 2 numbers for 3 classes"),
    "twice.txt": ("1\n1\n2\n", "own output, 0 to 9; got one twice"),
    "large.txt": ("1\n2\n10\n", "own output, 0 to 9; got gamma: 10"),
    "broken.json": ("[1,", "is no valid JSON"),
    "number.json": ("3", "must hold a list of classes"),
}


@pytest.mark.parametrize("file", WRONG)
def test_a_file_that_does_not_match_says_what_is_missing(file, tmp_path):
    content, message = WRONG[file]
    (tmp_path / file).write_text(content)
    with pytest.raises(BackpassError, match=message):
        match_classes(load_data(folder(tmp_path, NAMES)), tmp_path / file, 10, "net")


def test_other_outputs_than_folders_are_refused_and_empty_folders_allowed(tmp_path):
    path = folder(tmp_path, {i: str(i) for i in range(4)})
    command = [
        "attack",
        *SMALL[:4],
        "--data",
        path,
        "--eps",
        "0.2",
        "--step",
        "0.05",
        "--curves",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    for own in ([], ["--model", "mymodel:Pair", "--logits", "logits"]):
        refused = run(*command, *own)
        assert " has 10 outputs" in str(refused.exception)
        assert "--classes FILE" in str(refused.exception)
    for i in range(4, 10):
        (tmp_path / "images" / str(i)).mkdir()
    assert run(*command).exit_code == 0
    numbers = json.loads((tmp_path / "out" / "result.json").read_text())["numbers"]["rules"]["bp"]
    assert numbers["clean_accuracy"]["value"] > 0.8


@pytest.mark.parametrize("target", ["next", "random", "second", "least-likely", "3"])
def test_targeted_attacks(target, tmp_path):
    ended = run(
        "attack", *SMALL, "--eps", "0.5", "--target-class", target, "--curves", "0", "--out", str(tmp_path / "out")
    )
    assert ended.exit_code == 0, ended.exception
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    found = written["numbers"]["rules"]["bp"]["attacks"]["pgd at eps 0.5"]
    assert "targeted True" in written["settings"]["pgd at eps 0.5"]
    assert found["success_rate"]["value"] > 0.3
    if target == "3":
        confusion = torch.zeros(10, 10, dtype=torch.long)
        for label, seen, count in found["confusion"]:
            confusion[label, seen] = count
        assert confusion.sum() == confusion[:, 3].sum()
    assert written["settings"]["target class"] == ("3 (3)" if target == "3" else target)


def test_an_unknown_target_class_and_an_attack_without_targets(tmp_path):
    refused = run("attack", *SMALL, "--eps", "0.5", "--target-class", "nxt", "--out", str(tmp_path / "out"))
    assert "unknown target class 'nxt'. Did you mean 'next'?" in str(refused.exception)
    refused = run(
        "attack",
        *SMALL[:-2],
        "--eps",
        "0.5",
        "--attack",
        "fab",
        "--target-class",
        "next",
        "--out",
        str(tmp_path / "out"),
    )
    assert "leave targeted=False" in str(refused.exception)


TRANSFER = [
    "transfer", "--source", "mymodel:Net@net.pt", "--target", "mymodel:wide@wide.pt", "--target", "mymodel:Net@net.pt",
    "--data", "digits", "--limit", "60", "--eps", "0.2", "--step", "0.05", "--batch-size", "16",
]  # fmt: skip


def test_transfer_goes_on_where_it_was(tmp_path):
    assert run(*TRANSFER, "--out", str(tmp_path / "whole")).exit_code == 0
    killed = subprocess.run(
        [sys.executable, "-m", "backpass", *TRANSFER, "--out", str(tmp_path / "part")],
        env={**os.environ, "DIE_AT": "60", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -9
    finished = len(list((tmp_path / "part" / "shards").glob("*.pt")))
    assert finished > 0
    refused = run(*TRANSFER, "--out", str(tmp_path / "part"))
    assert "--resume goes on from them" in str(refused.exception)
    assert run(*TRANSFER, "--out", str(tmp_path / "part"), "--resume").exit_code == 0
    one, other = (timeless(tmp_path / name / "result.json") for name in ("whole", "part"))
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["attack", *SMALL, "--eps", "0.2", "--batch-size", "16", "--curves", "20"], TRANSFER]
)
def test_two_processes_write_what_one_does(command, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", launcher)):
        ended = subprocess.run(
            [sys.executable, *start, "-m", "backpass", *command, "--out", str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert ended.stdout.count("Written:") == 1
    assert timeless(tmp_path / "one" / "result.json") == timeless(tmp_path / "two" / "result.json")


def test_sigterm_ends_as_ctrl_c_does(tmp_path):
    command = ["attack", *SMALL[:-2], "--eps", "0.2", "--batch-size", "10", "--attack", "square:queries=20000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "backpass", *command, "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not list((tmp_path / "out" / "shards").glob("*.pt")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Interrupted. Finished parts are kept: --resume goes on with them." in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out" / "shards").glob("*.partial"))


def test_progress_is_told_in_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(printing, "_EVERY", 0.0)
    with printing.working("loading") as report:
        report("attack with [bp]", 0.25)
        report("attack with [bp]", 0.251)
        report("attack with [bp]", 0.5)
    assert capsys.readouterr().err == "attack with [bp]: 25%\nattack with [bp]: 50%\n"
