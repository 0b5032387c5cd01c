"""Options that several commands have, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backpass.errors import BackpassError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from backpass.lab.protocols import Normalisation

Data = Annotated[
    str,
    typer.Option(
        help="digits; mnist, cifar10 or owner/name, found in the folder that BACKPASS_DATA names or else downloaded "
        "from the Hugging Face hub; a folder of Parquet files; or a folder with a folder of PNG, JPEG, WebP or BMP "
        "images for each class. Settings follow a colon, as in uoft-cs/cifar100:label=fine_label.",
        metavar="NAME|FOLDER",
    ),
]
Split = Annotated[str, typer.Option(help="The part of the data.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first N images only.", show_default="all")]
Attacks = Annotated[
    list[str],
    typer.Option(
        "--attack",
        help="fgsm, ifgsm, mifgsm, pgd, apgd, fab, fmn, square or autoattack; settings after a colon, as in "
        "mifgsm:diversity=0.7,translation=7,scales=5. Repeatable.",
        metavar="NAME[:SETTINGS]",
    ),
]
Eps = Annotated[
    list[str],
    typer.Option(help="The radius, as in 8/255 or 0.03. Repeatable.", metavar="NUMBER"),
]
Step = Annotated[str | None, typer.Option(help="Length of a step.", show_default="2/255", metavar="NUMBER")]
Steps = Annotated[int | None, typer.Option(min=1, help="Gradient steps.", show_default="pgd 10, apgd 100")]
Restarts = Annotated[int | None, typer.Option(min=1, help="Random restarts per image.", show_default="1; paper 5")]
Target = Annotated[
    str | None,
    typer.Option(
        "--target-class",
        help="Targeted attacks, to this class of each image: next, random, second (the likeliest wrong one), "
        "least-likely, or one class by its name or number.",
        show_default="away from the label",
        metavar="TARGET",
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="File that maps outputs of the network to classes of the data: names of all outputs, one a line in their "
        "order; or numbers, the output of each class of the data; or JSON.",
        show_default="classes are outputs, in the order of their names",
        metavar="FILE",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the finished parts in the folder.")]
Norm = Annotated[str | None, typer.Option(help="linf, l2 or l1.", show_default="linf")]
Loss = Annotated[
    str | None, typer.Option(help="ce, dlr or margin; for apgd also dlr-targeted.", show_default="the attack's own")
]
Rules = Annotated[
    list[str],
    typer.Option(
        "--rule",
        help="Backward rule(s), e.g. bp or linbp:start=layer4. Repeatable: each is compared with bp, or else with the "
        "first.",
        metavar="NAME[:SETTINGS]",
    ),
]
ProtocolName = Annotated[
    str,
    typer.Option(
        "--protocol",
        help="standard: pixels in 0 to 1, eps and step in that range. paper: that of Li et al.: normalised images, "
        "ball of twice eps, start within eps, 5 restarts, no clipping to valid pixels.",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(help="Mean of the pixels by channel, as in 0.49,0.48,0.45.", show_default="known for named data"),
]
Std = Annotated[str | None, typer.Option(help="Their standard deviation.", show_default="known for named data")]
Normalize = Annotated[bool, typer.Option("--normalize", help="Put (pixel - mean) / std in front of the network.")]
Logits = Annotated[
    str | None,
    typer.Option(help="Key or index of the logits in the network's output.", show_default="the output"),
]
Seed = Annotated[int, typer.Option(help="Seed of random starts and initial weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images searched at a time.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16 or float16: search in it; success is judged in float32.", show_default="float32"),
]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Common options of the attacks; ``None`` for those not given."""

    step: str | None
    steps: int | None
    restarts: int | None
    norm: str | None
    loss: str | None
    dtype: str | None
    logits: str | None
    seed: int
    target: str | None = None

    def as_options(self) -> dict[str, Any]:
        """In the attacks' own types.

        Raises:
            BackpassError: the step is no number.
            UnknownNameError: there is no such dtype.
        """
        from backpass.numbers import read_number

        return {
            "step": None if self.step is None else read_number(self.step, "--step"),
            "steps": self.steps,
            "restarts": self.restarts,
            "norm": self.norm,
            "loss": self.loss,
            "dtype": _dtype(self.dtype),
            "logits": int(self.logits) if self.logits and self.logits.isdigit() else self.logits,
            "seed": self.seed,
            "targeted": None if self.target is None else True,
        }


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise UnknownNameError("dtype", name, known)
    return known[name] if name is not None else None


def read_target(text: str | None, names: Sequence[str] | None) -> str | int | None:
    """Read ``--target-class``: a class by its number or its name, or a name of `choose_targets`."""
    if text is None or text in ("next", "random", "second", "least-likely"):
        return text
    if names is not None and text in names:
        return list(names).index(text)
    if text.isdigit():
        return int(text)
    raise UnknownNameError("target class", text, ["next", "random", "second", "least-likely", *(names or ())])


def read_normalisation(mean: str | None, std: str | None) -> Normalisation | None:
    """The normalisation of ``--mean`` and ``--std``.

    Raises:
        BackpassError: only one of them is given, or they are no numbers.
    """
    from backpass.lab.protocols import Normalisation
    from backpass.numbers import read_numbers

    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise BackpassError("--mean and --std go together: give both, or none.")
    return Normalisation(read_numbers(mean, "--mean"), read_numbers(std, "--std"))


def normalisation_in_front(
    wanted: bool, mean: str | None, std: str | None, *, data: str, protocol: str
) -> Normalisation | None:
    """Return the normalisation that ``--normalize`` puts in front of a network, or None without it.

    Raises:
        BackpassError: it is wanted, and not known; or it is given, and nothing uses it.
    """
    from backpass.lab.protocols import known_normalisation

    if not wanted:
        if mean is not None and protocol == "standard":
            raise BackpassError(
                "--mean and --std have no use here: add --normalize if the network expects normalised images."
            )
        return None
    found = read_normalisation(mean, std) or known_normalisation(data)
    if found is None:
        raise BackpassError(
            f"the normalisation of {data!r} is not known: give --mean and --std, as in --mean 0.49,0.48,0.45 "
            "--std 0.2,0.2,0.2."
        )
    return found


def open_shards(out: Path, resume: bool, first: bool = True) -> Path:
    """Return the folder for finished parts, emptied by the first process where a new run begins.

    Raises:
        BackpassError: a run that did not finish left parts there, and nobody said to go on from them.
    """
    from backpass.cli.processes import barrier

    out.mkdir(parents=True, exist_ok=True)
    folder, result = out / "shards", out / "result.json"
    if not first:
        barrier()
        return folder
    parts = list(folder.glob("*.pt"))
    if parts and not resume:
        if not result.exists() or max(part.stat().st_mtime for part in parts) > result.stat().st_mtime:
            raise BackpassError(
                f"{folder} holds {len(parts)} parts of a run that did not finish: --resume goes on from them, another "
                "--out begins anew."
            )
        for part in parts:
            part.unlink()
    barrier()
    return folder
