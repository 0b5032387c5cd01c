"""``backpass sites``: where in a network a rule can act."""

from __future__ import annotations

from typing import Annotated

import typer

from backpass.cli.entry import app
from backpass.cli.printing import say
from backpass.errors import BackpassError

__all__ = ["sites"]


@app.command(
    epilog="""[bold]Examples[/bold]

[green]backpass sites mlp[/green]

[green]backpass sites cnn --rule linbp:start=-2[/green]

[green]backpass sites resnet50 --rule linbp:start=paper[/green]  where the paper has it linear

[green]backpass sites my_nets:make_resnet --input-shape 3x224x224[/green]  imports and calls your own code"""
)
def sites(
    model: Annotated[
        str,
        typer.Argument(help="A lab network, as in mlp or resnet50:activation=silu, or your own as module:callable."),
    ],
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one input without the batch axis, as in 3x224x224.")
    ] = None,
    rule: Annotated[str | None, typer.Option(help="Mark the sites where this rule acts.")] = None,
) -> None:
    """List the sites of a model: the calls of activations, or of what else the rule re-defines."""
    import torch

    from backpass.lab.placements import parse_rule_for
    from backpass.models.lookup import find, parse_shape
    from backpass.rules import Site, SiteTable, list_sites

    given = parse_shape(input_shape) if input_shape is not None else None
    network, known = find(model, shape=given)
    shape = given or known
    if shape is None:
        raise BackpassError(f"the input shape of {model!r} is not known: give one, as in --input-shape 3x224x224.")
    x = torch.zeros(1, *shape)
    network.eval()
    try:
        table = list_sites(network, x)
    except RuntimeError as error:
        raise BackpassError(f"{model!r} does not take an input of shape {tuple(x.shape)}: {error}") from error
    acts: set[Site] = set()
    unreachable = table.unreachable
    if rule is not None:
        with parse_rule_for(model, rule, use="listing").attach(network) as attached:
            network(x)
            acts, unreachable = set(attached.sites), attached.unreachable
        # A rule that acts elsewhere has numbers of its own.
        tables = (table, list_sites(network, x, kind="linear"), attached.seen)
        table = next(one for one in tables if acts <= set(one))
    header, *lines = str(SiteTable(table)).splitlines()
    width = max(map(len, [header, *lines]))
    say(header)
    for site, line in zip(table, lines, strict=True):
        say(f"{line:<{width}}  <- {rule}" if site in acts else line)
    for path, reasons in unreachable.items():
        say(f"out of reach in {path or '(model)'}: {', '.join(reasons)}")
