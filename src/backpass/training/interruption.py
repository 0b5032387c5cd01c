"""Graceful interruption: Ctrl-C and SIGTERM request a checkpoint and a stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "recorded_signals"]


class Interrupted(KeyboardInterrupt):
    """Raised when a run was stopped by Ctrl-C or SIGTERM; the message explains how to resume."""


@contextmanager
def recorded_signals() -> Iterator[list[str]]:
    """Yield the names of the signals received: of the first one, the second has its usual effect."""
    received: list[str] = []
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        restore()

    if threading.current_thread() is threading.main_thread():  # Python allows signal handlers nowhere else
        for one in (signal.SIGINT, signal.SIGTERM):
            before[one] = signal.signal(one, note)
    try:
        yield received
    finally:
        restore()
