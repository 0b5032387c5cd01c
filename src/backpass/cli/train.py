"""``backpass train``: train a network, also against an adversary, with any rule."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backpass.cli import options as o
from backpass.cli.entry import app
from backpass.cli.printing import say, working
from backpass.cli.processes import processes
from backpass.errors import BackpassError

if TYPE_CHECKING:
    from backpass.lab.training.training_run import Trained

__all__ = ["train"]

_DIVERGED = 1  # the exit code of a run whose loss went out of bounds
_SUMMARY = "Train a network, also against an adversary, with any rule."
_EXAMPLES = """[bold]Examples[/bold]

[green]backpass train --data mnist --model lenet5 --rule linbp:start=-2 --out runs/lenet5[/green]
  one epoch with linear backpropagation from the last two activations on

[green]backpass train --data my_images --model my_nets:Net --epochs 20 --augment crop,flip
--optimizer sgd:momentum=0.9,weight_decay=5e-4 --lr 0.1 --scheduler one-cycle --out runs/net[/green]
  your own network and images; Net stands in my_nets.py of this folder, and takes pixels in 0 to 1

[green]backpass train --data mnist --model lenet5 --adversary pgd:eps=0.2,steps=7 --out runs/robust[/green]
  adversarial training; with --trades 6 that of TRADES; --adversary-rule linbp:start=-2 makes the
  examples with linear backpropagation

[green]backpass train --recipe recipes/mnist-lenet5.toml --epochs 5 --out runs/longer[/green]
  a recipe, with another setting

[green]backpass train --resume --out runs/net[/green]  continue a run that was stopped

[green]torchrun --nproc-per-node 2 -m backpass train --recipe runs/net/recipe.toml --out runs/two[/green]
  the same run in two processes, or on two GPUs with --device cuda"""


# The options are the settings of a recipe. Their definition needs torch, which other commands load later or never.
@app.command(
    help=_SUMMARY,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """Read the options of a training run, and carry it out."""
    import torch  # noqa: F401  so that the import is over before the bar of the run

    command = typer.main.get_command(_with_options())
    code = command.main(context.args, prog_name=context.command_path, standalone_mode=False)
    if code:
        raise typer.Exit(code)


def _with_options() -> typer.Typer:
    """Return an application with one command, whose options are the settings of a recipe."""
    settings = typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    description = f"{_SUMMARY}\n\nThe folder then holds the weights, which [green]backpass attack[/green] takes, and a "
    description += "recipe that repeats the run."
    settings.command(help=description, epilog=_EXAMPLES)(_signed(_run))
    return settings


def _signed(function: Any) -> Any:
    """Give a function the settings of a recipe as keyword arguments, each None where it is not given."""
    from dataclasses import MISSING, fields

    from backpass.lab.training.recipe import Recipe, described, kinds

    types, words = kinds(), described()
    own = [one for one in inspect.signature(function, eval_str=True).parameters.values() if one.name != "given"]
    derived = []
    for one in sorted(fields(Recipe), key=lambda one: one.metadata.get("panel", "Training") == "Training"):
        if one.metadata.get("panel", "Training") is None:
            continue
        members, several = types[one.name]
        flag = one.name.replace("_", "-")
        names = [f"--{flag}/--no-{flag}"] if members == (bool,) else [f"--{flag}"]
        kind: Any = str if str in members else members[0]
        default = one.default if one.default is not MISSING else None
        option = typer.Option(
            *names,
            help=_summary(words[one.name]),
            show_default=False if default in (None, (), "", False) else str(default).strip("(),'"),
            rich_help_panel=one.metadata.get("panel", "Training"),
            metavar="TEXT" if kind is str else None,
        )
        annotation: Any = Annotated[list[kind] | None if several else kind | None, option]
        derived.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def called(**values: Any) -> Any:
        chosen = {one.name: values.pop(one.name) for one in own}
        return function(**chosen, given={name: value for name, value in values.items() if value not in (None, [])})

    called.__signature__ = inspect.Signature([*derived, *own])  # type: ignore[attr-defined]
    return called


def _summary(text: str) -> str:
    """Return the first sentence of a description, as far as it is about the command line."""
    sentence = text.replace("``", "").replace("`", "").partition("; in Python")[0].partition(". ")[0].rstrip(".")
    return f"{sentence[0].upper()}{sentence[1:]}."


def _run(
    *,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file with any of these settings; options override it.")
    ] = None,
    device: o.Device = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in the folder.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for weights, recipe, checkpoints and logs.")] = Path("runs/train"),
    given: dict[str, Any],
) -> None:
    """Carry out a run with the settings that were given."""
    from backpass.lab.subjects import parse_device

    with processes(parse_device(device)) as (where, first), working("loading torch") as report:
        from backpass.lab.training.recipe import Recipe, read_recipe
        from backpass.lab.training.training_run import train as carry_out
        from backpass.training import Interrupted

        _check_folder(out, resume)
        file = recipe or (out / "recipe.toml" if resume else None)
        values = read_recipe(file) if file else {}
        every = given.get("checkpoint_every", "")
        if every.isdigit():
            given["checkpoint_every"] = int(every)
        wanted = Recipe.of({**values, **given}, str(file) if file else "the command line")
        try:
            trained = carry_out(wanted, out, device=where, resume=resume, report=report, tell=say)
        except Interrupted as stopped:
            if first:
                what = str(stopped).partition(":")[0]
                say(f"backpass: {what}. Continue: backpass train --resume --out {out}", err=True)
            raise typer.Exit(130) from None
    if first:
        _print(trained, out)
    if trained.result.diverged:
        raise typer.Exit(_DIVERGED)


def _check_folder(folder: Path, resume: bool) -> None:
    """Check, before the data is read, that a run can begin, or continue, in a folder."""
    there = any((folder / "checkpoints").glob("step-*.pt"))
    if resume and not there:
        raise BackpassError(f"there is no run in {folder} to continue: leave out --resume, or give its --out.")
    if there and not resume:
        raise BackpassError(f"{folder} holds a run already: continue it with --resume, or give another --out.")


def _print(trained: Trained, out: Path) -> None:
    result, recipe = trained.result, trained.recipe
    if result.diverged:
        say(f"\ndiverged: {result.diverged}. A lower --lr may help, and with linbp fewer linear sites.", err=True)
    numbers = [] if trained.accuracy is None else [f"test accuracy {trained.accuracy:.2%}"]
    if trained.robust_accuracy is not None:
        numbers.append(
            f"robust accuracy {trained.robust_accuracy:.1%} ({recipe.robust}, {recipe.robust_images} images)"
        )
    say("\n" + ", ".join(numbers))
    say(f"{result.seconds:.0f} s. Written: {trained.weights}, {out / 'recipe.toml'}, {out / 'log.jsonl'}")
    say(f"Attack it: {trained.next}")
