"""PGD beside a 15-line hand-written loop and other libraries, and evaluations: ratios of time, and peak memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from functools import partial

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which measures memory, is talkative

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpass.attacks import APGD, PGD, evaluate
from backpass.training import Trainer
from side_by_side import Contestant, Options, Row, Section, milliseconds, peak_mib, processor, ratio, side_by_side

STEP, STEPS, EPS = 2 / 255, 10, 8 / 255
CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # radii, over the one at which half of the images fall
BY_HAND = "hand loop"
ASKED = {
    "backpass PGD, early_stop=False": 1.03,
    "backpass PGD, bfloat16 and channels_last": 0.35,
    "backpass PGD, 10 steps, half fall": 0.7,
    "backpass PGD, 20 steps, half fall": 0.7,
    "evaluate": 1.05,
    "8 radii, PGD": 2.5,
    "8 radii, APGD": 2.5,
}
NOTES = {
    "backpass PGD, 10 steps, half fall": "samples fall late in so few steps: a batch of one image, which wastes "
    "nothing, still needs three quarters of the gradients",
    "torchattacks PGD": "gives no verdict on its images",
    "evaluate": "one forward pass over the clean images, a twentieth of this attack",
}
if "amx_bf16" not in processor("flags"):
    NOTES["backpass PGD, bfloat16 and channels_last"] = "this processor has no matrix unit for bfloat16 (AMX)"


def network() -> nn.Module:
    """A convolutional network of 183k parameters, for images (N, 3, 32, 32)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inside, outside, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    layers += [nn.Conv2d(128, 44, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(704, 10)]
    return nn.Sequential(*layers).eval()


def digits(count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, enlarged to (N, 3, size, size)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x[:count], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(images, size=size, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), torch.tensor(y[:count])


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One pass over the data: enough for attacks to have something to do."""
    Trainer(model, torch.optim.Adam(model.parameters(), 2e-3), (x, y), epochs=1, batch_size=32).fit()
    model.zero_grad()
    model.eval()


def hand_loop(model: nn.Module, x: Tensor, y: Tensor, eps: float = EPS, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """What one writes without a library: fifteen lines that also say which samples are fooled."""
    z = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        z.requires_grad_()
        loss = F.cross_entropy(model(z), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, z)
        with torch.no_grad():
            z = z + STEP * gradient.sign()
            z = torch.min(torch.max(z, x - eps), x + eps)
            z = z.clamp(0, 1)
    with torch.no_grad():
        fooled = model(z).argmax(1) != y
    return z.detach(), fooled


def contestants(model: nn.Module, x: Tensor, y: Tensor, half_eps: dict[int, float]) -> dict[str, Contestant]:
    """Everything that is timed, by name; the hand loop first."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    common = {"step": STEP, "steps": STEPS, "restarts": 1}
    full = PGD(eps=EPS, **common, early_stop=False)
    half = PGD(eps=EPS, **common, early_stop=False, dtype=torch.bfloat16)
    adaptive = APGD(eps=EPS, steps=STEPS, early_stop=False)
    found: dict[str, Contestant] = {
        BY_HAND: lambda: hand_loop(model, x, y)[0],
        "backpass PGD, early_stop=False": lambda: full(model, x, y).x_adv,
        "backpass PGD, bfloat16 and channels_last": lambda: half(last, x_last, y).x_adv,
        "backpass PGD, channels_last": lambda: full(last, x_last, y).x_adv,
        "backpass APGD, early_stop=False": lambda: adaptive(model, x, y).x_adv,
    }
    for steps, radius in half_eps.items():
        attack = PGD(eps=radius, step=STEP, steps=steps, restarts=1)
        found |= {
            f"{BY_HAND}, {steps} steps, half fall": partial(hand_loop, model, x, y, radius, steps),
            f"backpass PGD, {steps} steps, half fall": partial(attack, model, x, y),
        }
    return found | peers(model, x, y)


def peers(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Contestant]:
    """The other libraries that are installed."""
    found: dict[str, Contestant] = {}
    try:
        import torchattacks

        pgd = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=STEPS)
        apgd = torchattacks.APGD(model, eps=EPS, steps=STEPS)
        found |= {"torchattacks PGD": lambda: pgd(x, y), "torchattacks APGD": lambda: apgd(x, y)}
    except ImportError:
        pass
    try:
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        linf = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS)
        found["foolbox LinfPGD"] = lambda: linf(wrapped, x, y, epsilons=EPS)[1]
    except ImportError:
        pass
    try:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier

        estimator = PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1))
        art = ProjectedGradientDescentPyTorch(
            estimator, eps=EPS, eps_step=STEP, max_iter=STEPS, num_random_init=1, batch_size=len(x), verbose=False
        )
        found["ART PGD"] = lambda: torch.from_numpy(art.generate(x.cpu().numpy(), y.cpu().numpy()))
    except ImportError:
        pass
    return found


