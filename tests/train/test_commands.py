"""The training commands parse their options without importing heavy packages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "numba", "transformers", "ray"}
SHOW_HELP = """
import importlib, sys
main = importlib.import_module(sys.argv[1]).main
try:
    main([sys.argv[2]])
except SystemExit as end:
    code = end.code
print("modules:", *sys.modules)
sys.exit(code)
"""


@pytest.mark.parametrize("option", ["--help", "--help-all"])
@pytest.mark.parametrize("command", ["vae", "dit", "structure", "encode", "export"])
def test_help_imports_no_heavy_package(command, option):
    process = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, f"train.{command}", option],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    text, _, modules = process.stdout.rpartition("modules:")
    assert f"usage: python -m train.{command}" in text
    assert not HEAVY & set(modules.split())
