"""The public names of the package: all of them exist, and importing the package is cheap."""

import subprocess
import sys
from pathlib import Path

import pytest

import model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", model.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(model, name).__name__ == name
    assert name in dir(model)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SparseVea'"):
        _ = model.SparseVea


def test_the_package_imports_without_torch():
    code = "import sys, model, model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
