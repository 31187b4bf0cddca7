"""Ranked builds: screening, the catalogue, products of kept assets, and more for the best."""

import errno
import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import UserError
from pipeline.core.hashing import split_of
from pipeline.core.product import Product
from pipeline.curation.catalogue import read_funnel
from pipeline.curation.config import RankConfig, ScreenConfig
from pipeline.curation.dedup import DUPLICATE_BYTES, DUPLICATE_GEOMETRY
from pipeline.inspection.asset_list import list_rows, write_attribution, write_list
from pipeline.inspection.verification import verify
from pipeline.orchestration.passes import run_passes
from pipeline.orchestration.plan import read_plan
from pipeline.sources import open_source
from pipeline.sources.id_list import ListedAssets, listed_columns, read_id_list
from pipeline.sources.procedural import make_shape
from pipeline.sources.shapes import FAMILIES, to_glb
from pipeline.storage.layout import CATALOGUE
from pipeline.storage.sdf_shard import SdfShard
from tests.pipeline.builds import assert_same, config, contents, rows_of
from tests.pipeline.crashing_source import box

pytestmark = pytest.mark.usefixtures("shared_ray")

FAMILY = {name: number for number, name in enumerate(FAMILIES)}
SHAPES = ["torus_knot", "gear", "vase", "chair", "lamp", "bowl"]


def fill(folder):
    """Write five shapes, two copies of the first one, a box and a broken file."""
    names = [name for name in SHAPES if name in FAMILY] or list(FAMILIES)[:5]
    names = (names + [name for name in FAMILIES if name not in names])[:5]
    for number, name in enumerate(names):
        (folder / f"{number}-{name}.glb").write_bytes(
            to_glb(make_shape(f"{FAMILY[name]:04d}-{name}"))
        )
    first = folder / f"0-{names[0]}.glb"
    shutil.copy(first, folder / "copy.glb")
    pieces = make_shape(f"{FAMILY[names[0]]:04d}-{names[0]}")
    turned = [
        replace(piece, vertices=piece.vertices * 7.0 + 3.0, faces=piece.faces[::-1, ::-1])
        for piece in pieces
    ]
    (folder / "turned.glb").write_bytes(to_glb(turned))
    (folder / "broken.glb").write_bytes(b"glTF")
    (folder / "box.obj").write_text(box(1), encoding="utf-8")
    return folder


def ranked(out, folder, **options):
    looks = {"min_tokens": 10, "min_contrast": 0.0, "min_coverage": 0.0, "max_leak_fraction": 1.0}
    rank = RankConfig(
        **{"target_count": 4, "best_count": 2, "best_resolutions": (96,), **looks, **options}
    )
    small = ScreenConfig(resolution=64, image_size=64)
    return config(out, source=(f"folder:{folder}",), rank=rank, screen=small, shard_size=3)


@pytest.fixture(scope="module")
def ranked_build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    (folder / "meshes").mkdir()
    cfg = ranked(folder / "out", fill(folder / "meshes"))
    return cfg, run_passes(cfg, [open_source(cfg.source[0])])


def catalogue(cfg):
    return pq.read_table(cfg.out / CATALOGUE).to_pylist()


def test_the_catalogue_has_every_asset_and_says_which_are_kept(ranked_build):
    cfg, total = ranked_build
    rows = {row["url"]: row for row in catalogue(cfg)}
    assert len(rows) == 9
    kept = [row for row in rows.values() if row["keep"]]
    assert [row["rank"] for row in kept] == [0, 1, 2, 3]
    assert [row["score"] for row in kept] == sorted((row["score"] for row in kept), reverse=True)
    assert total["done"] == 4
    assert (rows["broken.glb"]["status"], rows["broken.glb"]["stage"]) == ("rejected", "load")
    assert rows["box.obj"]["reason"] == "plain_box"
    reasons = {rows[name]["reason"] for name in ("copy.glb", "turned.glb")} | {
        row["reason"] for url, row in rows.items() if url.startswith("0-")
    }
    assert {DUPLICATE_BYTES, DUPLICATE_GEOMETRY} <= reasons
    assert sum(row["reason"] == "below_target" for row in rows.values()) == 1


