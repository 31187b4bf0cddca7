"""What every command has in common: options, log lines, signals, exit codes (2 usage, 1 run, 130 or 143 stopped)."""

from __future__ import annotations

import difflib
import errno
import io
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from types import FrameType
from typing import TypeVar

import tyro

from pipeline.core.schema import RunError, UserError
from pipeline.orchestration.isolated_process import is_disk_full

log = logging.getLogger(__name__)

Config = TypeVar("Config")
REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)  # where people point to


class Stopped(BaseException):
    """A signal asked the command to stop. Like KeyboardInterrupt no Exception: nothing on the way may swallow it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def parse(
    cls: type[Config], args: Sequence[str], *, prog: str, default: Config | None = None
) -> Config:
    """The options as a config; `default` gives the values of those left out. UserError, one line, for bad ones."""
    words = io.StringIO()
    start = tyro.MISSING_NONPROP if default is None else default
    try:
        with redirect_stderr(words):
            config, unknown = tyro.cli(
                cls, args=args, prog=prog, return_unknown_args=True, default=start
            )
    except SystemExit as end:
        if not end.code:
            raise  # --help
        raise UserError(f"{_one_line(words.getvalue())}; see {prog} --help") from None
    except ValueError as error:  # the config's own checks
        raise UserError(str(error)) from error
    if unknown:
        close = difflib.get_close_matches(unknown[0].replace("_", "-"), _options(cls, prog), n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise UserError(
            f"unknown option {unknown[0]}{hint or ''}{'' if hint else ';'} see {prog} --help"
        )
    return config


def command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(argv)` and leave the process with its exit code; expected errors end in one line, without traceback."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        with raise_on_signals():
            code = main(sys.argv[1:]) or 0
    except UserError as error:
        log.error("%s", error)
        code = 2
    except RunError as error:
        log.error("%s", error)
        code = 1
    except OSError as error:
        if is_disk_full(error):
            log.error(
                "%s is full; make room and run the same command to go on",
                error.filename or "the disk",
            )
        elif error.errno in REFUSED and error.filename:
            log.error("%s: %s; choose another place, or allow it", error.filename, error.strerror)
        else:
            raise
        code = 1
    except Stopped as stop:
        log.error("%s; the same command goes on from here", stop)
        code = 128 + stop.signum
    logging.shutdown()
    sys.exit(code)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises Stopped; more of them are ignored while things are put away."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signum)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if all(signal.getsignal(signum) is stop for signum in before):
            for signum, handler in before.items():
                signal.signal(signum, handler)


class Stop:
    """Which signal, if any, has asked to stop."""

    def __init__(self):
        self.signum = 0

    def check(self) -> None:
        """Stopped if a signal has come."""
        if self.signum:
            raise Stopped(self.signum)


@contextmanager
def note_signals(stop: Stop) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are noted in `stop`: for code that an exception from a handler would break.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, _frame: FrameType | None) -> None:
        stop.signum = stop.signum or signum

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _one_line(message: str) -> str:
    """The sentence inside the box that tyro draws."""
    lines = [line.strip(" │╭╮╰╯─-") for line in message.splitlines()]
    lines = [line for line in lines if line]
    body = []
    for line in lines[1:]:
        if line.startswith(
            ("Argument helptext", "For full helptext", "Got errors", "Arguments similar")
        ):
            break
        body.append(line)
    return re.sub(r"\s+", " ", " ".join(body) or " ".join(lines)).rstrip(".:; ")


def _options(cls: type, prog: str) -> list[str]:
    """Every option that --help lists."""
    text = io.StringIO()
    stdout, sys.stdout = sys.stdout, text
    try:
        tyro.cli(cls, args=["--help"], prog=prog)
    except SystemExit:
        pass
    finally:
        sys.stdout = stdout
    return sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", text.getvalue())))
