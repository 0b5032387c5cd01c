"""Li et al., arXiv 2112.11018: simulations of linear backpropagation (Figures 1 to 4), and networks that sleep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot
from backpass.experiments.sleeping import Asleep, attack_sleepers
from backpass.experiments.students import Attacked, Taught, attack_students, teach_students
from backpass.report.result import Finding

__all__ = ["EXPERIMENTS"]

_PAPER = "Li et al., arXiv 2112.11018"
_RULES = {"BP": "bp", "LinBP": "linbp"}
_NORMS = {"plain": ("none", 1e-3), "l2": ("l2", 0.05), "sign": ("sign", 0.005)}
_CLAIM = partial(Comparison, ours="LinBP", theirs="BP", setting="the claim's")  # sizes and steps are the paper's
_BANDS = "Lines are means over the draws, bands their 95 % intervals."


def attack(updates: Sequence[str], runs: int = 500, steps: int = 100) -> Design:
    """Return the table of attacks on two-layer students by updates ``plain``, ``l2`` or ``sign``."""
    distances = {
        step: Measurement(label=f"l1 distance to x* after {step} steps", key="distance", at=step, draws=True)
        for step in (0, 10, steps // 2, steps)
    }
    loss = Measurement(label="half the squared distance of the outputs", key="loss", draws=True)
    norm = Measurement(label="l2 norm of the first gradient", key="norm", draws=True)
    arms, comparisons = [], []
    for name in updates:
        group, plain = f"{name} update", name == "plain"
        for label, rule in _RULES.items():
            settings = Attacked(rule=rule, norm=_NORMS[name][0], step=_NORMS[name][1], runs=runs, steps=steps)
            arms.append(Arm(name=label, work=attack_students, candidates={"": settings}, group=group))
        for step in list(distances)[1:] if plain else (steps,):
            comparisons.append(
                _CLAIM(
                    id=f"nearer-{name}-{step}", measurement=distances[step], group=group, direction="lower",
                    statement=f"LinBP's example is nearer to the best one after {step} steps ({group})",
                    reference=f"{_PAPER}, {'Figure 1' if plain else 'Figure 2'} and Theorem 1",
                    published="nearer, in a plot",
                )
            )  # fmt: skip
        comparisons.append(
            _CLAIM(
                id=f"loss-{name}", measurement=loss, group=group, direction="lower",
                statement=f"and it has the lower loss, so that it is the stronger attack ({group})",
                reference=f"{_PAPER}, section 4.1.1: \N{LEFT DOUBLE QUOTATION MARK}more powerful adversarial "
                "examples\N{RIGHT DOUBLE QUOTATION MARK}",
            )
        )  # fmt: skip
        if plain:
            comparisons.append(
                _CLAIM(
                    id="longer-first", measurement=norm, group=group, direction="higher",
                    statement="LinBP's gradient is longer at the first step", reference=f"{_PAPER}, section 4.1.1",
                )
            )  # fmt: skip
    return Design(
        arms=tuple(arms),
        seeds=(0,),
        measurements=(*distances.values(), loss, norm),
        comparisons=tuple(comparisons),
        plots=(
            Plot(title="distance to the best example", key="distance", x=range(steps + 1), x_label="steps",
                 y_label="l1 distance to x*", draws=True),
        ),
        data=lambda: f"made: {runs} draws of networks and examples",
    )  # fmt: skip


_RECORDED = (0, 10, 30, 100, 300, 1000, 2000, 3000, 5000, 7000, 10_000)
_GAIN = Measurement(label="log of BP's distance over LinBP's", key="gain", draws=True)
_LENGTHS = {
    when: Measurement(label=f"mean l1 norm of the gradient {words}", key="norm", at=place, draws=True)
    for place, (when, words) in enumerate((("early", "over the first 100 steps"), ("all", "over all steps")))
}
_UNIT = 0.0015


def learn(*, unit: bool = False, runs: int = 40, recorded: tuple[int, ...] = _RECORDED) -> Design:
    """Return the table of one-layer students that learn by plain steps, or by steps of one length.

    Args:
        unit: whether the steps have one length.
        runs: number of draws.
        recorded: the steps after which distance and loss are recorded; claims are about 100, 1000, 5000 and 10,000.
    """

    def arm(name: str, rule: str, *, unit: bool) -> Arm:
        norm, step = ("l2", _UNIT) if unit else ("none", 1e-3)
        settings = Taught(rule=rule, norm=norm, step=step, runs=runs, recorded=recorded)
        return Arm(name=name, work=teach_students, candidates={"": settings})

    def after(key: str, what: str) -> dict[int, Measurement]:
        return {
            step: Measurement(label=f"{what} after {step:,} steps", key=key, at=place, draws=True)
            for place, step in enumerate(recorded)
        }

    distances, losses = after("distance", "l1 distance to w*"), after("loss", "loss on the step's inputs")
    arms = tuple(arm(name, rule, unit=unit) for name, rule in _RULES.items())
    return Design(
        arms=(*arms, arm("LinBP, plain steps", "linbp", unit=False)) if unit else arms,
        seeds=(0,),
        measurements=(*distances.values(), losses[recorded[-1]], *_LENGTHS.values(), _GAIN),
        comparisons=_unit_claims(distances) if unit else _plain_claims(distances, losses),
        plots=tuple(
            Plot(title=title, key=key, y_label=y_label, x=recorded, x_label="steps", draws=True, log_y=True)
            for title, key, y_label in (
                ("distance to the teacher", "distance", "l1 distance to w*"),
                ("training loss", "loss", "half the squared error, summed over a step's inputs"),
            )
        ),
        data=lambda: f"made: {runs} draws of teachers, starts and inputs",
    )


def _plain_claims(distances: Mapping[int, Measurement], losses: Mapping[int, Measurement]) -> tuple[Comparison, ...]:
    claims = []
    for step in (100, 1000, 5000, 10_000):
        if step in distances:
            claims += [
                _CLAIM(
                    id=f"nearer-{step}", measurement=distances[step], direction="lower",
                    statement=f"LinBP's weights are nearer to the teacher's after {step:,} steps",
                    reference=f"{_PAPER}, Figure 3 and Theorem 2", published="nearer, in a plot",
                ),
                _CLAIM(
                    id=f"loss-{step}", measurement=losses[step], direction="lower",
                    statement=f"and the training loss is lower after {step:,} steps",
                    reference=f"{_PAPER}, Figure 3", published="lower, in words",
                ),
            ]  # fmt: skip
    longer = (
        _CLAIM(
            id=f"longer-{when}", measurement=length, direction="higher",
            statement=f"LinBP's gradient is longer {length.label.partition('gradient ')[2]}",
            reference=f"{_PAPER}, section 4.1.2",
        )
        for when, length in _LENGTHS.items()
    )  # fmt: skip
    return (*claims, *longer)


def _unit_claims(distances: Mapping[int, Measurement]) -> tuple[Comparison, ...]:
    last = max(distances)
    return (
        _CLAIM(
            id="nearer-unit", measurement=distances[last], direction="lower",
            statement=f"LinBP's weights are nearer to the teacher's after {last:,} steps of one length",
            reference=f"{_PAPER}, Figure 4",
        ),
        _CLAIM(
            id="smaller-gain", measurement=_GAIN, theirs="LinBP, plain steps", direction="lower",
            statement="the gain is smaller than without normalisation",
            reference=f"{_PAPER}, section 4.1.2", published="drops a lot, in words",
        ),
    )  # fmt: skip


def sleep(
    thresholds: Sequence[float] = (0.0, 1.0, 2.0, 2.5, 3.0),
    radii: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5),
    networks: int = 8,
    images: int = 200,
) -> Design:
    """Return the table of attacks on random networks, by threshold of the units and radius of the ball."""
    fooled = {
        eps: Measurement(label=f"inputs fooled, radius {eps:g}", unit="percentage points", key="fooled", at=place)
        for place, eps in enumerate(radii)
    }
    return Design(
        arms=tuple(
            Arm(name=name, work=attack_sleepers, group=f"threshold {b:g}",
                candidates={"": Asleep(rule=rule, threshold=b, radii=radii, images=images)})
            for b, (name, rule) in product(thresholds, _RULES.items())
        ),
        seeds=tuple(range(networks)),
        measurements=(
            Measurement(label="units awake", unit="%", key="awake"),
            Measurement(label="inputs at which BP's gradient is zero", unit="%", key="blind"),
            *fooled.values(),
        ),
        comparisons=tuple(
            Comparison(
                id=f"b{b:g}-eps{eps:g}", measurement=one, ours="LinBP", theirs="BP", group=f"threshold {b:g}",
                statement=f"LinBP fools more inputs than BP where the threshold is {b:g} and the radius {eps:g}",
            )
            for b, (eps, one) in product(thresholds, fooled.items())
        ),
        plots=(
            Plot(title="inputs fooled", key="fooled", y_label="inputs fooled, %", x=radii, x_label="radius",
                 log_x=True),
        ),
        data=lambda: f"made: {images} standard normal inputs for each of {networks} networks a threshold",
    )  # fmt: skip


_ATTACK = (
    "A student network y = V relu(W x) with random weights is attacked: gradient descent moves an example from x0 "
    "towards the output that the student has at x*, inside an l_inf ball of radius 0.25. Both rules see the same "
    "networks, starts and aims. "
)
_LEARN = (
    "A student y = relu(X w) learns a teacher's weights w* by SGD on half the mean squared error, with fresh standard "
    "normal inputs at every step; w* is drawn from N(1, 9) and the start from N(0, 1), 10 weights each. Both rules see "
    "the same teachers, starts and inputs. "
)
_DRAWS = "Every pair shares its networks, its start and its aim, or all its inputs; n counts the draws."
_NEARER = (
    Finding("Nearer, or stronger", "To be nearer to the teacher's example and to fool the student are two things."),
)

EXPERIMENTS = (
    Experiment(
        name="linbp-fig1",
        title="Does LinBP attack a two-layer network faster?",
        question=_ATTACK + "The step is 0.001 times the gradient.",
        source=f"{_PAPER}, Figure 1, Theorem 1",
        scales={"small": attack(["plain"]), "paper": attack(["plain"], runs=2000)},
        remarks=_NEARER,
        plots_note=_BANDS,
        claims_note=_DRAWS,
    ),
    Experiment(
        name="linbp-fig2",
        title="Does it still, when the steps have equal length?",
        question=_ATTACK + "The gradient is scaled to l2 norm 1, or replaced by its sign.",
        source=f"{_PAPER}, Figure 2",
        scales={"small": attack(["l2", "sign"]), "paper": attack(["l2", "sign"], runs=2000)},
        remarks=_NEARER,
        plots_note=_BANDS,
        claims_note=_DRAWS,
    ),
    Experiment(
        name="linbp-fig3",
        title="Does LinBP teach a one-layer network faster?",
        question=_LEARN + "The step is 0.001 times the gradient.",
        source=f"{_PAPER}, Figure 3, Theorem 2",
        scales={"small": learn(), "paper": learn(runs=200)},
        plots_note=_BANDS,
        claims_note=_DRAWS,
    ),
    Experiment(
        name="linbp-fig4",
        title="Does it still, when the steps have equal length?",
        question=_LEARN + f"Every gradient is scaled to l2 norm 1; the step is {_UNIT:g}.",
        source=f"{_PAPER}, Figure 4",
        scales={"small": learn(unit=True), "paper": learn(unit=True, runs=200)},
        plots_note=_BANDS,
        claims_note=_DRAWS,
    ),
    Experiment(
        name="linbp-sleeping-units",
        title="Can LinBP make the stronger attack at all?",
        question=(
            "Random networks y = V relu(W x - b) are attacked with both gradients. The threshold b says how many units "
            "sleep, and the radius of the ball whether an attack can wake them. The paper says that LinBP makes "
            "stronger white-box attacks; these networks show when that can be."
        ),
        source="an open question of Li et al., arXiv 2112.11018, Section 4.2.1",
        scales={"small": sleep(), "paper": sleep(networks=32, images=1000)},
        remarks=(
            Finding(
                "Sleeping units and a wide ball",
                "Where all units sleep BP's gradient is zero, and LinBP's is not: it counts every unit as awake. That "
                "can help only in a ball wide enough to wake them.",
            ),
        ),
        plots_note="Lines are means over the networks, bands their 95 % intervals.",
        claims_note="A pair is one network, attacked with both gradients from the same starts; n counts the networks.",
    ),
)
