"""`backpass attack` and `transfer`: mistakes end with one message, and unusual networks are understood or told."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from backpass import cli
from support.command_line import call, run, words
from support.users_network import ATTACK, BASE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attack", *BASE, "--eps", "8"], "Did you mean 8/255"),
        (["attack", *BASE, "--eps", "eight"], "--eps must be a number such as 8/255"),
        ([*ATTACK, "--attack", "pgdd"], "unknown attack 'pgdd'. Did you mean 'pgd'"),
        ([*ATTACK, "--rule", "linpb"], "unknown rule 'linpb'. Did you mean 'linbp'"),
        ([*ATTACK, "--rule", "linbp:start=9"], "selects none of the 2 sites"),
        ([*ATTACK, "--rule", "bp", "--rule", "bp"], "--rule bp stands twice"),
        ([*ATTACK, "--protocol", "papers"], "unknown protocol 'papers'. Did you mean 'paper'"),
        ([*ATTACK, "--norm", "l3"], "unknown norm 'l3'"),
        ([*ATTACK, "--loss", "cee"], "unknown loss 'cee'. Did you mean 'ce'"),
        ([*ATTACK, "--dtype", "bfloat"], "unknown dtype 'bfloat'. Did you mean 'bfloat16'"),
        ([*ATTACK, "--device", "gpu"], "the device 'gpu' cannot be used here"),
        ([*ATTACK, "--split", "tset"], "Did you mean 'test'"),
        ([*ATTACK, "--mean", "0.5"], "--mean and --std go together"),
        ([*ATTACK, "--mean", "0.5", "--std", "0.5"], "have no use here: add --normalize"),
        ([*ATTACK, "--normalize", "--mean", "1,2,3", "--std", "1,2,3"], "the images have 1 channels, the normal"),
        ([*ATTACK, "--data", "mnst"], "Did you mean 'mnist'"),
        ([*ATTACK, "--weights", "absent.pt"], "there is no file of weights absent.pt"),
        ([*ATTACK, "--weights", "wide.pt"], "first.weight is 64x64 in the file and 48x64 in the model"),
        ([*ATTACK, "--model", "mymodel:Nett"], "Did you mean 'Net'"),
        ([*ATTACK, "--model", "mymodell:Net"], "cannot import 'mymodell'"),
        ([*ATTACK, "--model", "mymodel:broken"], "failed when it was imported or called: RuntimeError: no such wheel"),
        ([*ATTACK, "--model", "torch.nn:Tanh", "--weights", "net.pt"], "the model lacks first.weight"),
        ([*ATTACK, "--model", "mymodel:Scores"], "Select it with logits="),
        (
            ["attack", *BASE[:-2], "--attack", "square", "--eps", "0.1", "--rule", "linbp:start=auto"],
            "needs an attack that uses gradients",
        ),
        (
            [
                "transfer",
                "--source",
                "mymodel:Net@net.pt",
                "--target",
                "mymodel:wide@wide.pt",
                "--data",
                "digits",
                "--eps",
                "0.1",
                "--rule",
                "linbp:start=auto",
            ],
            "which is not success against others",
        ),
        (["transfer", "--source", "mymodel:Net@no.pt", "--target", "cnn", "--data", "digits", "--eps", "0.1"], "no.pt"),
    ],
)
def test_a_mistake_ends_with_one_message_and_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    code, out, err = call(monkeypatch, capsys, *arguments, "--out", str(tmp_path / "run"))
    assert code == 2
    assert message in err
    assert err.startswith("backpass: ")
    assert out == ""
    assert not (tmp_path / "run" / "result.json").exists()


def test_logits_inside_a_dictionary_can_be_selected(tmp_path):
    same = []
    for name, more in (("Net", []), ("Pair", ["--logits", "logits"])):
        arguments = [*ATTACK, "--model", f"mymodel:{name}", *more, "--curves", "0", "--out", str(tmp_path / name)]
        ended = run(*arguments)
        assert ended.exit_code == 0, ended.output
        same.append(json.loads((tmp_path / name / "result.json").read_text())["numbers"]["rules"]["bp"])
    assert same[0] == same[1]


def test_a_network_that_cannot_be_differentiated_is_named(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, *ATTACK, "--model", "mymodel:Detached", "--out", str(tmp_path))
    assert code == 2
    assert "detaches its input" in err


def test_an_error_of_torch_ends_without_a_traceback(monkeypatch, capsys, tmp_path):
    arguments = [*ATTACK, "--model", "mymodel:Undefined", "--out", str(tmp_path)]
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.startswith("backpass: RuntimeError")
    monkeypatch.setenv("BACKPASS_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["backpass", *arguments])
    with pytest.raises(RuntimeError):
        cli.main()


def test_images_that_the_network_does_not_take_are_told(monkeypatch, capsys, tmp_path):
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / "d" / name / "1.png")
    code, _, err = call(monkeypatch, capsys, *ATTACK, "--data", str(tmp_path / "d"), "--out", str(tmp_path / "run"))
    assert code == 2
    assert "does not take the images of" in err
    assert "(2, 1, 9, 9)" in err


def test_help_teaches_with_examples_and_does_without_torch():
    for command, example in (("attack", "--rule bp --rule linbp:start=layer4"), ("transfer", "@small.safetensors")):
        text = words(run(command, "--help").output)
        assert example in text
        assert "8/255" in text
    code = "import sys; from backpass import cli; sys.argv = ['backpass', 'attack', '--help']\ntry: cli.main()\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
