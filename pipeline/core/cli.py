"""The command line of every command: options, presets, log lines and exit codes.

Exit codes: 0 the command is done, 1 the run could not continue, 2 the request cannot be fulfilled,
130 and 143 stopped by SIGINT and SIGTERM, 141 the reader of the output left.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import io
import logging
import os
import re
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Annotated, Any, NoReturn, TypeVar, cast, get_type_hints

import docstring_parser
import tyro

from pipeline.core.errors import RunError, UserError
from pipeline.core.files import is_disk_full
from pipeline.core.signals import Stopped, raise_on_signals

log = logging.getLogger(__name__)

Config = TypeVar("Config")
# Only docstrings are help texts: a comment beside a field speaks to the readers of the code.
MARKERS = (tyro.conf.HelptextFromCommentsOff,)
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
    cls: type[Config],
    args: Sequence[str],
    *,
    prog: str,
    default: Config | None = None,
    basic: Collection[str] = (),
) -> Config:
    """Parse a command's options.

    `--help` lists the options that `basic` names, `--help-all` lists every option. The help text of
    an option is the docstring below its field.

    Args:
        cls: A dataclass. Each field is an option.
        args: The words after the command.
        prog: The command as the user types it. Messages name it.
        default: Gives the values of options that `args` leaves out. None takes the defaults of
            `cls`.
        basic: Names of the options that most users need, such as "out" or "loop.steps". Empty means
            all of them.

    Raises:
        UserError: If an option is unknown, missing or has a bad value. The message is one line.
        SystemExit: If `args` asks for help.
    """
    if "--help-all" in args:
        _print_help(cls, prog, default)
    if basic and any(word in ("-h", "--help") for word in args):
        reduced = _with_only(cls, {name.replace("_", "-") for name in basic})
        hint = f"These are the most common options. {prog} --help-all lists every option."
        _print_help(reduced, prog, None if default is None else _converted(default, reduced), hint)
    start = tyro.MISSING_NONPROP if default is None else default
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            config, unknown = _run_tyro(
                cls, args=args, prog=prog, return_unknown_args=True, default=start, config=MARKERS
            )
    except SystemExit as end:
        if not end.code:
            raise  # --help
        text = as_typed(_one_line(message.getvalue()), _options(cls, prog, start))
        raise UserError(f"{text}; see {prog} --help") from None
    except ValueError as error:  # the config's own checks
        raise UserError(as_typed(str(error), _options(cls, prog, start))) from error
    if unknown:
        options = _options(cls, prog, start)
        close = difflib.get_close_matches(unknown[0].replace("_", "-"), options, n=1)
        hint = f", did you mean {close[0]}?" if close else ";"
        raise UserError(f"unknown option {unknown[0]}{hint} see {prog} --help-all")
    return config


def as_typed(message: str, options: Collection[str]) -> str:
    """Return the message of a configuration's check with the names of options as they are typed.

    The first word, which such messages begin with, and every word with an underscore are names of
    fields: "val_percent must be in 0..100" becomes "--val-percent must be in 0..100". The first
    word may also be a path of fields, such as "model.widths".

    Args:
        message: The message. "Error parsing GROUP: " before it names a group of options.
        options: All options of the command, such as "--filter.min-faces".
    """
    group = ""
    if match := re.match(r"Error parsing ([a-z][a-z._-]*): (?=[a-z])", message):
        group, message = f"{match[1]}.", message[match.end() :]

    dotted = re.match(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+(?= )", message)
    if dotted and (option := f"--{group}{dotted[0].replace('_', '-')}") in options:
        message = option + message[dotted.end() :]

    def typed(word: re.Match[str]) -> str:
        name = word[0].replace("_", "-")
        if f"--{group}{name}" in options:
            return f"--{group}{name}"
        inner = [option for option in options if option.endswith(f".{name}")]
        if f"--{name}" in options:
            return f"--{name}"
        return inner[0] if len(inner) == 1 else word[0]

    first, later = r"^[a-z][a-z0-9]*(?:_[a-z0-9]+)*", r"[a-z][a-z0-9]*(?:_[a-z0-9]+)+"
    names = rf"(?<![\w.'\"-])(?:{first}|{later})(?![\w'\"-]|\.\w)"
    return re.sub(names, typed, message)


def parse_with_presets(
    presets: Mapping[str, Config],
    default: str,
    args: Sequence[str],
    *,
    prog: str,
    basic: Collection[str] = (),
) -> Config:
    """Parse a command's options, starting from the preset that `--preset` names.

    Args:
        presets: The configurations by name.
        default: Name of the preset that is taken without `--preset`.
        args: The words after the command.
        prog: The command as the user types it.
        basic: As in `parse`.

    Raises:
        UserError: As in `parse`.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?")
    name = first.parse_known_args(args)[0].preset or default
    start = presets.get(name, presets[default])  # tyro itself refuses an unknown name
    return parse(type(start), args, prog=prog, default=start, basic=basic)


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
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
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
    except SystemExit as end:  # --help
        code = end.code
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    logging.shutdown()
    sys.exit(code)