def eps_where_half_falls(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """Bisection on eps, so that so many steps fool half of the samples."""
    low, high = 0.0, 0.3
    for _ in range(12):
        eps = 0.5 * (low + high)
        fallen = PGD(eps=eps, step=STEP, steps=steps, restarts=1)(model, x, y).success.float().mean()
        low, high = (eps, high) if fallen < 0.5 else (low, eps)
    return high


def evaluations(options: Options) -> Section:
    """`evaluate` over the attack alone, and eight radii over one."""
    many, few, rounds = (64, 16, 2) if options.quick else (1000, 256, options.rounds(5))
    model, (images, labels) = network(), digits(1200 + few, 16)
    train(model, images[:1200], labels[:1200])
    model, images, labels = model.to(options.device), images.to(options.device), labels.to(options.device)
    with torch.no_grad():
        x, y = images[:many], model(images[:many]).argmax(1)  # all of them right, so that all are attacked
    full = PGD(eps=EPS, step=STEP, steps=STEPS, restarts=1, early_stop=False)
    runs: dict[str, Contestant] = {
        "attack alone": lambda: full(model, x, y, batch_size=256),
        "evaluate": lambda: evaluate(model, (x, y), full),
    }
    pair = (images[1200:], labels[1200:])
    eps = eps_where_half_falls(model, *pair, 20)
    for name, attack in (
        ("PGD", PGD(eps=eps, step=eps / 4, steps=20, restarts=1)),
        ("APGD", APGD(eps=eps, steps=40)),
    ):
        runs[f"one radius, {name}"] = partial(evaluate, model, pair, attack)
        runs[f"8 radii, {name}"] = partial(evaluate, model, pair, attack, radii=[eps * share for share in CURVE])
    times = side_by_side(runs, device=options.device, rounds=rounds)
    bases = {name: name.replace("8 radii", "one radius").replace("evaluate", "attack alone") for name in runs}
    return Section(
        title="Evaluation",
        text=f"`evaluate` of {many:,} images of 3x16x16, all of which the network has right, over {STEPS}-step PGD "
        f"alone. A curve of eight radii, {CURVE[0]:g} to {CURVE[-1]:g} times the one at which half of {few} images "
        "fall, over `evaluate` at that one radius, where fooled images leave early.",
        rows=[
            Row(
                name=name,
                figures={"ratio": ratio(times[name], times[bases[name]]), "ms": milliseconds(times[name])},
                asked=("ratio", ASKED[name]) if name in ASKED else None,
                note=NOTES.get(name, ""),
            )
            for name in runs
        ],
    )


def sections(options: Options) -> Iterator[Section]:
    """The attacks on a network of 183k parameters that is trained a little."""
    model, batch, rounds = network(), 16 if options.quick else 64, options.rounds(7)
    images, labels = digits(1200 + batch)
    train(model, images[:1200], labels[:1200])
    model, x, y = model.to(options.device), images[1200:].to(options.device), labels[1200:].to(options.device)
    half_eps = {steps: eps_where_half_falls(model, x, y, steps) for steps in (10, 20)}
    runs = contestants(model, x, y, half_eps)
    times = side_by_side(runs, device=options.device, rounds=rounds)
    rows = []
    for name, run in runs.items():
        base = name.replace("backpass PGD", BY_HAND) if name.endswith("half fall") else BY_HAND
        rows.append(
            Row(
                name=name,
                figures={
                    "ratio": ratio(times[name], times[base]),
                    "ms": milliseconds(times[name]),
                    "MiB": peak_mib(run, options.device),
                },
                asked=("ratio", ASKED[name]) if name in ASKED else None,
                note=NOTES.get(name, ""),
            )
        )
    yield Section(
        title="Attacks",
        text=f"{STEPS}-step l_inf PGD at 8/255 on {len(x)} images of 3x32x32 and a convolutional network of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, over a loop of 15 lines written by hand that also "
        "says which images are fooled. Where half fall, both search at the radius at which half of the images fall, "
        "and the ratio is to the hand loop of as many steps.",
        rows=rows,
    )
    yield evaluations(options)
