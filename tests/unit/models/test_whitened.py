"""The network `whitened`: its first layer whitens patches, its normalizations learn their bias alone, and fast."""

import torch

from backpass.data.normalisation import known_normalisation
from backpass.models import build


def test_patches_become_uncorrelated_with_unit_variance():
    torch.manual_seed(0)
    x = torch.nn.functional.avg_pool2d(torch.rand(64, 3, 66, 66), 3, 2)  # neighbouring pixels are correlated
    model = build("whitened:width=16", normalisation=known_normalisation("cifar10"))
    model.initialise_from(x)
    out = model.whiten(model.normalize(x)).movedim(1, 3).flatten(0, 2)
    half = out.shape[1] // 2
    covariance = torch.cov((out - model.whiten.bias)[:, :half].T)
    torch.testing.assert_close(covariance, torch.eye(half), rtol=0, atol=0.02)
    assert torch.allclose(out[:, half:], -out[:, :half] + 2 * model.whiten.bias[:half], atol=1e-4)
    assert not model.whiten.weight.requires_grad


def test_it_learns_and_keeps_its_filters():
    model = build("whitened:width=16", shape=(3, 25, 25), seed=1)
    before = model.whiten.weight.clone()
    torch.manual_seed(0)
    x, y = torch.rand(20, 3, 25, 25), torch.arange(20) % 10
    x = x * 0.1 + 0.09 * y[:, None, None, None]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.85, nesterov=True, weight_decay=1e-3)
    losses = []
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(model.whiten.weight, before)


def test_the_bias_of_a_normalization_takes_64_steps_of_sgd_at_once_and_its_scale_none():
    model = build("whitened:width=16", seed=1).double()
    norm, plain = model.norm1a, torch.nn.BatchNorm2d(4).double()
    x, weights = torch.rand(8, 4, 5, 5).double(), torch.rand(8, 4, 5, 5).double()
    torch.testing.assert_close(norm(x), plain(x))
    (norm(x) * weights).sum().backward()
    (plain(x) * weights).sum().backward()
    torch.optim.SGD([p for p in norm.parameters() if p.requires_grad], 0.01).step()
    torch.optim.SGD([plain.bias], 0.64).step()
    torch.testing.assert_close(norm(x), plain(x))
    assert torch.equal(norm.weight, torch.ones(4).double())
