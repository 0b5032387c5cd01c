"""The command line: what it prints, how it fails, and that it is quick to answer."""

import json
import subprocess
import sys

import pytest

from backpass.experiments.verifying import verify
from backpass.papers.demo import DEMO
from backpass.version import __version__
from support.command_line import call, run


def test_help_teaches_with_examples():
    text = run("--help").output
    assert "backpass demo" in text
    assert "linbp:start=-2" in text
    assert "--input-shape 3x224x224" in run("sites", "--help").output
    assert "--quick" in run("demo", "--help").output


def test_the_version_names_torch_too():
    text = run("--version").output
    assert __version__ in text
    assert "torch 2" in text


def test_sites_lists_the_activations_of_a_lab_network():
    lines = run("sites", "cnn").output.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [[str(i), f"act{i + 1}", "relu"] for i in range(4)]


def test_sites_marks_where_a_rule_acts():
    lines = run("sites", "cnn", "--rule", "linbp:start=-2").output.splitlines()
    assert [line.endswith("<- linbp:start=-2") for line in lines[1:]] == [False, False, True, True]


def test_sites_lists_what_another_rule_acts_on():
    lines = run("sites", "mlp:widths=8-8", "--input-shape", "1x4x4", "--rule", "proxprop").output.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["linear"] * 3
    assert all(line.endswith("<- proxprop") for line in lines[1:])


def test_sites_shows_a_users_own_network():
    lines = run("sites", "torch.nn:Tanh", "--input-shape", "3x5").output.splitlines()
    assert lines[1].split()[-1] == "1x3x5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sites", "cmn"], "unknown model 'cmn'. Did you mean 'cnn'"),
        (["sites", "mine:make:width=3"], "write a function without arguments, such as def my_net(): return make(...)"),
        (["sites", "mine.py:make"], "named without .py"),
        (["sites", "cnn", "--rule", "linbp:start=auto"], "is chosen by the success of attacks"),
        (["attack", "--model", "cnn", "--data", "digits", "--eps", "0.1", "--rule", "proxprop"], "attack with linbp"),
        (["sites", "torch.nn:Tanh"], "give one, as in --input-shape"),
        (["sites", "vgg16", "--input-shape", "3x8x8"], "vgg16 takes images of at least 32x32 pixels, got 8x8"),
        (["sites", "resnet18", "--rule", "linbp:start=paper"], "not for 'resnet18'"),
        (["sites", "cnn", "--rule", "linpb"], "Did you mean 'linbp'"),
        (["sites", "cnn", "--rule", "linbp:start=9"], "linbp:start=9"),
    ],
)
def test_a_mistake_ends_with_one_message_and_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("backpass: ")
    assert out == ""


def test_an_output_folder_that_cannot_be_made_is_known_before_the_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("here already")
    code, _, err = call(monkeypatch, capsys, "demo", "--out", str(tmp_path / "file" / "run"))
    assert code == 2
    assert f"a folder is needed where {tmp_path / 'file'}" in err


def test_the_quick_demo_prints_claims_and_writes_the_report(tmp_path):
    result = run("demo", "--quick", "--out", str(tmp_path / "run"), "--picture", str(tmp_path / "demo.svg"))
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["scale"] == "quick"
    assert written["environment"]["seeds"] == [0, 1, 2]
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000
    assert (tmp_path / "demo.svg").stat().st_size < 200_000
    assert [finding["topic"] for finding in written["findings"]][-1] == "Limits"
    assert len(written["claims"]) == 7
    assert len(written["series"]) == 4
    assert "1,797 real images" in written["environment"]["data"]
    assert verify(tmp_path / "run", [DEMO]).problems == ()


def test_a_missing_extra_is_answered_with_how_to_install_it():
    code = "import sys; sys.modules['typer'] = None; import runpy; runpy.run_module('backpass', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "pip install 'backpass[lab]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_part_of_the_extra_is_answered_the_same_way(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    from backpass.report import page

    monkeypatch.setattr("backpass.experiments.running.run_here", lambda *_, **__: page.render("report.html"))
    code, _, err = call(monkeypatch, capsys, "demo", "--out", str(tmp_path))
    assert code == 2
    assert "need 'jinja2'" in err


def test_it_runs_as_a_module():
    ended = subprocess.run([sys.executable, "-m", "backpass", "sites", "nothing"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("backpass: unknown model 'nothing'")
    assert "Traceback" not in ended.stderr


def test_help_and_version_do_without_torch():
    code = "import sys, backpass.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
