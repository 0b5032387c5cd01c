"""The group that the commands of ``backpass sde`` register with."""

import typer

from backpass.cli.entry import app

__all__ = ["group"]

group = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(group, name="sde", help="Adversarial training as a stochastic differential equation.")
