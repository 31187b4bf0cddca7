"""Exports of whole builds: files, lists, records, resuming, and assets that cannot be exported."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from pipeline.conversion import vecset_export
from pipeline.conversion.config import ExportConfig
from pipeline.conversion.vecset_export import export, read_records
from pipeline.conversion.vecset_layouts import LAYOUTS
from pipeline.core.errors import RunError, UserError
from pipeline.core.provenance import READER_VERSION
from pipeline.orchestration.isolated_process import ProcessExit
from pipeline.storage.manifest import read_manifest, write_manifest
from tests.pipeline.conversion import trainer_loaders
from tests.pipeline.conversion.small_builds import VIEWS, make_build

NAMES = ("box.ply", "broken.ply", "cone.ply", "cube.ply", "rod.ply")


class SameProcess:
    """Runs calls in this process. `crash` names the assets whose process dies."""

    crash: tuple[str, ...] = ()
    calls = 0

    def __init__(self, warm_up: str):
        module, _, name = warm_up.partition(":")
        assert callable(getattr(importlib.import_module(module), name))

    def call(self, function, job, *, log, timeout_s, memory_bytes):
        type(self).calls += 1
        if job.asset.record.url in self.crash:
            return ProcessExit(reason="timeout", detail="", seconds=1.0, peak_rss_bytes=0)
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(job)
        return ProcessExit(reason="", detail="", seconds=0.0, peak_rss_bytes=0)

    def close(self):
        pass


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    monkeypatch.setattr(vecset_export, "IsolatedProcess", SameProcess)
    monkeypatch.setattr(SameProcess, "crash", ())
    monkeypatch.setattr(SameProcess, "calls", 0)


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Five mesh files; one of them changes after it was built."""
    folder = tmp_path_factory.mktemp("assets")
    for number, name in enumerate(NAMES):
        trimesh.creation.box((1.0, 0.5, 0.2 + 0.1 * number)).export(folder / name)
    out = folder.parent / "build"
    make_build(out, folder)
    (folder / "broken.ply").write_bytes(b"ply\nformat ascii 1.0\nend_header\n")
    return out


def config(build, output, **options):
    small = {"points": 40, "space_points": 50}
    return ExportConfig(directory=build, output=output, **{**small, **options})


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files_of(out)}


def files_of(out: Path):
    return sorted(path for path in out.rglob("*") if path.is_file())


def test_an_export_can_be_loaded_and_names_what_it_could_not_export(assets, tmp_path):
    result = export(config(assets, tmp_path))
    assert result == {"done": 4, "rejected": 1, "failed": 0, "smooth": 0}
    records = read_records(tmp_path)
    rejected = [record for record in records.values() if record.status == "rejected"]
    assert [(r.stage, r.reason) for r in rejected] == [("fetch", "wrong_sha256")]
    loaded = [
        (uid, images)
        for split in ("train", "val")
        for uid, _, images in trainer_loaders.hunyuan(tmp_path / split)
    ]
    splits = {record.split for record in records.values() if record.status == "done"}
    assert splits == {"train", "val"}
    assert {uid for uid, _ in loaded} == {r.uid for r in records.values() if r.status == "done"}
    # the loader draws one of 24 images; the build has fewer, which are repeated in order
    for _, images in loaded:
        pixels = [np.asarray(Image.open(path)) for path in images]
        assert [int(image[0, 0, 0]) for image in pixels] == [10 + n % VIEWS for n in range(24)]
        assert all(image.shape[2] == 4 for image in pixels)


def names_of(root, trainer, split):
    """Return the uids that a list names, read as the loader does."""
    if trainer == "dora":
        return [Path(path).stem for path, _ in trainer_loaders.dora(root, split, near_rows=60)]
    assets = list(trainer_loaders.step1x(root, split))
    assert all(image.exists() for _, _, image in assets)
    return [uid.split("/")[-1] for uid, _, _ in assets]


@pytest.mark.parametrize("trainer", ["dora", "step1x-3d"])
def test_lists_name_the_exported_assets_of_each_split(assets, tmp_path, trainer, monkeypatch):
    few = replace(LAYOUTS["dora"].counts, near=60)
    monkeypatch.setitem(LAYOUTS, "dora", replace(LAYOUTS["dora"], counts=few))
    export(config(assets, tmp_path, trainer=trainer))
    done = [r for r in read_records(tmp_path).values() if r.status == "done"]
    for name, split in (("train", "train"), ("val", "val"), ("test", "val")):
        listed = names_of(tmp_path, trainer, name)
        assert sorted(listed) == sorted(r.uid for r in done if r.split == split)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["dora", "ultrashape"])
