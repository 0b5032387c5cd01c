"""The application that the commands register with, and the entry point."""

from __future__ import annotations

import codecs
import logging
import os
import sys
from typing import Annotated, NoReturn

from backpass.allocator import keep_freed_memory
from backpass.cli.processes import leave
from backpass.errors import BackpassError
from backpass.version import __version__
from backpass.wording import visible

__all__ = ["app", "main"]

_MISTAKE = 2  # the exit code of every mistake that has a message
_INTERRUPTED = 130
_TRACEBACK = "BACKPASS_TRACEBACK"  # set, it shows where torch has failed
_LAB = {"PIL", "jinja2", "markupsafe", "matplotlib", "numpy", "pyarrow", "rich", "safetensors", "sklearn", "typer"}


def _fail(message: str) -> NoReturn:
    """End with a message on stderr; also where rich itself is missing."""
    sys.stderr.write(f"backpass: {visible(message)}\n")
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

[green]backpass demo[/green]  four papers on one page, in a minute

[green]backpass sites cnn[/green]  where in a network a rule can act

[green]backpass sites cnn --rule linbp:start=-2[/green]  where this rule would act

[green]backpass attack --model my_nets:Net --weights net.safetensors --data my_images --eps 8/255[/green]
  how easily your own network is fooled

[bold]Rules[/bold] are written NAME or NAME:setting=value,...

[cyan]bp[/cyan]  plain backpropagation

[cyan]linbp[/cyan]  every activation linear in the backward pass

[cyan]linbp:start=-2[/cyan]  the last two activations only"""
)
def _app(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and exit."),
    ] = False,
) -> None:
    """Change how a PyTorch network learns, and is attacked, by changing only its backward pass."""


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Spell characters that a stream cannot encode: ASCII for our own signs, escapes for others."""
    assert isinstance(error, UnicodeEncodeError)  # noqa: S101
    lost = error.object[error.start : error.end]
    return "".join(_SIGNS.get(c, c.encode("ascii", "backslashreplace").decode()) for c in lost), error.end


_SIGNS = {"\N{MINUS SIGN}": "-", "\N{BULLET}": "*", "\N{NO-BREAK SPACE}": " ", "\N{MULTIPLICATION SIGN}": "x"}


def _prepare_streams() -> None:
    """Make every text printable: in any encoding of the terminal, and warnings as `visible`."""
    codecs.register_error("backpass-spell", _spell)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backpass-spell")
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible())
    logging.basicConfig(handlers=[handler])


def main() -> None:
    """Run the command line; a mistake that has a message ends with that message and exit code 2."""
    keep_freed_memory()
    _prepare_streams()
    try:
        app()
    except SystemExit as ended:
        if not ended.code:
            leave()
        raise
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    except BackpassError as error:
        _fail(str(error))
    except (FileExistsError, NotADirectoryError) as error:
        _fail(f"a folder is needed where {error.filename} is a file, or lies under one.")
    except OSError as error:
        _fail(f"cannot read or write {error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:  # torch's own or the network's, for instance of one that cannot be differentiated
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in _LAB:
            _lab_is_missing(error)
        if os.environ.get(_TRACEBACK):
            raise
        _fail(f"{type(error).__name__}: {str(error).strip()} (Set {_TRACEBACK}=1 to see where.)")
