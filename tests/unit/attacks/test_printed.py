"""What is printed of a report are its numbers in words, never its tensors."""

import pytest
import torch

from backpass.attacks import PGD, evaluate, load, save, transfer


@pytest.fixture
def printed(cnn, held_out, tmp_path):
    x, y = held_out.x[:300], held_out.y[:300]
    attack = PGD(eps=0.1, steps=2)
    found = attack(cnn, x, y)
    save(tmp_path / "images.pt", cnn, x, y, found, attack)
    report = evaluate(cnn, (x, y), attack)
    return {
        "report": (report, [f"robust accuracy {report.robust_accuracy:.1%} [", "300 samples, 10 classes"]),
        "record": (next(iter(report.attacks.values())), [f"fooled {int(report.success.sum())} of 300"]),
        "result": (found, [f"success of {int(found.success.sum())} of 300 samples"]),
        "saved": (load(tmp_path / "images.pt"), ["300 samples (1, 8, 8), success"]),
        "transfer": (transfer({"a": cnn}, {"b": cnn}, (x, y), attack), ["a to b: "]),
    }


def test_numbers_are_printed_and_no_tensor(printed):
    for value, words in printed.values():
        text = repr(value)
        assert "tensor(" not in text
        assert len(text) < 1000
        assert all(word in text for word in words), text
        assert str(value) == text


def test_a_rate_without_samples_says_so(cnn, held_out):
    report = evaluate(cnn, (held_out.x[:8], (cnn(held_out.x[:8]).argmax(1) + 1) % 10), PGD(eps=0.1, steps=1))
    assert torch.equal(report.correct, torch.zeros(8, dtype=torch.bool))
    assert "success of no sample" in repr(report)
