"""The table of mesh formats: readers, extras that are not installed, and formats without reader."""

from importlib import import_module

import pytest

from pipeline.core.errors import Reject
from pipeline.mesh_io import formats
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.formats import FORMATS, MeshFormat, check_format, why_skipped
from pipeline.mesh_io.load import load

NEEDS_EXTRA = MeshFormat(module="x", function="y", extra="xyz", requires=("no_such_module",))


@pytest.fixture
def _xyz(monkeypatch):
    monkeypatch.setitem(formats.FORMATS, "xyz", NEEDS_EXTRA)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_has_a_reader(name):
    known = check_format(name, blender="blender")
    assert callable(getattr(import_module(known.module), known.function))
    assert why_skipped(name, blender="blender") == ""


@pytest.mark.usefixtures("_xyz")
def test_a_format_whose_extra_is_missing_is_rejected_with_the_name_of_the_extra(tmp_path):
    (tmp_path / "a.xyz").write_bytes(b"x")
    with pytest.raises(Reject) as caught:
        load(tmp_path / "a.xyz", LoadConfig())
    assert caught.value.reason == "missing_extra"
    assert caught.value.numbers["extra"] == "xyz"
    assert why_skipped("xyz") == "the extra xyz is not installed: pip install 'sparse3d[xyz]'"


def test_a_format_without_reader_is_unsupported(tmp_path):
    (tmp_path / "a.max").write_bytes(b"x")
    with pytest.raises(Reject, match="unsupported_format format=max"):
        load(tmp_path / "a.max", LoadConfig())
    assert why_skipped("max") == "there is no reader for the format"


@pytest.mark.parametrize("name", ["blend", "abc"])
def test_a_format_that_needs_blender_is_rejected_with_the_name_of_the_option(tmp_path, name):
    (tmp_path / f"a.{name}").write_bytes({"blend": b"BLENDER", "abc": b"Ogawa"}[name])
    with pytest.raises(Reject, match="missing_blender") as caught:
        load(tmp_path / f"a.{name}", LoadConfig())
    assert "--load.blender" in caught.value.numbers["error"]
    assert "--load.blender" in why_skipped(name)
