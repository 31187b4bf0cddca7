"""Commands that have sub-commands, such as `python -m train.evaluate vae`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.cli import parse
from pipeline.core.errors import UserError


def parse_subcommand(
    subcommands: Mapping[str, type], args: Sequence[str], *, prog: str
) -> tuple[str, Any]:
    """Parse the name of a sub-command and its options.

    `--help` in place of a name lists the sub-commands.

    Args:
        subcommands: The configuration class of each sub-command, by its name. The first paragraph
            of its docstring describes the sub-command.
        args: The words after the command.
        prog: The command as the user types it. Messages name it.

    Returns:
        The name of the sub-command and its configuration.

    Raises:
        UserError: If `args` does not start with the name of a sub-command, or an option is wrong.
        SystemExit: If `args` asks for help.
    """
    usage = f"{prog} {{{','.join(subcommands)}}} [options]"
    if args and args[0] in ("-h", "--help", "--help-all"):
        sys.stdout.write(_help(subcommands, usage, prog))
        raise SystemExit(0)
    if not args or args[0] not in subcommands:
        given = repr(args[0]) if args else "nothing"
        raise UserError(f"name a sub-command: {usage}; got {given}")
    name = args[0]
    return name, parse(subcommands[name], args[1:], prog=f"{prog} {name}")


def _help(subcommands: Mapping[str, type], usage: str, prog: str) -> str:
    width = max(map(len, subcommands))
    lines = [f"usage: {usage}", "", "sub-commands:"]
    for name, cls in subcommands.items():
        summary = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
        lines.append(f"  {name:{width}}  {summary}")
    lines += ["", f"{prog} NAME --help lists the options of a sub-command."]
    return "\n".join(lines) + "\n"
