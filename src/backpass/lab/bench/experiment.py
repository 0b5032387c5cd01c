"""An experiment of a paper: its scales, what it measures, and the result that comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from backpass.errors import BackpassError, UnknownNameError
from backpass.lab.bench.pieces import Pieces
from backpass.report.claims import Claim
from backpass.report.result import OVER_SEEDS, PAIRED_SEEDS, Finding, Result, Series, Table, environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Bench", "Experiment", "Outcome"]

S = TypeVar("S", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What an experiment works with.

    Attributes:
        device: where it computes.
        pieces: its finished pieces.
        shared: pieces that several experiments use, for instance trained networks.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pieces: Pieces = field(default_factory=lambda: Pieces(None))
    shared: Pieces = field(default_factory=lambda: Pieces(None))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an experiment found.

    Attributes:
        findings: what the numbers support and what they do not; the first is the paragraph that explains.
        series: the plots.
        claims: with verdicts; the name of the experiment is put before their ids.
        tables: further numbers.
        data: one line about the data.
        seeds: of the runs.
        settings: what was chosen beside the experiment's own settings.
        plots_note: what lines and bands are.
        claims_note: what pairs and intervals are.
    """

    findings: Sequence[Finding]
    series: Sequence[Series]
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    data: str
    seeds: Sequence[int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    plots_note: str = OVER_SEEDS
    claims_note: str = PAIRED_SEEDS


@dataclass(frozen=True, kw_only=True)
class Experiment(Generic[S]):
    """One figure, table or sentence of a paper, as something that can be run.

    Attributes:
        name: as on the command line.
        title: a heading.
        question: what is asked and how, in a few sentences.
        source: the paper and the place in it.
        scales: the settings by scale, a frozen dataclass each: ``small`` takes minutes on two cores, ``paper`` has the
            paper's sizes.
        measure: from settings and bench to what was found.
        data: the data sets that it needs, by name.
    """

    name: str
    title: str
    question: str
    source: str
    scales: Mapping[str, S]
    measure: Callable[[S, Bench], Outcome]
    data: tuple[str, ...] = ()

    def settings(self, scale: str) -> S:
        """The settings of a scale.

        Raises:
            UnknownNameError: there is no such scale.
        """
        if scale not in self.scales:
            raise UnknownNameError(f"scale of {self.name}", scale, self.scales)
        return self.scales[scale]

    def run(self, scale: str, bench: Bench) -> Result:
        """Measure at a scale.

        Raises:
            UnknownNameError: there is no such scale.
            BackpassError: the data is not there.
        """
        began, settings = time.perf_counter(), self.settings(scale)
        found = self.measure(settings, bench)
        ids = [claim.id for claim in found.claims]
        if len(set(ids)) < len(ids):
            raise BackpassError(f"{self.name} has two claims of one id: {sorted(ids)}.")
        return Result(
            experiment=self.name,
            title=self.title,
            question=self.question,
            scale=scale,
            findings=found.findings,
            environment={
                **environment(
                    device=device_text(bench.device),
                    threads=torch.get_num_threads(),
                    data=found.data,
                    seeds=found.seeds,
                ),
                "seconds": round(time.perf_counter() - began, 1),
                "pieces": f"{bench.pieces.computed + bench.shared.computed} computed, "
                f"{bench.pieces.found + bench.shared.found} found from an earlier run",
            },
            settings={**{key.replace("_", " "): value for key, value in asdict(settings).items()}, **found.settings},
            series=found.series,
            claims=[replace(claim, id=f"{self.name}.{claim.id}") for claim in found.claims],
            tables=found.tables,
            source=self.source,
            plots_note=found.plots_note,
            claims_note=found.claims_note,
        )


def device_text(device: torch.device) -> str:
    """A device with its name, where it has one."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