def test_the_plan_holds_the_kept_ones_the_best_first_and_verify_finds_nothing(ranked_build):
    cfg, _ = ranked_build
    plan = read_plan(cfg.out)
    assert plan.table["uid"].to_pylist() == [row["uid"] for row in catalogue(cfg) if row["keep"]]
    assert [row.status for row in rows_of(cfg.out)] == ["done"] * 4
    assert verify(cfg.out) == []
    assert len(read_plan(cfg.out / "screen").table) == 9


def test_copies_are_one_group_whose_smallest_uid_decides_the_split(ranked_build):
    cfg, _ = ranked_build
    rows = {row["url"]: row for row in catalogue(cfg)}
    first = next(url for url in rows if url.startswith("0-"))
    copies = [rows[url] for url in (first, "copy.glb", "turned.glb")]
    smallest = min(row["uid"] for row in copies)
    assert {row["copy_group"] for row in copies} == {smallest}
    assert rows["broken.glb"]["copy_group"] == rows["broken.glb"]["uid"]
    (kept,) = (row for row in copies if row["keep"])
    assert {row["duplicate_kind"] for row in copies if not row["keep"]} <= {
        "same_file",
        "same_shape",
    }
    keys = {record.uid: record.split_key for record in read_plan(cfg.out).records("000000")}
    keys |= {record.uid: record.split_key for record in read_plan(cfg.out).records("000001")}
    assert keys[kept["uid"]] == ("" if kept["uid"] == smallest else smallest)
    val_percent = cfg.val_percent
    splits = {row.uid: row.split for row in rows_of(cfg.out)}
    assert splits[kept["uid"]] == split_of(smallest, val_percent)


@pytest.mark.parametrize("extension", ["csv", "json", "parquet"])
def test_a_list_of_the_build_selects_the_same_assets_again(ranked_build, tmp_path, extension):
    cfg, _ = ranked_build
    rows = list_rows(cfg.out)
    path = tmp_path / f"list.{extension}"
    write_list(rows, path)
    listed = ListedAssets(source=open_source(cfg.source[0]), ids=read_id_list(path), matched=set())
    records = {record.uid: record for record in listed.records()}
    assert sorted(records) == sorted(row["uid"] for row in rows)
    scores = {row["uid"]: row["score"] for row in catalogue(cfg)}
    for uid, record in records.items():
        assert listed_columns(record.metadata)["score"] == scores[uid]
        assert record.sha256 is not None


def test_the_attribution_has_every_finished_asset_by_split(ranked_build, tmp_path):
    cfg, _ = ranked_build
    build = shutil.copytree(cfg.out, tmp_path / "out")
    write_attribution(build)
    files = {
        split: (build / f"attribution{split}.csv").read_text(encoding="utf-8").splitlines()
        for split in ("", "-train", "-val")
    }
    assert {lines[0] for lines in files.values()} == {"uid,author,title,licence,url"}
    assert len(files[""]) == 5
    assert sorted(files[""][1:]) == sorted(files["-train"][1:] + files["-val"][1:])
    (row,) = (row for row in catalogue(cfg) if row["rank"] == 0)
    assert files[""][1] == f"{row['uid']},,{row['url']},unknown,{row['url']}"


def test_only_the_best_have_the_resolution_of_the_second_pass(ranked_build):
    cfg, _ = ranked_build
    uids = read_plan(cfg.out).table["uid"].to_pylist()
    assert SdfShard(cfg.out / "sdf/96/000000.zarr").uids == uids[:2]
    assert SdfShard(cfg.out / "sdf/64/000000.zarr").uids == uids[:3]
    assert not (cfg.out / "sdf/96/000001.zarr").exists()
    assert [row.tokens[96] is not None for row in rows_of(cfg.out)[:3]] == [True, True, False]


def test_the_same_input_gives_the_same_catalogue_and_the_same_bytes(ranked_build, tmp_path):
    cfg, total = ranked_build
    again = replace(cfg, out=tmp_path / "out")
    assert run_passes(again, [open_source(cfg.source[0])]) == total
    assert_same(contents(again.out), contents(cfg.out))


def test_a_finished_build_is_not_touched_again(ranked_build):
    cfg, total = ranked_build
    before = {path: path.stat().st_mtime_ns for path in cfg.out.rglob("*") if path.is_file()}
    assert run_passes(cfg, []) == total
    assert {
        path: path.stat().st_mtime_ns for path in cfg.out.rglob("*") if path.is_file()
    } == before


