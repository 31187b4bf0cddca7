"""The package exports its readers lazily."""

import subprocess
import sys

import pytest

import pipeline
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard
from tests.pipeline.builds import ROOT


def modules_after(code):
    """Return the names of the modules that a fresh interpreter has loaded after `code`."""
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_numpy_nor_zarr():
    modules = modules_after("import pipeline")
    assert "pipeline" in modules
    assert not {"numpy", "zarr", "pyarrow"} & modules


def test_the_package_exports_its_readers():
    modules = modules_after("from pipeline import RenderShard, SdfShard")
    assert {"pipeline.storage.render_shard", "pipeline.storage.sdf_shard"} <= modules
    assert pipeline.SdfShard is SdfShard
    assert pipeline.RenderShard is RenderShard
    assert {"SdfShard", "RenderShard"} <= set(dir(pipeline))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pipeline' has no attribute 'Sdf'"):
        pipeline.Sdf  # noqa: B018
