"""`backpass attack` and `backpass transfer`: a user's own network, the library's numbers, mistakes that are told."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from backpass import LinBP
from backpass.attacks import IFGSM, MIFGSM, PGD, Pool, evaluate, transfer
from backpass.data import load_data
from backpass.errors import BackpassError
from support.command_line import call, run, words
from support.users_network import ATTACK, BASE, net, timeless


def test_the_numbers_are_those_of_the_library(tmp_path):
    ended = run("attack", *BASE, "--eps", "0.1", "--rule", "linbp:start=-1", "--rule", "bp", "--out", str(tmp_path))
    assert ended.exit_code == 0, ended.output
    written = json.loads((tmp_path / "result.json").read_text())
    data, model = load_data("digits").first(120).images, net()
    reports = {"bp": evaluate(model, (data.x, data.y), PGD(eps=0.1, step=0.02, restarts=1))}
    with LinBP(start=-1).attach(model):
        reports["linbp:start=-1"] = evaluate(model, (data.x, data.y), PGD(eps=0.1, step=0.02, restarts=1))
    for rule, report in reports.items():
        ours = written["numbers"]["rules"][rule]
        found = ours["attacks"]["pgd at eps 0.1"]
        assert ours["clean_accuracy"] == json.loads(json.dumps(report.clean.to_dict()))
        assert found["success_rate"] == json.loads(json.dumps(report.fooled().to_dict()))
        assert found["gradients"] == report.attacks["PGD"].gradients
        confusion = torch.zeros(10, 10, dtype=torch.long)
        for label, seen, count in found["confusion"]:
            confusion[label, seen] = count
        assert torch.equal(confusion, report.confusion())
    (claim,) = written["claims"]
    right = reports["bp"].correct
    difference = reports["linbp:start=-1"].success[right].double() - reports["bp"].success[right].double()
    assert claim["estimate"] == pytest.approx(100 * difference.mean().item())
    assert claim["n"] == int(right.sum())
    assert list(written["numbers"]["rules"]) == ["bp", "linbp:start=-1"]  # the comparison is always with bp


def test_the_report_shows_curves_images_and_every_setting(tmp_path):
    ended = run(
        "attack", *BASE, "--eps", "0.1", "--eps", "32/255", "--rule", "bp", "--rule", "linbp", "--curves", "60",
        "--steps", "4", "--out", str(tmp_path),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    html = (tmp_path / "report.html").read_text()
    written = json.loads((tmp_path / "result.json").read_text())
    eps, steps, difference = written["series"]
    assert difference["curves"][0]["x"] == [0.1, round(32 / 255, 9)]
    assert difference["curves"][0]["mean"] == [claim["estimate"] for claim in written["claims"]]
    classes, clean = written["numbers"]["classes"], written["numbers"]["rules"]["bp"]["clean_accuracy"]
    assert sum(one["Right, clean"]["hits"] for one in classes) == clean["hits"]
    assert sum(one["Right, clean"]["trials"] for one in classes) == clean["trials"]
    assert all(one["Right, eps 0.1"]["hits"] <= one["Right, clean"]["hits"] for one in classes)
    assert [curve["label"] for curve in eps["curves"]] == ["BP", "linbp"]
    assert {0.1, round(32 / 255, 9)} <= set(eps["curves"][0]["x"])
    assert len(eps["curves"][0]["x"]) >= 6
    assert steps["curves"][0]["x"] == [1, 2, 4, 5]
    for curve in [*eps["curves"], *steps["curves"]]:
        assert all(low <= mean <= high for mean, (low, high) in zip(curve["mean"], curve["interval"], strict=True))
    assert html.count('<img src="data:image/png;base64,') == 6 * 5
    assert "base64" not in (tmp_path / "result.json").read_text()
    settings, place = written["settings"], written["environment"]
    assert re.search(r"weights: net.pt \(SHA-256 [0-9a-f]{12}\)", settings["network"])
    assert "step 0.02, steps 4, restarts 1, random start True" in settings["pgd at eps 0.1"]
    assert {"torch", "backpass", "python"} <= set(place["versions"])
    assert place["device"] == "cpu"
    assert "digits of scikit-learn" in place["data"]
    assert "http" not in html
    assert "<script" not in html


def test_a_rule_makes_no_difference_to_random_search_which_is_run_once(tmp_path):
    ended = run(
        "attack", *BASE, "--attack", "square:queries=60", "--attack", "pgd", "--eps", "0.15", "--rule", "bp",
        "--rule", "linbp", "--curves", "20", "--out", str(tmp_path),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    numbers = json.loads((tmp_path / "result.json").read_text())["numbers"]["rules"]
    assert list(numbers["bp"]["attacks"]) == ["square:queries=60 at eps 0.15", "pgd at eps 0.15"]
    assert list(numbers["linbp"]["attacks"]) == ["pgd at eps 0.15"]
    assert "Random search" in ended.output


def test_a_network_without_weights_is_named_as_such_and_is_the_same_every_time(tmp_path):
    hashes = set()
    for name in ("one", "two"):
        ended = run(
            "attack", "--model", "mymodel:Net", "--data", "digits", "--limit", "40", "--eps", "0.1", "--curves", "0",
            "--out", str(tmp_path / name),
        )  # fmt: skip
        assert ended.exit_code == 0, ended.output
        assert "its own initial weights were used" in words(ended.output)
        written = json.loads((tmp_path / name / "result.json").read_text())
        assert "its own initial ones" in written["settings"]["network"]
        hashes.add(written["settings"]["network"])
    assert len(hashes) == 1


def test_a_network_that_has_nothing_right_leaves_nothing_to_attack(tmp_path, home):
    state = net().state_dict()
    state["last.weight"], state["last.bias"] = -state["last.weight"] * 50, -state["last.bias"] * 50
    torch.save(state, tmp_path / "wrong.pt")
    data = load_data("digits").images
    model = net(file=tmp_path / "wrong.pt")
    limit = int((model(data.x).argmax(1) == data.y).int().cumsum(0).eq(0).sum())
    assert limit > 3
    ended = run(
        "attack", "--model", "mymodel:Net", "--weights", str(tmp_path / "wrong.pt"), "--data", "digits", "--limit",
        str(limit), "--eps", "0.1", "--eps", "0.2", "--rule", "bp", "--rule", "linbp", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    assert "There is nothing to attack" in words(ended.output)
    assert "diverged" not in (tmp_path / "run" / "report.html").read_text()
    ended = run(
        "transfer", "--source", "mymodel:Net@net.pt", "--target", f"mymodel:Net@{tmp_path / 'wrong.pt'}", "--data",
        "digits", "--limit", str(limit), "--eps", "0.1", "--rule", "bp", "--rule", "linbp",
        "--out", str(tmp_path / "shown"),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    assert "no image" in ended.output
    assert "diverged" not in ended.output
    confirmed = run("verify", str(tmp_path / "shown")).output
    assert "from the numbers in the result, SHA-256 of 4 files of outcomes compared: all agree." in confirmed


def test_normalisation_in_front_of_a_network_is_that_network_on_normalised_images(tmp_path):
    mean, std = 0.3, 0.4
    state = net().state_dict()  # the same function, for inputs (x - mean) / std
    state["first.bias"] = state["first.bias"] + mean * state["first.weight"].sum(1)
    state["first.weight"] = state["first.weight"] * std
    torch.save(state, tmp_path / "normalised.pt")
    numbers = []
    for name, weights, more in (
        ("plain", "net.pt", []),
        ("front", str(tmp_path / "normalised.pt"), ["--normalize", "--mean", "0.3", "--std", "0.4"]),
    ):
        ended = run(
            "attack", "--model", "mymodel:Net", "--weights", weights, "--data", "digits", "--limit", "100", "--eps",
            "0.1", "--step", "0.02", "--curves", "0", *more, "--out", str(tmp_path / name),
        )  # fmt: skip
        assert ended.exit_code == 0, ended.output
        report = json.loads((tmp_path / name / "result.json").read_text())["numbers"]["rules"]["bp"]
        numbers.append((report["clean_accuracy"]["hits"], report["attacks"]["pgd at eps 0.1"]["success_rate"]["hits"]))
    assert numbers[0] == numbers[1]
    assert numbers[0][1] > 10


def test_the_papers_protocol_says_what_eps_means_in_pixels(tmp_path):
    ended = run(
        "attack", *BASE, "--eps", "16/255", "--protocol", "paper", "--mean", "0.5", "--std", "0.25", "--curves", "0",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    text = words(ended.output)
    assert "eps 16/255 is a radius of 8.00 and a start within 4.00" in text
    assert "the step of 5.1/255 is 1.2" in text
    written = json.loads((tmp_path / "result.json").read_text())
    assert "restarts 5" in written["settings"]["pgd at eps 16/255"]
    assert written["scale"] == "protocol paper"


def test_users_own_images_in_folders_are_attacked_by_their_class_names(tmp_path):
    digits = load_data("digits").images
    for index in range(60):
        if digits.labels[index] > 1:
            continue
        stream = io.BytesIO()
        Image.fromarray(np.asarray(digits.pixels[index, 0] * 15, dtype=np.uint8)).save(stream, format="PNG")
        path = tmp_path / "images" / "test" / ["nought", "one"][digits.labels[index]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream.getvalue())
    command = [
        "attack", "--model", "mymodel:Net", "--weights", "net.pt", "--data", str(tmp_path / "images"), "--eps", "0.3",
        "--step", "0.05", "--curves", "0", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    refused = run(*command)
    assert "10 outputs" in str(refused.exception)
    assert "--classes FILE" in str(refused.exception)
    names = tmp_path / "names.txt"
    names.write_text("nought\none\n" + "\n".join(f"other {i}" for i in range(2, 10)))
    ended = run(*command, "--classes", str(names))
    assert ended.exit_code == 0, ended.output
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    captions = [row[0]["caption"] for row in written["galleries"][0]["rows"]]
    assert captions
    assert all(re.fullmatch(r"(nought|one), \d+% \(image \d+\)", caption) for caption in captions)


def parts(path):
    return json.loads(path.read_text())["environment"]["parts"]


def test_a_killed_run_goes_on_with_the_same_answer(monkeypatch, capsys, tmp_path):
    arguments = [
        "attack", *BASE, "--eps", "0.1", "--rule", "bp", "--rule", "linbp", "--batch-size", "30", "--curves", "30",
    ]  # fmt: skip
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    assert run(*arguments, "--out", whole).exit_code == 0
    killed = subprocess.run(
        [sys.executable, "-m", "backpass", *arguments, "--out", part],
        env={**os.environ, "DIE_AT": "60"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "part" / "result.json").exists()
    code, _, err = call(monkeypatch, capsys, *arguments, "--out", part)
    assert code == 2
    assert "parts of a run that did not finish: --resume goes on" in err
    ended = run(*arguments, "--resume", "--out", part)
    assert ended.exit_code == 0, ended.output
    one, other = (tmp_path / name / "result.json" for name in ("whole", "part"))
    counts = [[int(n) for n in re.findall(r"\d+", parts(path))] for path in (one, other)]
    assert sum(counts[0]) == sum(counts[1])
    assert 0 < counts[1][0] < counts[0][0]
    assert timeless(one) == timeless(other)
    # Once it has finished, the same command begins anew.
    assert run(*arguments, "--out", part).exit_code == 0
    assert int(re.findall(r"\d+", parts(other))[0]) == counts[0][0]


def test_ctrl_c_ends_with_130(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("INTERRUPT_AT", "12")
    code, _, err = call(monkeypatch, capsys, "attack", *BASE, "--eps", "0.1", "--out", str(tmp_path))
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize("limit", [["--limit", "120"], []], ids=["images left", "no image left"])
def test_linbp_starts_where_it_does_best_on_images_that_are_not_attacked(tmp_path, limit):
    count = len(load_data("digits").images)
    attacked, aside = (120, 200) if limit else (count - count // 4, count // 4)
    ended = run(
        "attack", "--model", "mymodel:Net", "--weights", "net.pt", "--data", "digits", *limit, "--step", "0.02",
        "--eps", "0.1", "--rule", "bp", "--rule", "linbp:start=auto", "--curves", "0", "--out", str(tmp_path),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    data, model = load_data("digits").images, net()
    others = slice(attacked, attacked + aside)
    attack, fooled = PGD(eps=0.1, step=0.02, restarts=1), {}
    for start in (-1, -2):
        with LinBP(start=start).attach(model):
            fooled[start] = evaluate(model, (data.x[others], data.y[others]), attack).fooled().hits
    best = max(fooled, key=fooled.get)
    written = json.loads((tmp_path / "result.json").read_text())
    assert list(written["numbers"]["rules"]) == ["bp", f"linbp:start={best}"]
    assert written["numbers"]["rules"]["bp"]["clean_accuracy"]["trials"] == attacked
    (found,) = (one for one in written["findings"] if one["topic"] == "Where linbp:start=auto starts")
    assert f"At linbp:start={best}: of 2 starts" in found["text"]
    assert f"{aside} after the first {attacked}" in found["text"]


def test_a_chosen_start_that_was_also_asked_for_is_measured_once(tmp_path):
    rules = ["--rule", "linbp:start=auto", "--rule", "linbp:start=-1", "--rule", "linbp:start=-2"]
    assert run(*ATTACK, *rules, "--curves", "0", "--out", str(tmp_path)).exit_code == 0
    written = json.loads((tmp_path / "result.json").read_text())
    assert sorted(written["numbers"]["rules"]) == ["linbp:start=-1", "linbp:start=-2"]


def test_transfer_is_the_librarys_matrix_for_every_rule(tmp_path):
    ended = run(
        "transfer", "--source", "mymodel:Net@net.pt", "--target", "mymodel:Net@net.pt", "--target",
        "mymodel:wide@wide.pt", "--data", "digits", "--limit", "100", "--eps", "0.1", "--eps", "0.2", "--step", "0.02",
        "--rule", "bp", "--rule", "linbp:start=-1", "--out", str(tmp_path),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    written = json.loads((tmp_path / "result.json").read_text())
    data, a, b = load_data("digits").first(100).images, net(), net("wide", "wide.pt")
    attack = PGD(eps=0.2, step=0.02, restarts=1, early_stop=False)
    plain = transfer({"a": a}, {"a": a, "b": b}, (data.x, data.y), attack).rates["a"]
    with LinBP(start=-1).attach(a):
        linear = transfer({"a": a}, {"a": a, "b": b}, (data.x, data.y), attack).rates["a"]
    found = {(one["attack"], one["rule"], one["target"]): one for one in written["numbers"]["success_rate"]}
    for rule, rates in (("bp", plain), ("linbp:start=-1", linear)):
        for name, target in (("a", "mymodel:Net@net.pt"), ("b", "mymodel:wide@wide.pt")):
            ours = found["pgd at eps 0.2", rule, target]
            assert (ours["hits"], ours["trials"]) == (rates[name].hits, rates[name].trials)
            assert ours["interval"] == list(rates[name].interval)
    assert 0 < plain["b"].hits < plain["a"].hits
    assert len(written["claims"]) == 2  # one for each radius; white-box pairs are no transfer
    assert written["claims"][1]["estimate"] == pytest.approx(100 * (linear["b"].value - plain["b"].value))
    assert [curve["label"] for curve in written["series"][0]["curves"]] == ["BP", "linbp:start=-1"]
    assert math.isfinite(written["tables"][0]["rows"][1][1]["mean"])


def test_transfer_compares_attacks_and_rules_at_an_equal_number_of_gradients(tmp_path):
    attacks = ["ifgsm", "mifgsm:mix=0.2,scales=2,mixed=2,translation=1,nesterov=true"]
    ended = run(
        "transfer", "--source", "mymodel:Net@net.pt", "--target", "mymodel:wide@wide.pt", "--data", "digits",
        "--limit", "80", "--eps", "0.15", "--step", "0.03", *(w for a in attacks for w in ("--attack", a)),
        "--rule", "bp", "--rule", "linbp:start=-1", "--gradients", "24", "--out", str(tmp_path),
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    written = json.loads((tmp_path / "result.json").read_text())
    data, a, b = load_data("digits").first(80).images, net(), net("wide", "wide.pt")
    some = torch.linspace(0, 79, 64).round().long()
    mixing = MIFGSM(
        eps=0.15, step=0.03, mix=0.2, scales=2, mixed=2, translation=1, nesterov=True,
        pool=Pool(data.x[some], data.y[some]),
    )  # fmt: skip
    found = {
        (one["attack"], one["rule"], at["gradients"]): at
        for one in written["numbers"]["success_rate"]
        for at in one["after_gradients"]
    }
    for text, attack, marks in ((attacks[0], IFGSM(eps=0.15, step=0.03), [1, 2, 5, 10, 20, 24]),
                                (attacks[1], mixing, [5, 10, 20, 24])):  # fmt: skip
        rules = {"bp": None, "linbp:start=-1": LinBP(start=-1)}
        report = transfer({"a": a}, {"b": b}, (data.x, data.y), attack, rules=rules, gradients=marks)
        for rule in rules:
            for gradients, rate in report.curves[f"a {rule}"]["b"].items():
                assert found[f"{text} at eps 0.15", rule, gradients]["hits"] == rate.hits
    assert len(found) == 2 * (6 + 4)
    (series,) = written["series"]
    labels = [f"{text} at eps 0.15, {rule}" for text in attacks for rule in ("BP", "linbp:start=-1")]
    assert [curve["label"] for curve in series["curves"]] == labels
    assert series["curves"][0]["x"] == [1, 2, 5, 10, 20, 24]
    assert len(written["claims"]) == 2
    assert "Holm" in written["claims_note"]
    settings = written["settings"][f"{attacks[1]} at eps 0.15"]
    assert "steps 6" in settings
    assert "64 images" in settings


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("square", "which square does not take: give ifgsm, mifgsm or pgd"),
        ("pgd:steps=5", "decides how many steps pgd:steps=5 has: leave out steps"),
        ("mifgsm:scales=20", "a budget of 10 gradients is too small: a step of MIFGSM takes 20"),
    ],
)
def test_a_budget_that_an_attack_cannot_use_is_refused(attack, message, tmp_path):
    ended = run(
        "transfer", "--source", "mymodel:Net@net.pt", "--target", "mymodel:wide@wide.pt", "--data", "digits",
        "--eps", "0.15", "--attack", attack, "--gradients", "10", "--out", str(tmp_path),
    )  # fmt: skip
    assert isinstance(ended.exception, BackpassError)
    assert message in str(ended.exception)
