"""The command line: it parses, calls the lab and prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from backpass.errors import BackpassError
from backpass.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from backpass.lab.result import Result

__all__ = ["app", "main"]

_MISTAKE = 2  # the exit code of every mistake that has a message
_LAB = {"jinja2", "markupsafe", "matplotlib", "numpy", "rich", "scipy", "sklearn", "typer"}


def _fail(message: str) -> NoReturn:
    """End with a message on stderr; also where rich itself is missing."""
    sys.stderr.write(f"backpass: {message}\n")
    raise SystemExit(_MISTAKE)


def _lab_is_missing(error: ImportError) -> NoReturn:
    _fail(f"the laboratory and the command line need {error.name!r}. Install it with: pip install 'backpass[lab]'")


try:
    import typer
except ImportError as error:
    _lab_is_missing(error)

app = typer.Typer(
    name="backpass",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"backpass {__version__} (torch {version('torch')}, python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback(
    epilog="""[bold]Start here[/bold]

[green]backpass demo[/green]  what another backward pass does to learning and to attack, in a minute

[green]backpass sites cnn[/green]  where in a network a rule can act

[green]backpass sites cnn --rule linbp:start=-2[/green]  where this rule would act

[bold]Rules[/bold] are written NAME or NAME:setting=value,...

[cyan]bp[/cyan]  plain backpropagation

[cyan]linbp[/cyan]  every activation linear in the backward pass

[cyan]linbp:start=-2[/cyan]  the last two activations only"""
)
def _app(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and leave."),
    ] = False,
) -> None:
    """Change how a PyTorch network learns, and is attacked, by changing only its backward pass."""


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass demo[/green]  the whole demo, about a minute on two cores

[green]backpass demo --quick[/green]  a smaller one, some seconds, to see that all works

[green]backpass demo --model cnn --out runs/cnn[/green]  another network; takes some minutes"""
)
def demo(
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Runs of each kind; verdicts need 3.", show_default="5")
    ] = None,
    model: Annotated[str, typer.Option(help="The network: mlp or cnn.")] = "mlp",
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="3 seeds, fewer epochs, rates and radii.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also write the main plots to this SVG file.")] = None,
) -> None:
    """Train and attack the same network with plain and with linear backpropagation.

    The same weights, the same batches of real handwritten digits, the same learning rates: only the backward pass
    differs. Every comparison is paired over the seeds and comes with a 95 % interval and a verdict.
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is better known before the work
    errors, console = Console(stderr=True), Console()
    with errors.status("loading torch"):
        from backpass.lab.experiments.demo import SCALES, measure
        from backpass.lab.experiments.demo_result import PICTURE, describe
        from backpass.lab.files import write_atomically
        from backpass.lab.plots import picture as draw
        from backpass.lab.report import write_report

        size = replace(SCALES["quick" if quick else "standard"], model=model)
        settings = size if seeds is None else replace(size, seeds=seeds)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=errors, transient=True)
    with bar:
        task = bar.add_task("training", total=1.0)
        measured = measure(settings, lambda what, part: bar.update(task, description=what, completed=part))
    result = describe(measured)
    page, numbers = write_report(result, out)
    if picture is not None:
        shown = [series for series in result.series if series.id in PICTURE]
        write_atomically(picture, draw(shown, title=result.title))
    console.print(_claims_table(result))
    for finding in result.findings:
        console.print(f"\N{BULLET} {finding.topic}. {finding.text}", markup=False, highlight=False)
    written = [page, numbers] if picture is None else [page, numbers, picture]
    console.print(f"\n{measured.seconds:.0f} s. Written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass sites mlp[/green]

[green]backpass sites cnn --rule linbp:start=-2[/green]

[green]backpass sites my_nets:make_resnet --input-shape 3x224x224[/green]  imports and calls your own code"""
)
def sites(
    model: Annotated[str, typer.Argument(help="A lab network (mlp, cnn) or your own as module:callable.")],
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one input without the batch axis, as in 3x224x224.")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="Mark the sites where this rule acts.")] = None,
) -> None:
    """List the sites of a model: the calls of activations whose backward a rule can re-define."""
    import torch

    from backpass.lab.models.lookup import find, parse_shape
    from backpass.rules import list_sites, parse_rule

    network, known = find(model)
    shape = parse_shape(input_shape) if input_shape is not None else known
    if shape is None:
        raise BackpassError(f"the input shape of {model!r} is not known: give one, as in --input-shape 3x224x224.")
    x = torch.zeros(1, *shape)
    network.eval()
    try:
        table = list_sites(network, x)
    except RuntimeError as error:
        raise BackpassError(f"{model!r} does not take an input of shape {tuple(x.shape)}: {error}") from error
    acts: set[int] = set()
    if rule is not None:
        with parse_rule(rule).attach(network) as attached:
            network(x)
            acts = {site.index for site in attached.sites}
    header, *lines = str(table).splitlines()
    width = max(map(len, [header, *lines]))
    typer.echo(header)
    for site, line in zip(table, lines, strict=True):
        typer.echo(f"{line:<{width}}  <- {rule}" if site.index in acts else line)


def _claims_table(result: Result) -> Table:
    """The claims with their differences and verdicts."""
    from rich.table import Table

    from backpass.lab.statistics import Interval
    from backpass.lab.wording import interval_text

    colours = {"holds": "green", "does not hold": "red", "undecided": "yellow"}
    table = Table(title="Claims, paired over seeds, 95 % intervals", title_justify="left", show_lines=False)
    table.add_column("claim", overflow="fold")
    table.add_column("difference", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for claim in result.claims:
        difference = interval_text(Interval(claim.estimate, *claim.interval, claim.n), signed=True)
        table.add_row(claim.statement, difference, f"[{colours[claim.verdict]}]{claim.verdict}[/]")
    return table


def main() -> None:
    """Run the command line; a mistake that has a message ends with that message and exit code 2."""
    try:
        app()
    except BackpassError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot read or write {error.filename}: {error.strerror}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] in _LAB:
            _lab_is_missing(error)
        raise
