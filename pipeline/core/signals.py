"""SIGINT and SIGTERM: raise an exception at once, or note the signal and let a step finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the command to stop.

    Like KeyboardInterrupt it is not an Exception, so that no handler of errors swallows it.

    Args:
        signum: Number of the signal. The exit code of the command is 128 + `signum`.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Stop:
    """Which signal, if any, has asked to stop. `signum` is 0 if none has."""

    def __init__(self):
        self.signum = 0

    def check(self) -> None:
        """Raise Stopped if a signal has arrived."""
        if self.signum:
            raise Stopped(self.signum)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise Stopped at the first SIGINT or SIGTERM inside the block.

    Later signals are ignored, so that cleaning up is not interrupted.
    """

    def stop(signum: int, _frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield
    finally:
        if all(signal.getsignal(signum) is stop for signum in before):
            _restore(before)


@contextmanager
def note_signals(stop: Stop | None = None) -> Iterator[Stop]:
    """Note SIGINT and SIGTERM inside the block without interrupting the code.

    For code that an exception from a signal handler would break, such as a training step.
    Outside the main thread, where Python allows no handlers, nothing is noted.

    Args:
        stop: Where the signal is noted. None makes a new one.

    Yields:
        The Stop whose `signum` the first signal sets.
    """
    stop = stop or Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(signum: int, _frame: FrameType | None) -> None:
        stop.signum = stop.signum or signum

    before = {signum: signal.signal(signum, note) for signum in SIGNALS}
    try:
        yield stop
    finally:
        _restore(before)


def _restore(handlers: dict[signal.Signals, Callable | int | None]) -> None:
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
