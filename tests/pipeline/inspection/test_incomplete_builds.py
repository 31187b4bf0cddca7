"""Inspecting a copy of a build from which files are missing."""

import shutil

import pytest

from pipeline.core.errors import UserError
from pipeline.inspection.build_report import write_report
from pipeline.inspection.cost_estimate import measure_passes


@pytest.mark.parametrize("inspect", [write_report, measure_passes])
@pytest.mark.parametrize("part", ["stats", "manifest"])
def test_a_copy_without_stats_or_manifest_is_refused(inspect, part, tiny_build, tmp_path):
    out = shutil.copytree(tiny_build, tmp_path / "copy", ignore=shutil.ignore_patterns(part))
    message = f"is not a complete build; copy its stats and manifest, too: .*{part}/000000"
    with pytest.raises(UserError, match=message):
        inspect(out)
