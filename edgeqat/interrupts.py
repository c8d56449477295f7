"""Ctrl-C and SIGTERM: training ends its step and saves; every other command cleans up after itself; the exit code says which.

Standard library only.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Work was stopped by a signal after it saved what it had; the message says how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Terminated(BaseException):
    """SIGTERM, where nothing waits for it: like KeyboardInterrupt it runs every `finally` on its way."""


class StopRequest:
    """A context in which the first Ctrl-C or SIGTERM is only noted, in `number`, and the second acts as it would outside.

    wanted: False makes the context do nothing. It does nothing either outside the main thread, where Python takes no signals.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.number: int | None = None
        self.wanted = wanted and threading.current_thread() is threading.main_thread()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if self.wanted:
            self.before = {
                number: signal.signal(number, self._note) for number in SIGNALS
            }
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


@contextmanager
def termination_raises() -> Iterator[None]:
    """SIGTERM raises Terminated here, so that temporary files are removed; as it was before, after."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_signals_to_the_parent(worker: int) -> None:
    """For a process that loads data: Ctrl-C reaches it too, but its parent decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
