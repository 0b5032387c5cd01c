"""Small experiments for tests of the harness; workers import this module."""

import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backpass.errors import BackpassError
from backpass.experiments.experiment import Arm, Comparison, Design, Experiment, Measurement, Plot
from backpass.experiments.running import run
from backpass.experiments.verifying import verify

CALLS = []
VALUE = Measurement(label="value", unit="points", key="curve", at=-1)


@dataclass(frozen=True, kw_only=True)
class Shift:
    shift: float
    fails: bool = False


def draw(settings, seed, context):
    """A curve of two places, (noise, noise + shift)."""
    CALLS.append((settings.shift, seed))
    if settings.fails:
        raise BackpassError("it fails on purpose")
    noise = random.Random(seed).gauss(0, 1)
    return {"curve": [noise, noise + settings.shift], "text": "a", "seconds": random.random()}


def arm(name, *shifts, group="", fails=False):
    return Arm(name=name, work=draw, group=group, candidates={f"{s:g}": Shift(shift=s, fails=fails) for s in shifts})


def table(*arms, claims=(), seeds=4, **rest):
    return Design(
        arms=arms, seeds=tuple(range(seeds)), measurements=(VALUE,), choice=VALUE, comparisons=tuple(claims),
        plots=(Plot(title="a line", key="curve", x=(0, 1), x_label="x", y_label="y"),), **rest,
    )  # fmt: skip


def claim(ours, theirs, **rest):
    return Comparison(
        id=f"{ours}-{theirs}",
        statement=f"{ours} is above {theirs}",
        measurement=VALUE,
        ours=ours,
        theirs=theirs,
        **rest,
    )


def experiment(name="one", scale=None, **rest):
    scale = scale or table(arm("up", 1.0, 3.0), arm("down", 0.0), claims=[claim("up", "down", published="3 points")])
    return Experiment(name=name, title="T", question="Q?", source="P, Figure 1", scales={"small": scale}, **rest)


def many(count=15):
    """Many short runs, for interruptions."""
    arms = [arm(f"a{context}", float(context)) for context in range(count)]
    return experiment("many", table(*arms, claims=[claim("a3", "a1")]))


def outcome_bytes(out):
    return {path.name: path.read_bytes() for path in (out / "outcomes").glob("*.json") if ".clock." not in path.name}


def constant(scale, values):
    """Runs of a scale whose value is given by arm and seed."""
    from backpass.experiments.experiment import Runs

    return {
        (one.group, one.name): Runs(
            arm=one, by_candidate={"": [{"curve": [0.0, value]} for value in values[one.name]]}, chosen=""
        )
        for one in scale.arms
    }


def judged(out, scale):
    """Claims of a table, by id, after a check that they can be recomputed; and its result."""
    tiny = Experiment(name="tiny", title="T", question="Q?", source="P", scales={"tiny": scale})
    (done,) = run([tiny], scale="tiny", out=out)
    assert verify(out / "tiny", [tiny]).problems == ()
    return {claim.id.partition(".")[2]: claim for claim in done.result.claims}, done.result


def run_and_be_killed(times):
    """In a process of its own: begin to run so often, each time in a child that is killed after some more files."""
    out, chance = Path(sys.argv[1]), random.Random(0)
    for _ in range(times):
        here, wanted = len(list(out.glob("outcomes/*"))), chance.randrange(1, 12)
        child = os.fork()
        if child == 0:
            list(run([many()], scale="small", out=out))
            os._exit(0)
        while len(list(out.glob("outcomes/*"))) < here + wanted and os.waitpid(child, os.WNOHANG)[0] == 0:
            time.sleep(chance.random() / 1000)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
