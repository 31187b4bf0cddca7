"""The command line of every command: options, presets, log lines and exit codes.

Exit codes: 0 the command is done, 1 the run could not continue, 2 the request cannot be fulfilled,
130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import difflib
import errno
import io
import logging
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import TypeVar

import tyro

from pipeline.core.errors import RunError, UserError
from pipeline.core.files import is_disk_full
from pipeline.core.signals import Stopped, raise_on_signals

log = logging.getLogger(__name__)

Config = TypeVar("Config")
# What the system says of a place that the user may not or cannot write to.
REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)


def parse(
    cls: type[Config], args: Sequence[str], *, prog: str, default: Config | None = None
) -> Config:
    """Parse a command's options.

    Args:
        cls: A dataclass. Each field is an option.
        args: The words after the command.
        prog: The command as the user types it. Messages name it.
        default: Gives the values of options that `args` leaves out. None takes the defaults of
            `cls`.

    Raises:
        UserError: If an option is unknown, missing or has a bad value. The message is one line.
        SystemExit: If `args` asks for help.
    """
    start = tyro.MISSING_NONPROP if default is None else default
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            config, unknown = tyro.cli(
                cls, args=args, prog=prog, return_unknown_args=True, default=start
            )
    except SystemExit as end:
        if not end.code:
            raise  # --help
        raise UserError(f"{_one_line(message.getvalue())}; see {prog} --help") from None
    except ValueError as error:  # the config's own checks
        raise UserError(str(error)) from error
    if unknown:
        options = _options(cls, prog, start)
        close = difflib.get_close_matches(unknown[0].replace("_", "-"), options, n=1)
        hint = f", did you mean {close[0]}?" if close else ";"
        raise UserError(f"unknown option {unknown[0]}{hint} see {prog} --help")
    return config


def parse_with_presets(
    presets: Mapping[str, Config], default: str, args: Sequence[str], *, prog: str
) -> Config:
    """Parse a command's options, starting from the preset that `--preset` names.

    Args:
        presets: The configurations by name.
        default: Name of the preset that is taken without `--preset`.
        args: The words after the command.
        prog: The command as the user types it.

    Raises:
        UserError: As in `parse`.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    name = first.parse_known_args(args)[0].preset or default
    start = presets.get(name, presets[default])  # tyro itself refuses an unknown name
    return parse(type(start), args, prog=prog, default=start)


def command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(argv)` and leave the process with an exit code of the module's list.

    Expected errors are logged as one line without a traceback.
    """
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
            place = error.filename or "the disk"
            log.error("%s is full; free some space and run the same command to resume", place)
        elif error.errno in REFUSED and error.filename:
            log.error(
                "%s: %s; choose another place or allow writing there",
                error.filename,
                error.strerror,
            )
        else:
            raise
        code = 1
    except Stopped as stop:
        log.error("%s; run the same command to resume", stop)
        code = 128 + stop.signum
    logging.shutdown()
    sys.exit(code)


def _one_line(message: str) -> str:
    """Return the sentence inside the box that tyro draws."""
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


def _options(cls: type, prog: str, default: object) -> list[str]:
    """Return every option that `--help` lists."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            tyro.cli(cls, args=["--help"], prog=prog, default=default)
    except SystemExit:
        pass
    return sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", text.getvalue())))
