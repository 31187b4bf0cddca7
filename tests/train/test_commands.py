"""Training commands parse their options and print their help without heavy packages."""

import json
import re

import pytest

from tests.child_python import run_python

HEAVY = {"torch", "numba", "transformers", "ray"}
SHOW_HELP = """
import contextlib, importlib, io, json, sys
shown = []
for module, args in json.loads(sys.argv[1]):
    code, text = None, io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            importlib.import_module(module).main(args)
        except SystemExit as end:
            code = end.code
    shown.append({"code": code, "text": text.getvalue(), "modules": [*sys.modules]})
print(json.dumps(shown))
"""
COMMANDS = [
    *(
        (f"train.{name}", [option], f"usage: python -m train.{name}")
        for name in ("vae", "dit", "structure", "encode", "export", "plot", "estimate")
        for option in ("--help", "--help-all")
    ),
    ("train.evaluate", ["--help"], "python -m train.evaluate {vae,generation,retrieval,meshes}"),
    ("train.evaluate", ["vae", "--help"], "--resolutions"),
    ("train.evaluate", ["generation", "--help"], "--generation.guidance"),
    ("train.demo.__main__", ["--help"], "--size {auto,cpu,gpu}"),
    ("benchmarks.dit", ["--help"], "python -m benchmarks.dit {steps,parts,gradients,learn}"),
    ("benchmarks.dit", ["learn", "--help"], "--vae-minutes"),
    ("benchmarks.remote_data", ["--help"], "--megabytes-per-s"),
    ("benchmarks.training", ["--help"], "benchmarks.training {geometry,bricks,measure}"),
    ("benchmarks.training", ["measure", "--help"], "--learning-rate"),
]


@pytest.fixture(scope="module")
def shown():
    """Exit code, text and loaded modules of each command, all of which run in one child."""
    words = json.dumps([(module, args) for module, args, _ in COMMANDS])
    return json.loads(run_python("-c", SHOW_HELP, words).stdout)


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[f"{m} {a}" for m, a, _ in COMMANDS])
def test_help_exits_0_and_imports_no_heavy_package(shown, number):
    help_text = shown[number]["text"]
    assert shown[number]["code"] == 0
    assert COMMANDS[number][2] in help_text
    assert not HEAVY & set(shown[number]["modules"])
    # A field that is called "options" would give its group the title "options options".
    for title in re.findall(r"^╭─ (.*?) ─+╮$", help_text, re.MULTILINE):
        assert len(set(title.split())) == len(title.split()), title