def _run_tyro(cls: type, **options: Any) -> Any:
    """Call `tyro.cli` with each help text as one line, which tyro wraps to the terminal's width.

    tyro keeps the line breaks of a field's docstring, because its continuation lines are indented.
    It reads the docstrings with docstring_parser.
    """
    parse_docstrings = docstring_parser.parse_from_object

    def parse_joined(owner: object) -> docstring_parser.Docstring:
        parsed = parse_docstrings(owner)
        for field in parsed.params:
            field.description = field.description and " ".join(field.description.split())
        return parsed

    docstring_parser.parse_from_object = parse_joined
    try:
        return tyro.cli(cls, **options)
    finally:
        docstring_parser.parse_from_object = parse_docstrings


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
    sentence = re.sub(r"\s+", " ", " ".join(body) or " ".join(lines)).rstrip(".:; ")
    # The name of the command's dataclass says nothing to the user. Names of options and groups do.
    return re.sub(r"^Error parsing [A-Z]\w*: ", "", sentence)


def _options(cls: type, prog: str, default: object) -> list[str]:
    """Return every option that `--help` lists."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            _run_tyro(cls, args=["--help"], prog=prog, default=default, config=MARKERS)
    except SystemExit:
        pass
    return sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", text.getvalue())))


def _print_help(cls: type, prog: str, default: object | None, hint: str = "") -> NoReturn:
    """Print the help of all options of `cls` and, below it, `hint`; then exit with code 0."""
    start = tyro.MISSING_NONPROP if default is None else default
    try:
        _run_tyro(cls, args=["--help"], prog=prog, default=start, config=MARKERS)
    except SystemExit:
        if hint:
            sys.stdout.write(f"{hint}\n")
        raise
    raise AssertionError("--help ends the parser")


def _with_only(cls: type, basic: Collection[str], prefix: str = "") -> type:
    """Return a copy of a configuration class whose help hides the options that `basic` lacks."""
    hints = get_type_hints(cls, include_extras=True)
    annotations: dict[str, object] = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name.replace("_", "-")
        hint = hints[field.name]
        kept = any(other.startswith(f"{name}.") for other in basic)
        if dataclasses.is_dataclass(hint) and kept:
            annotations[field.name] = _with_only(cast(type, hint), basic, f"{name}.")
        elif name not in basic:
            annotations[field.name] = Annotated[hint, tyro.conf.Suppress]
    body = {"__annotations__": annotations, "__doc__": cls.__doc__, "__module__": cls.__module__}
    reduced = type(cls.__name__, (cls,), body)
    return dataclasses.dataclass(frozen=True, kw_only=True)(reduced)


def _converted(value: Any, cls: type) -> object:
    """Return a configuration as an instance of the class that `_with_only` made of its class."""
    values = {}
    for field in dataclasses.fields(cls):
        inner = getattr(value, field.name)
        hint = cls.__annotations__.get(field.name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            inner = _converted(inner, cast(type, hint))
        values[field.name] = inner
    return cls(**values)