def test_the_loaders_that_fix_numbers_of_points_accept_an_export(assets, tmp_path, trainer):
    points = 5400 if trainer == "dora" else None
    export(config(assets, tmp_path, trainer=trainer, points=points, limit=1))
    (record,) = read_records(tmp_path).values()
    if trainer == "dora":
        numbers = {"sharp_samples": 21_384, "near_samples": 10_000, "space_samples": 50}
        ((_, loaded),) = trainer_loaders.dora(tmp_path, record.split, **numbers)
        assert len(loaded.points) == 4 * 5400 + 400_000 + 50
    else:
        ((uid, loaded, image),) = trainer_loaders.ultrashape(tmp_path, record.split)
        assert (uid, len(loaded.surface)) == (record.uid, 300_000)
        assert Path(image).exists()


def test_an_interrupted_export_resumes_to_the_same_bytes(assets, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    export(config(assets, whole, trainer="step1x-3d", seed=3))
    export(config(assets, resumed, trainer="step1x-3d", seed=3, limit=2))
    # a record that was cut short, and a file that was lost
    with (resumed / "assets.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"uid": "fold')
    next((resumed / "surfaces").rglob("*.npz")).unlink()
    SameProcess.calls = 0
    export(config(assets, resumed, trainer="step1x-3d", seed=3))
    assert SameProcess.calls == 4  # all but the rejected one
    a, b = files(whole), files(resumed)
    assert sorted(a) == sorted(b)
    assert {name for name in a if a[name] != b[name]} <= {"assets.jsonl"}
    assert read_records(whole) == read_records(resumed)
    SameProcess.calls = 0
    export(config(assets, resumed, trainer="step1x-3d", seed=3))
    assert SameProcess.calls == 0


def test_a_failed_asset_is_tried_again_and_does_not_stop_the_others(assets, tmp_path, monkeypatch):
    monkeypatch.setattr(SameProcess, "crash", ("cone.ply",))
    assert export(config(assets, tmp_path, trainer="step1x-3d"))["failed"] == 1
    monkeypatch.setattr(SameProcess, "crash", ())
    assert export(config(assets, tmp_path, trainer="step1x-3d"))["done"] == 4
    assert SameProcess.calls == 6


def test_other_options_need_another_directory(assets, tmp_path):
    export(config(assets, tmp_path, trainer="step1x-3d", limit=1))
    with pytest.raises(UserError, match=r"--sharp-degrees 15.0, now 40.0; choose another --output"):
        export(config(assets, tmp_path, trainer="step1x-3d", sharp_degrees=40.0))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="not an export and not empty"):
        export(config(assets, tmp_path / "other"))


def test_an_asset_in_another_frame_than_the_build_is_rejected(assets, tmp_path):
    build = tmp_path / "build"
    build.mkdir()
    for path in files_of(assets):
        target = build / path.relative_to(assets)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (manifest,) = (build / "manifest").glob("*.parquet")
    rows = read_manifest(manifest)
    write_manifest(manifest, [replace(row, scale=row.scale * 1.01) for row in rows], [64])
    with pytest.raises(RunError, match="no asset was exported"):
        export(config(build, tmp_path / "out"))
    reasons = {record.reason for record in read_records(tmp_path / "out").values()}
    assert reasons == {"wrong_sha256", "frame_changed"}


def test_ultrashape_accepts_only_the_number_of_points_of_its_loader():
    with pytest.raises(ValueError, match="points must be 300000 for ultrashape"):
        ExportConfig(directory=Path("a"), output=Path("b"), trainer="ultrashape", points=17)


def test_the_build_must_exist_and_be_read_by_this_version(assets, tmp_path):
    with pytest.raises(UserError, match="is not a build"):
        export(config(tmp_path, tmp_path / "out"))
    plan = json.loads((assets / "plan.json").read_text(encoding="utf-8"))
    build = tmp_path / "old"
    build.mkdir()
    (build / "plan.parquet").write_bytes((assets / "plan.parquet").read_bytes())
    for change, message in (
        ({"reader_version": 1}, "made by reader 1"),
        ({"normalize": {"half_extent": 0.4, "new": 1}}, "not those of this version"),
    ):
        plan["config"] |= change
        (build / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            export(config(build, tmp_path / "out"))
        plan["config"]["reader_version"] = READER_VERSION
