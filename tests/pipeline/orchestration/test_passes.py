"""The last lines of a build: its first rejections."""

import json
import logging
from types import SimpleNamespace

from pipeline.config import BuildConfig
from pipeline.orchestration.passes import REJECTIONS_SHOWN, _log_rejections
from pipeline.storage.layout import manifest_path
from pipeline.storage.manifest import ManifestRow, write_manifest


def log_lines(tmp_path, caplog, rows):
    path = manifest_path(tmp_path, "000000")
    path.parent.mkdir(parents=True)
    write_manifest(path, rows, ())
    info = SimpleNamespace(config=json.loads(json.dumps(BuildConfig().shared())))
    caplog.set_level(logging.INFO)
    _log_rejections(SimpleNamespace(out=tmp_path, shards=["000000"], info=info))
    return caplog.messages


def row(url, reason, **numbers):
    ended = {"status": "rejected", "stage": "filter_geometry", "reason": reason}
    return ManifestRow(uid=url, url=url, shard="000000", numbers=numbers, **ended)


def test_rejections_state_the_measured_value_and_the_threshold(tmp_path, caplog):
    done = ManifestRow(uid="done", url="cube.ply", status="done", shard="000000")
    flat = row("plane.ply", "flat", extents=[2.0, 1.0, 0.000004], min_thickness=1e-5)
    assert log_lines(tmp_path, caplog, [done, flat, row("soup.stl", "no_area")]) == [
        "plane.ply: flat (thickness 2e-06, at least 1e-05 (--filter.min-thickness); "
        "rejected in filter_geometry)",
        "soup.stl: no_area (rejected in filter_geometry)",
    ]


def test_after_some_rejections_the_log_names_the_report(tmp_path, caplog):
    rows = [row(f"{n}.ply", "no_area") for n in range(REJECTIONS_SHOWN + 1)]
    messages = log_lines(tmp_path, caplog, rows)
    assert len(messages) == REJECTIONS_SHOWN + 1
    assert messages[-1] == "The report lists all reasons."
