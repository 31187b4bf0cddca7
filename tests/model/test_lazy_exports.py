"""The public names of the package: all of them exist, and importing the package is cheap."""

import pytest

import model
from tests.child_python import run_python


@pytest.mark.parametrize("name", model.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(model, name).__name__ == name
    assert name in dir(model)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SparseVea'"):
        _ = model.SparseVea


def test_the_package_imports_without_torch():
    run_python("-c", "import sys, model, model.config; sys.exit('torch' in sys.modules)")
