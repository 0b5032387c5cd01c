"""Options that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from backpass.errors import BackpassError, UnknownNameError

if TYPE_CHECKING:
    import torch

    from backpass.lab.protocols import Normalisation, Protocol

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """Options that ``attack`` and ``transfer`` share."""

    data: Annotated[
        str,
        typer.Option(
            help="digits; mnist, cifar10 or owner/name, found in the folder that BACKPASS_DATA names or else "
            "downloaded from the Hugging Face hub; a folder of Parquet files; or a folder with a folder of PNG, "
            "JPEG, WebP or BMP images for each class. Settings follow a colon, as in "
            "uoft-cs/cifar100:label=fine_label.",
            metavar="NAME|FOLDER",
        ),
    ]
    eps: Annotated[
        list[str],
        typer.Option(help="The radius, as in 8/255 or 0.03. Repeatable.", metavar="NUMBER"),
    ]
    split: Annotated[str, typer.Option(help="The part of the data.")] = "test"
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first N images only.", show_default="all")] = None
    attacks: Annotated[
        list[str],
        typer.Option(
            "--attack",
            help="fgsm, ifgsm, mifgsm, pgd, apgd, fab, fmn, square or autoattack; settings after a colon, as in "
            "mifgsm:diversity=0.7,translation=7,scales=5. Repeatable.",
            metavar="NAME[:SETTINGS]",
        ),
    ] = field(default_factory=lambda: ["pgd"])
    step: Annotated[str | None, typer.Option(help="Length of a step.", show_default="2/255", metavar="NUMBER")] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Gradient steps.", show_default="pgd 10, apgd 100")] = None
    restarts: Annotated[
        int | None, typer.Option(min=1, help="Random restarts per image.", show_default="1; paper 5")
    ] = None
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1.", show_default="linf")] = None
    loss: Annotated[
        str | None, typer.Option(help="ce, dlr or margin; for apgd also dlr-targeted.", show_default="the attack's own")
    ] = None
    rules: Annotated[
        list[str],
        typer.Option(
            "--rule",
            help="Backward rule(s), e.g. bp or linbp:start=layer4. Repeatable: the others are compared with bp, or "
            "with the first.",
            metavar="NAME[:SETTINGS]",
        ),
    ] = field(default_factory=lambda: ["bp"])
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol",
            help="standard: pixels in 0 to 1, eps and step in that range. paper: that of Li et al.: normalised images, "
            "ball of twice eps, start within eps, 5 restarts, no clipping to valid pixels.",
        ),
    ] = "standard"
    mean: Annotated[
        str | None,
        typer.Option(help="Mean of the pixels by channel, as in 0.49,0.48,0.45.", show_default="known for named data"),
    ] = None
    std: Annotated[str | None, typer.Option(help="Their standard deviation.", show_default="known for named data")] = (
        None
    )
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Put (pixel - mean) / std in front of the network.")
    ] = False
    logits: Annotated[
        str | None,
        typer.Option(help="Key or index of the logits in the network's output.", show_default="the output"),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of random starts and initial weights.")] = 0
    device: Device = "cpu"
    batch_size: Annotated[int, typer.Option(min=1, help="Images searched at a time.")] = 256
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16 or float16: search in it; success is judged in float32.", show_default="float32"),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            "--target-class",
            help="Targeted attacks, to this class of each image: next, random, second (the likeliest wrong one), "
            "least-likely, or one class by its name or number.",
            show_default="away from the label",
            metavar="TARGET",
        ),
    ] = None
    classes: Annotated[
        Path | None,
        typer.Option(
            help="File that maps outputs of the network to classes of the data: names of all outputs, one a line in "
            "their order; or numbers, the output of each class of the data; or JSON.",
            show_default="classes are outputs, in the order of their names",
            metavar="FILE",
        ),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the finished parts in the folder.")] = False

    def settings(self) -> dict[str, Any]:
        """Return the settings of attacks, in their own types; None for those that were not given.

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

    def radii(self) -> list[float]:
        """Return the radii.

        Raises:
            BackpassError: one of them is no number.
        """
        from backpass.numbers import read_number

        return [read_number(text, "--eps") for text in self.eps]

    def space(self) -> Protocol:
        """Return the protocol."""
        from backpass.lab.protocols import make_protocol

        return make_protocol(self.protocol, self.data, self._normalisation())

    def in_front(self) -> Normalisation | None:
        """Return what ``--normalize`` puts in front of a network, None where it is not wanted.

        Raises:
            BackpassError: it is wanted, and not known; or it is given, and nothing uses it.
        """
        from backpass.lab.protocols import known_normalisation

        if not self.normalize:
            if self.mean is not None and self.protocol == "standard":
                raise BackpassError(
                    "--mean and --std have no use here: add --normalize if the network expects normalised images."
                )
            return None
        found = self._normalisation() or known_normalisation(self.data)
        if found is None:
            raise BackpassError(
                f"the normalisation of {self.data!r} is not known: give --mean and --std, as in "
                "--mean 0.49,0.48,0.45 --std 0.2,0.2,0.2."
            )
        return found

    def _normalisation(self) -> Normalisation | None:
        from backpass.lab.protocols import Normalisation
        from backpass.numbers import read_numbers

        if self.mean is None and self.std is None:
            return None
        if self.mean is None or self.std is None:
            raise BackpassError("--mean and --std go together: give both, or none.")
        return Normalisation(read_numbers(self.mean, "--mean"), read_numbers(self.std, "--std"))

    def target_class(self, names: Sequence[str] | None) -> str | int | None:
        """Return the class that attacks lead to, by its number, or a name of `choose_targets`.

        Raises:
            UnknownNameError: there is no such class.
        """
        named = ["next", "random", "second", "least-likely"]
        if self.target is None or self.target in named:
            return self.target
        if names is not None and self.target in names:
            return list(names).index(self.target)
        if self.target.isdigit():
            return int(self.target)
        raise UnknownNameError("target class", self.target, [*named, *(names or ())])


def with_attack_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `AttackOptions`, which it takes together as `given`."""
    own = [one for one in inspect.signature(function, eval_str=True).parameters.values() if one.name != "given"]
    kinds = get_type_hints(AttackOptions, include_extras=True)
    shared = []
    for one in fields(AttackOptions):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        empty = default is MISSING
        shared.append(
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if empty else default,
                annotation=kinds[one.name],
            )
        )

    def command(**values: Any) -> None:
        chosen = {one.name: values.pop(one.name) for one in own}
        function(**chosen, given=AttackOptions(**values))

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    needed = [one for one in own if one.default is inspect.Parameter.empty]
    others = [one for one in own if one not in needed]
    command.__signature__ = inspect.Signature([*needed, *shared, *others])  # type: ignore[attr-defined]
    return command


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise UnknownNameError("dtype", name, known)
    return known[name] if name is not None else None


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
