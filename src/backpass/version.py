"""The version of backpass."""

__version__ = "0.1.0"
