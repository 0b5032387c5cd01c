"""save and load: the images survive exactly, and the 8-bit ones are judged after the rounding."""

import pytest
import torch

from backpass.attacks import PGD, load, save
from backpass.attacks.threat import make_threat
from backpass.errors import BackpassError


@pytest.mark.parametrize(("norm", "eps"), [("linf", 24 / 255), ("l2", 0.6)])
def test_what_was_saved_comes_back_with_both_success_rates(cnn, held_out, tmp_path, norm, eps):
    x = (held_out.x[:64] * 255).round() / 255
    y = held_out.y[:64]
    attack = PGD(eps=eps, step=eps / 4, norm=norm)
    result = attack(cnn, x, y)
    save(tmp_path / "images.pt", cnn, x, y, result, attack)
    saved = load(tmp_path / "images.pt")
    assert torch.equal(saved.x_adv, result.x_adv)
    assert torch.equal(saved.success, result.success)
    seen = saved.images_uint8
    assert saved.x_uint8.dtype == torch.uint8
    assert bool(make_threat(norm, eps, (0.0, 1.0)).contains(x, seen).all())
    assert torch.equal(saved.success_uint8, cnn(seen).argmax(1) != y)
    assert saved.success_rate >= saved.success_rate_uint8 - 0.05
    assert saved.success_rate_uint8 > 0.2
    assert (seen - result.x_adv).abs().max() <= 1 / 255 + 1e-6
    assert saved.settings["eps"] == eps


def test_rounding_out_of_the_ball_is_not_a_success(mlp, held_out, tmp_path):
    x, y = held_out.x[:32] + 0.4 / 255, held_out.y[:32]  # off the grid, and a ball that holds no grid point
    x, attack = x.clamp(0, 1), PGD(eps=0.2 / 255, step=0.1 / 255)
    wrong = (y + 1) % 10  # every sample is mistaken already
    saved = save(tmp_path / "images.pt", mlp, x, wrong, attack(mlp, x, wrong), attack)
    outside = ~make_threat("linf", attack.eps, (0.0, 1.0)).contains(x, saved.images_uint8)
    assert outside.any()
    assert not saved.success_uint8[outside].any()


def test_loading_runs_no_code_and_wants_its_own_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"notes": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(BackpassError, match="is damaged, or was not written by backpass"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(BackpassError, match="holds no adversarial images"):
        load(tmp_path / "other.pt")
