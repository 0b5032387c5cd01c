"""The losses, on logits small enough to check by hand."""

import pytest
import torch

from backpass.attacks.losses import ce, dlr, dlr_targeted, margin

Z = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0]])


@pytest.mark.parametrize(("y", "expected"), [(0, -1.0), (2, 1.0), (4, 4.0)])
def test_margin_is_positive_exactly_where_the_prediction_is_wrong(y, expected):
    assert margin(Z, torch.tensor([y])).item() == expected


def test_dlr_divides_by_the_first_minus_the_third():
    assert dlr(Z, torch.tensor([0])).item() == pytest.approx(-1 / 2)
    assert dlr(Z, torch.tensor([3])).item() == pytest.approx(2 / 2)


def test_dlr_does_not_see_shift_and_scale():
    y = torch.tensor([1])
    assert dlr(7 * Z - 3, y).item() == pytest.approx(dlr(Z, y).item())


def test_targeted_dlr_leads_from_y_to_the_target():
    assert dlr_targeted(Z, torch.tensor([0]), torch.tensor([3])).item() == pytest.approx((2 - 4) / (4 - 1.5))


def test_ce_is_minus_the_log_probability():
    assert ce(Z, torch.tensor([2])).item() == pytest.approx(-Z.softmax(1)[0, 2].log().item())
