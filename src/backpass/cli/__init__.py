"""The command line: it parses, calls the lab and prints."""

from importlib import import_module

from backpass.cli.entry import app, main

__all__ = ["app", "main"]

# Each module registers its command when it is imported; the order is that of the help.
for _command in ("demo", "sites", "train", "attack", "transfer", "runs", "sde", "reproduce"):
    import_module(f"backpass.cli.{_command}")
