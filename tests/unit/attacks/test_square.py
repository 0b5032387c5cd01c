"""Square attack: its windows and pyramids, its acceptance, and that it asks for no gradient."""

import pytest
import torch
from torch import nn

from backpass.attacks import Square
from backpass.attacks.jobs import Jobs
from backpass.attacks.square import _pyramid, _two_pyramids, _Window, window_share
from backpass.attacks.threat import make_threat
from backpass.errors import BackpassError


def test_the_window_shrinks_at_the_papers_share_of_the_queries():
    shares = [window_share(q, 10_000, 0.8) for q in (0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    assert shares == [0.8 / 2**k for k in range(10)]


def test_a_window_is_a_square_inside_the_image():
    place = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    window = _Window.at(torch.empty(200, 3, 8, 10), place, 3)
    assert window.mask.shape == (200, 1, 8, 10)
    assert (window.mask.sum((1, 2, 3)) == 9).all()
    assert window.mask.any(0).all()  # every pixel can be reached
    patch = torch.arange(1.0, 10.0).view(3, 3)
    placed = window.place(patch)
    assert torch.equal(placed[5][window.mask[5]], patch.flatten())


def test_published_windows_leave_out_the_last_place():
    place = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    window = _Window.at(torch.empty(200, 3, 8, 10), place, 3, spare=0)
    assert torch.equal(window.mask[:, 0].any(0).nonzero().amax(0), torch.tensor([6, 8]))


@pytest.mark.parametrize(("published", "first", "last"), [(False, 0, 31), (True, 1, 30)])
def test_the_start_in_l2_is_a_grid_of_tiles(published, first, last):
    x = torch.full((4, 2, 32, 32), 0.5)
    jobs = Jobs(x, *(torch.arange(4),) * 4, make_threat("l2", 1.0, (0.0, 1.0)))
    delta = Square(norm="l2", eps=1.0, published=published)._start(jobs) - x
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.ones(4))
    changed = (delta.abs() > 1e-6).any(0).any(0)
    assert [changed.any(1).nonzero().aminmax(), changed.any(0).nonzero().aminmax()] == [(first, last)] * 2
    tiles = delta[..., first : first + 30, first : first + 30].reshape(4, 2, 5, 6, 5, 6).sum((3, 5))
    assert bool((tiles.abs() < 1e-5).all()) is published  # two halves of opposite sign


def test_pyramids_rise_to_the_middle_and_have_norm_one():
    eta = _pyramid(5, 5, torch.empty(0, dtype=torch.float64))
    # n = 2: the levels are 1/9, 1/9 + 1/4 and 1/9 + 1/4 + 1.
    ratio = eta[2] / eta[0, 0]
    torch.testing.assert_close(ratio, torch.tensor([4, 13, 49, 13, 4], dtype=torch.float64) / 4)
    two = _two_pyramids(5, torch.empty(0))
    assert two.norm().item() == pytest.approx(1)
    assert (two[:, :2] > 0).all()
    assert (two[:, 2:] < 0).all()


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 0.8)])
def test_more_queries_never_lower_the_loss_and_fool_more(cnn, held_out, norm, eps):
    x, y = held_out.x[:100], held_out.y[:100]
    few, many = (Square(eps=eps, norm=norm, queries=q, early_stop=False)(cnn, x, y) for q in (1, 60))
    assert bool((many.loss >= few.loss).all())
    assert many.success.sum() > few.success.sum()
    assert many.gradients == 0


def test_an_l2_proposal_uses_the_whole_ball(cnn, held_out):
    x = held_out.x[:32] * 0.2 + 0.4  # far from the bounds, which would cut the proposal
    result = Square(eps=0.3, norm="l2", queries=30, early_stop=False)(cnn, x, held_out.y[:32])
    torch.testing.assert_close((result.x_adv - x).flatten(1).norm(dim=1), torch.full((32,), 0.3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.15), ("l2", 0.8)])
def test_the_answer_is_that_of_any_batch_size(cnn, held_out, norm, eps):
    cnn, x, y = cnn.double(), held_out.x[:16].double(), held_out.y[:16]
    attack = Square(eps=eps, norm=norm, queries=20, restarts=2)
    whole, part = attack(cnn, x, y), attack(cnn, x, y, batch_size=7)
    torch.testing.assert_close(part.x_adv, whole.x_adv, atol=1e-9, rtol=0)


def test_it_fools_a_model_without_gradients(mlp, held_out):
    class Masked(nn.Module):
        def forward(self, x):
            return mlp((x * 15).round().detach() / 15)

    x, y = held_out.x[:64], held_out.y[:64]
    assert Square(eps=0.2, queries=50)(Masked(), x, y).success.float().mean() > 0.3


def test_it_wants_images():
    with pytest.raises(BackpassError, match=r"Square moves windows of images \(N, C, H, W\); got \(2, 4\)"):
        Square(queries=2)(nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("query", "halvings"), [(1, 0), (11, 0), (12, 1), (51, 1), (52, 2), (2001, 5), (2002, 6), (5000, 7)]
)
def test_the_published_schedule_does_not_depend_on_the_number_of_queries(query, halvings):
    # The start is no query there, so that query 1 is the authors' number 0.
    for queries in (100, 5000):
        side = Square(published=True, queries=queries)._side(torch.zeros(1, 3, 224, 224), query)
        assert side == round((0.8 / 2**halvings * 224 * 224) ** 0.5)


def test_the_published_variant_counts_queries_after_the_start(cnn, held_out):
    x, y = held_out.x[:8], held_out.y[:8]
    one, other = (Square(queries=5, early_stop=False, published=flag)(cnn, x, y).forwards for flag in (False, True))
    assert other - one == 8


@pytest.mark.parametrize("published", [False, True])
def test_in_l2_every_proposal_lies_on_the_sphere_but_for_the_bounds(cnn, held_out, published):
    x = held_out.x[:8] * 0.2 + 0.4  # far from the bounds
    result = Square(eps=0.3, norm="l2", queries=30, early_stop=False, published=published)(cnn, x, held_out.y[:8])
    torch.testing.assert_close((result.x_adv - x).flatten(1).norm(dim=1), torch.full((8,), 0.3))
