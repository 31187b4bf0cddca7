"""What the training commands add to `model.command`: options by presets, and signals that let a step finish."""

from __future__ import annotations

import signal
import threading
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from model.command import Stopped, command, parse

__all__ = ["Stop", "Stopped", "command", "configure", "note_signals", "parse"]

Config = TypeVar("Config")


def configure(
    presets: Mapping[str, Config], default: str, args: Sequence[str], *, prog: str
) -> Config:
    """The preset that `args` name, with every other option laid over it. UserError, one line, for a bad one."""
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    name = first.parse_known_args(args)[0].preset or default
    start = presets.get(name, presets[default])  # tyro itself refuses a name that is not there
    return parse(type(start), args, prog=prog, default=start)


class Stop:
    """Which signal, if any, has asked to stop."""

    def __init__(self):
        self.signum = 0


@contextmanager
def note_signals() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM are noted and nothing else happens: the step in progress is finished and kept.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(signum: int, _frame: FrameType | None) -> None:
        stop.signum = stop.signum or signum

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
