"""Commands with sub-commands: their help, their options and their errors."""

from dataclasses import dataclass

import pytest

from pipeline.core.errors import UserError
from pipeline.core.subcommands import parse_subcommand


@dataclass(frozen=True, kw_only=True)
class Bake:
    """Bake a loaf of
    bread.

    It takes an hour.
    """

    minutes: int = 60
    """Minutes in the oven."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Cut a loaf."""


SUBCOMMANDS = {"bake": Bake, "slice": Slice}


def test_the_name_chooses_the_options():
    assert parse_subcommand(SUBCOMMANDS, ["slice"], prog="x") == ("slice", Slice())
    args = ["bake", "--minutes", "5"]
    assert parse_subcommand(SUBCOMMANDS, args, prog="x") == ("bake", Bake(minutes=5))


@pytest.mark.parametrize("option", ["-h", "--help", "--help-all"])
def test_help_lists_the_subcommands(option, capsys):
    with pytest.raises(SystemExit) as end:
        parse_subcommand(SUBCOMMANDS, [option], prog="x")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "usage: x {bake,slice} [options]" in text
    assert "bake   Bake a loaf of bread.\n" in text
    assert "slice  Cut a loaf.\n" in text
    assert "hour" not in text


def test_help_after_a_name_lists_its_options(capsys):
    with pytest.raises(SystemExit):
        parse_subcommand(SUBCOMMANDS, ["bake", "--help"], prog="x")
    assert "Minutes in the oven." in capsys.readouterr().out


@pytest.mark.parametrize(("args", "given"), [([], "nothing"), (["eat", "--minutes", "1"], "'eat'")])
def test_a_missing_or_unknown_name_is_an_error(args, given):
    with pytest.raises(UserError, match=rf"name a sub-command: x \{{bake,slice\}} .*got {given}"):
        parse_subcommand(SUBCOMMANDS, args, prog="x")
