"""ProxProp on one layer of every kind is the argmin that defines it, solved densely from the layer's Jacobian."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from backpass.rules import ProxProp
from support.proximal import directions, flat, jacobian, proximal_direction, relative

taus = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)
dampings = st.sampled_from(("sum", "mean"))


def assert_proximal(model: nn.Module, x: torch.Tensor, rule: ProxProp, rows: int) -> None:
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():  # also norms, which begin at 1 and 0
            p.normal_(generator=torch.Generator().manual_seed(1))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    j = jacobian(model, x, names)
    g = torch.randn(model(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = flat(directions(model, x, g, rule), names)
    expected = proximal_direction(j, g, rule.tau, rows if rule.damping == "mean" else 1)
    # What float64 leaves: the system's condition, tau |J|^2 + 1, times 2^-53 and a small constant.
    condition = 1 + rule.tau * torch.linalg.matrix_norm(j, 2).item() ** 2
    assert relative(found, expected) < 1e-13 * (100 + condition**0.5) + 2e-16 * condition


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 6), st.integers(1, 6), st.booleans(), taus, dampings)
def test_linear_on_inputs_of_any_rank(leading, inputs, outputs, bias, tau, damping):
    x = double(*leading, inputs)
    rule = ProxProp(tau=tau, damping=damping, norms=True, embeddings=True)
    assert_proximal(nn.Linear(inputs, outputs, bias=bias), x, rule, x.numel() // inputs)


CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


@st.composite
def convolutions(draw):
    dims, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation, groups = each(1, 3), each(1, 2), each(1, 2), draw(st.integers(1, 2))
    settings = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        settings["stride"] = stride
        settings["padding"] = tuple(draw(st.integers(0, (k - 1) * d)) for k, d in zip(kernel, dilation, strict=True))
        settings["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        sizes = tuple(draw(st.integers(2, 4)) for _ in kernel)
        extra = zip(sizes, stride, settings["padding"], dilation, kernel, settings["output_padding"], strict=True)
        if any((n - 1) * s - 2 * p + d * (k - 1) + o + 1 < 1 for n, s, p, d, k, o in extra):
            settings["padding"] = 0
    else:
        padding = draw(st.sampled_from(("same", "valid", "zeros", "circular", "reflect", "replicate")))
        if padding == "same":
            settings["padding"] = "same"
        elif padding == "valid":
            settings |= {"padding": "valid", "stride": stride}
        else:
            settings |= {"padding": each(0, 1), "padding_mode": padding, "stride": stride}
        sizes = tuple((k - 1) * d + 1 + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True))
        sizes = tuple(max(size, 2) for size in sizes)
    layer = CONVOLUTIONS[dims, transposed](2 * groups, draw(st.integers(1, 2)) * groups, kernel, **settings)
    return layer, double(draw(st.integers(1, 3)), 2 * groups, *sizes)


@settings(max_examples=60, deadline=None)
@given(convolutions(), taus, dampings)
def test_convolutions_of_every_geometry(convolution, tau, damping):
    layer, x = convolution
    rows = layer.double()(x)[:, 0].numel()
    assert_proximal(layer, x, ProxProp(tau=tau, damping=damping, norms=True, embeddings=True), rows)


def test_one_output_whose_weight_and_bias_are_one_row():
    assert_proximal(nn.Conv2d(2, 1, 1), double(1, 2, 3, 3), ProxProp(tau=1.0), 9)
    assert_proximal(nn.Linear(2, 1), double(5, 2), ProxProp(tau=1.0), 5)


def test_a_convolution_of_one_image_without_batch_dimension():
    assert_proximal(nn.Conv2d(2, 3, 3, padding=1), double(2, 5, 5), ProxProp(tau=0.7), 25)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.sampled_from((None, 0, -1)), taus, dampings)
def test_embeddings_with_repeated_and_missing_lines(indices, padding, tau, damping):
    layer = nn.Embedding(7, 3, padding_idx=padding).double()
    x = torch.tensor(indices)
    g = double(len(indices), 3)
    found = directions(layer, x, g, ProxProp(tau=tau, damping=damping, norms=True, embeddings=True))["weight"]
    rows, counts = torch.zeros(7, 3, dtype=torch.float64), torch.zeros(7, 1, dtype=torch.float64)
    for index, gradient in zip(indices, g, strict=True):
        if padding is None or index != padding % 7:
            rows[index] += gradient
            counts[index] += 1
    n = len(indices) if damping == "mean" else 1
    torch.testing.assert_close(found, rows / (counts / n + 1 / tau))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (4, 3)),
        (nn.BatchNorm2d(3), (2, 3, 4, 2)),
        (nn.BatchNorm3d(2), (2, 2, 2, 3, 2)),
        (nn.InstanceNorm1d(3, affine=True), (2, 3, 5)),
        (nn.InstanceNorm2d(2, affine=True, track_running_stats=True), (2, 2, 3, 3)),
        (nn.GroupNorm(2, 4), (3, 4, 5)),
        (nn.LayerNorm(6), (2, 3, 6)),
        (nn.LayerNorm((2, 3)), (5, 2, 3)),
        (nn.RMSNorm(6), (4, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@settings(max_examples=5, deadline=None)
@given(tau=taus, damping=dampings)
def test_affine_parameters_of_normalizations(layer, shape, training, tau, damping):
    layer.train(training)
    x = double(*shape) * 3 + 1
    assert_proximal(
        layer, x, ProxProp(tau=tau, damping=damping, norms=True, embeddings=True), x.numel() // layer.weight.numel()
    )


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 2), (5, 3)), (nn.Conv2d(2, 2, 3), (2, 2, 5, 4)), (nn.LayerNorm(4), (3, 4))]
)
def test_what_is_frozen_is_held_fixed(layer, shape, frozen):
    getattr(layer, frozen).requires_grad_(False)
    x = double(*shape)
    assert_proximal(layer, x, ProxProp(tau=2.0, norms=True), 1)
    getattr(layer, frozen).requires_grad_(True)
