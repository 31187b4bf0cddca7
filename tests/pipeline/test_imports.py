"""What imports and the parsing of options load: the readers are lazy, and --help is light."""

import pytest

import pipeline
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard
from tests.child_python import run_python


def modules_after(code):
    """Return the names of the modules that a fresh interpreter has loaded after `code`."""
    program = f"{code}\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    return set(run_python("-c", program).stderr.split())


HEAVY = {
    "torch",
    "numba",
    "ray",
    "transformers",
    "trimesh",
    "zarr",
    "pyarrow",
    "moderngl",
}


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


@pytest.mark.parametrize("command", ["build", "verify", "report", "estimate"])
@pytest.mark.parametrize("option", ["--help", "--help-all"])
def test_parsing_the_options_of_a_command_loads_nothing_heavy(command, option):
    modules = modules_after(
        f"""
import runpy, sys
sys.argv = ["command", "{option}"]
try:
    runpy.run_module("pipeline.{command}", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
"""
    )
    assert "pipeline.core.cli" in modules
    assert not HEAVY & modules


def test_parsing_a_whole_configuration_loads_nothing_heavy():
    args = ["--preset", "paper", "--source", "objaverse", "--out", "s3://bucket/x"]
    modules = modules_after(f"from pipeline.build import configure\nconfigure({args})")
    assert not HEAVY & modules