def test_other_thresholds_need_no_second_look(ranked_build, tmp_path):
    """The screening is taken over; what is kept follows the new thresholds."""
    cfg, _ = ranked_build
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(cfg.out / "screen", out / "screen")
    before = {path: path.stat().st_mtime_ns for path in (out / "screen").rglob("*")}
    strict = ranked(
        out, cfg.source[0].removeprefix("folder:"), max_solid_fraction=1.0, target_count=9
    )
    run_passes(strict, [open_source(cfg.source[0])])
    assert {path: path.stat().st_mtime_ns for path in (out / "screen").rglob("*")} == before
    assert {row["url"] for row in catalogue(strict) if row["keep"]} > {
        row["url"] for row in catalogue(cfg) if row["keep"]
    }
    with pytest.raises(UserError, match=r"--rank.target-count 4, now 9"):
        run_passes(replace(cfg, rank=strict.rank), [open_source(cfg.source[0])])


def test_a_disk_that_fills_under_the_catalogue_does_not_end_the_build_for_good(
    ranked_build, tmp_path, monkeypatch
):
    def full(table, path, **options):
        path.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    cfg, _ = ranked_build
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(cfg.out / "screen", out / "screen")
    monkeypatch.setattr("pipeline.curation.catalogue.pq.write_table", full)
    for _ in range(2):  # the second one gets as far
        with pytest.raises(OSError, match="No space left"):
            run_passes(replace(cfg, out=out), [open_source(cfg.source[0])])


def test_the_funnel_is_part_of_the_catalogue(ranked_build):
    cfg, _ = ranked_build
    rows = {row["reason"]: row for row in read_funnel(cfg.out / CATALOGUE)}
    assert rows["plain_box"]["thresholds"] == {"rank.max_solid_fraction": 0.985}
    assert sum(row["assets"] for row in rows.values()) == 9 - 4


def test_a_catalogue_that_was_changed_is_found(ranked_build, tmp_path):
    cfg, _ = ranked_build
    out = tmp_path / "out"
    shutil.copytree(cfg.out, out)
    table = pq.read_table(out / CATALOGUE)
    pq.write_table(table.slice(1), out / CATALOGUE)
    assert [breach.rule for breach in verify(out)] == [
        f"{CATALOGUE}: is not the one that the plan was made from"
    ]
    (out / CATALOGUE).unlink()
    assert "cannot be read" in str(verify(out)[0])
    shutil.copy(cfg.out / CATALOGUE, out / CATALOGUE)
    (out / "screen/screen/64/000000.parquet").write_bytes(b"x")
    assert {breach.shard for breach in verify(out)} == {"screen 000000"}


def test_nothing_kept_is_an_error_that_says_why(tmp_path):
    (tmp_path / "meshes").mkdir()
    (tmp_path / "meshes/a.obj").write_text(box(1), encoding="utf-8")
    cfg = ranked(tmp_path / "out", tmp_path / "meshes")
    advice = "change --rank options, or --filter options, which need another --out"
    with pytest.raises(UserError, match=rf"no asset of .* is kept \(1 plain_box\); {advice}$"):
        run_passes(cfg, [open_source(cfg.source[0])])
    with pytest.raises(UserError, match=r"--filter\.min-faces .*; choose another --out"):
        run_passes(
            replace(cfg, filter=replace(cfg.filter, min_faces=5)), [open_source(cfg.source[0])]
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(UserError, match="is not a build"):
        run_passes(ranked(tmp_path / "other", tmp_path / "meshes"), [open_source(cfg.source[0])])


def test_the_screenings_options_are_its_own(tmp_path):
    cfg = ranked(tmp_path / "out", tmp_path)
    first = replace(cfg, run="screen")
    assert first.products == (Product.screen(64),)
    assert "rank" not in json.dumps(first.shared())
    assert replace(first, rank=RankConfig()).product_hash(Product.screen(64)) == first.product_hash(
        Product.screen(64)
    )
    assert replace(first, screen=ScreenConfig(resolution=128)).product_hash(
        Product.screen(128)
    ) != first.product_hash(Product.screen(64))
    assert replace(cfg, run="best").products == (Product.sdf(96),)
