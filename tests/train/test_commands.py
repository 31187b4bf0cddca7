"""Training commands parse their options and print their help without heavy packages."""

import re

import pytest

from tests.child_python import run_python

HEAVY = {"torch", "numba", "transformers", "ray"}
SHOW_HELP = """
import importlib, sys
main = importlib.import_module(sys.argv[1]).main
try:
    main(sys.argv[2:])
except SystemExit as end:
    code = end.code
print("modules:", *sys.modules)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("module", "args", "expected"),
    [
        *(
            (f"train.{name}", [option], f"usage: python -m train.{name}")
            for name in ("vae", "dit", "structure", "encode", "export", "plot")
            for option in ("--help", "--help-all")
        ),
        ("train.evaluate", ["--help"], "python -m train.evaluate {vae,generation}"),
        ("train.evaluate", ["vae", "--help"], "--resolutions"),
        ("train.evaluate", ["generation", "--help"], "--generation.guidance"),
        ("train.demo.__main__", ["--help"], "--size {auto,cpu,gpu}"),
        ("benchmarks.dit", ["--help"], "python -m benchmarks.dit {steps,gradients,learn}"),
        ("benchmarks.dit", ["learn", "--help"], "--vae-minutes"),
        ("benchmarks.training", ["--help"], "benchmarks.training {geometry,bricks,measure}"),
        ("benchmarks.training", ["measure", "--help"], "--learning-rate"),
    ],
)
def test_help_exits_0_and_imports_no_heavy_package(module, args, expected):
    text, _, modules = run_python("-c", SHOW_HELP, module, *args).stdout.rpartition("modules:")
    assert expected in text
    assert not HEAVY & set(modules.split())
    # A field that is called "options" would give its group the title "options options".
    for title in re.findall(r"^╭─ (.*?) ─+╮$", text, re.MULTILINE):
        assert len(set(title.split())) == len(title.split()), title
