"""The command line: help in two lengths, presets, one-line errors and exit codes."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pipeline.core.cli import as_typed, parse, parse_with_presets
from pipeline.core.errors import UserError
from tests.child_python import ROOT


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast the run is."""

    steps: int = 10
    """Number of steps."""
    warmup: int = 2
    """Number of steps with a lower rate. This text is long, so that its docstring has two lines and
    its help wraps."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run something."""

    preset: Literal["short", "long"] = "short"
    """Configuration that the other options start from."""
    out: Path = Path("runs/x")
    """Directory of the results."""
    seed: int = 0  # a remark for readers of the code
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


BASIC = ("preset", "out", "speed.steps")
PRESETS = {"short": Run(), "long": Run(preset="long", speed=Speed(steps=500))}


def help_of(capsys, *args, **options) -> str:
    with pytest.raises(SystemExit) as end:
        parse(Run, args, prog="run", **options)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_the_basic_options_and_names_help_all(capsys):
    text = help_of(capsys, "--help", default=PRESETS["long"], basic=BASIC)
    assert "--out" in text
    assert "Directory of the results." in text
    assert "--speed.steps" in text
    assert "500" in text
    assert "--seed" not in text
    assert "--speed.warmup" not in text
    assert "run --help-all" in text


@pytest.mark.parametrize("basic", [BASIC, ()])
def test_help_all_lists_every_option(capsys, basic):
    text = help_of(capsys, "--help-all", default=PRESETS["long"], basic=basic)
    for option in ("--preset", "--out", "--seed", "--speed.steps", "--speed.warmup"):
        assert option in text
    assert "a remark for readers" not in text


def test_options_that_help_hides_are_accepted():
    assert parse(Run, ["--seed", "3"], prog="run", basic=BASIC).seed == 3


def test_a_preset_gives_the_values_of_the_options_left_out():
    cfg = parse_with_presets(PRESETS, "short", ["--preset", "long", "--seed", "1"], prog="run")
    assert (cfg.speed.steps, cfg.seed) == (500, 1)
    assert parse_with_presets(PRESETS, "short", [], prog="run") == PRESETS["short"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sead", "1"], "unknown option --sead, did you mean --seed? see run --help-all"),
        (
            ["--speed.steps", "0"],
            "--speed.steps must be 1 or more, got 0; see run --help",
        ),
        (["--seed", "-1"], "--seed must be 0 or more, got -1; see run --help"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(args, message):
    with pytest.raises(UserError) as error:
        parse(Run, args, prog="run", basic=BASIC)
    assert str(error.value) == message


def test_a_reader_that_leaves_early_causes_no_traceback():
    code = (
        "from pipeline.core.cli import command, parse\n"
        "from tests.pipeline.core.test_cli import Run\n"
        "command(lambda args: print('x' * 100_000) or parse(Run, ['--help'], prog='run') and 0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() in (0, 141)
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_the_line_breaks_of_a_docstring_do_not_break_its_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = help_of(capsys, "--help-all")
    assert "docstring has two lines and its help wraps." in text


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("seed must be 1 or more, got 0", "--seed must be 1 or more, got 0"),
        ("val_percent must be below image_size", "--val-percent must be below --image-size"),
        (
            "Error parsing limits: retry_wait_s must be 0 or more",
            "--limits.retry-wait-s must be 0 or more",
        ),
        # the only group that has such an option
        ("best_count needs a target_count", "--rank.best-count needs a --rank.target-count"),
        ("rank.best_count must be 1", "--rank.best-count must be 1"),
        ("a.side_px must be 1", "--a.side-px must be 1"),
        ("rank.x must be 1", "rank.x must be 1"),
        # two groups have it, so nobody knows which is meant
        ("side_px must be positive", "side_px must be positive"),
        ("seed of 'image_size' with seed", "--seed of 'image_size' with seed"),
        ("unknown_word --image-size image_size.txt", "unknown_word --image-size image_size.txt"),
    ],
)
def test_messages_name_options_as_they_are_typed(message, typed):
    names = "seed val-percent image-size limits.retry-wait-s rank.best-count rank.target-count"
    groups = "a.side-px b.side-px"
    assert as_typed(message, [f"--{name}" for name in f"{names} {groups}".split()]) == typed


def test_the_check_of_a_group_names_the_option(capsys):
    with pytest.raises(UserError, match=r"^--speed\.steps must be 1 or more, got 0"):
        parse(Run, ["--speed.steps", "0"], prog="run")
