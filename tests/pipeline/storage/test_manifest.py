from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from pipeline.core.hashing import make_uid
from pipeline.storage.manifest import (
    ManifestRow,
    count_reasons,
    manifest_schema,
    read_manifest,
    write_manifest,
)

ROW = ManifestRow(
    uid=make_uid("folder", "a.obj"),
    source="folder",
    url="a.obj",
    licence="cc0",
    sha256="0" * 64,
    format="obj",
    status="done",
    numbers={"seen": "sdf_512"},
    faces=12,
    vertices=8,
    components=1,
    area=6.0,
    volume=1.0,
    sign_path="closed",
    tokens={64: 5, 512: 50},
    center=(0.0, 1.0, 2.0),
    scale=0.5,
    shard="000000",
    row=3,
    split="train",
    up_axis="z",
    up_origin="stated",
    warnings=("side_file_missing", "trailing_data"),
)
REJECTED = ManifestRow(uid="folder-0", status="rejected", stage="load", reason="empty_file")


def test_columns_are_those_agreed_in_their_order(tmp_path):
    write_manifest(tmp_path / "m.parquet", [ROW], [512, 64])
    table = pq.read_table(tmp_path / "m.parquet")
    assert " ".join(table.column_names) == (
        "uid source url licence sha256 format status stage reason numbers "
        "faces vertices components area volume sign_path tokens_64 tokens_512 "
        "center scale shard row split up_axis up_origin warnings listed "
        "visible_moments face_moments"
    )
    (columns,) = table.to_pylist()
    assert (columns["tokens_64"], columns["tokens_512"]) == (5, 50)
    assert columns["numbers"] == '{"seen": "sdf_512"}'


def test_a_row_is_read_back_as_it_was_written(tmp_path):
    write_manifest(tmp_path / "m.parquet", [ROW], [64, 512])
    assert read_manifest(tmp_path / "m.parquet") == [ROW]


def test_same_rows_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_manifest(tmp_path / name, [ROW] * 3, [64, 512])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_ended_early_has_nulls_for_what_was_not_reached(tmp_path):
    write_manifest(tmp_path / "m.parquet", [REJECTED], [64])
    (columns,) = pq.read_table(tmp_path / "m.parquet").to_pylist()
    names = ("faces", "area", "sign_path", "tokens_64", "center", "scale")
    assert [columns[name] for name in names] == [None] * 6
    (row,) = read_manifest(tmp_path / "m.parquet")
    assert (row.status, row.stage, row.reason) == ("rejected", "load", "empty_file")
    assert (row.tokens, row.ended_before_products) == ({64: None}, True)


def test_another_format_version_and_other_columns_are_refused(tmp_path):
    write_manifest(tmp_path / "m.parquet", [ROW], [64, 512])
    table = pq.read_table(tmp_path / "m.parquet")
    pq.write_table(table.replace_schema_metadata({"format_version": "99"}), tmp_path / "v.parquet")
    pq.write_table(table.drop_columns(["licence"]), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="format_version 99, this code reads 1"):
        read_manifest(tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="must have the columns"):
        read_manifest(tmp_path / "c.parquet")
    (tmp_path / "n.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="readable manifest"):
        read_manifest(tmp_path / "n.parquet")


def test_reasons_are_counted_done_first():
    assert count_reasons([REJECTED] * 3 + [ROW] * 2) == [
        ("done", "", "", 2),
        ("rejected", "load", "empty_file", 3),
    ]


def test_schema_sorts_resolutions_as_numbers():
    names = manifest_schema([1024, 64, 512]).names
    assert [name for name in names if name.startswith("tokens")] == [
        "tokens_64",
        "tokens_512",
        "tokens_1024",
    ]


def test_a_manifest_of_reader_1_is_read_without_axis_and_warnings(tmp_path):
    write_manifest(tmp_path / "m.parquet", [ROW], [64, 512])
    table = pq.read_table(tmp_path / "m.parquet")
    moments = ["visible_moments", "face_moments"]
    assert table.column_names[-6:] == ["up_axis", "up_origin", "warnings", "listed", *moments]
    pq.write_table(table.drop_columns(table.column_names[-6:]), tmp_path / "old.parquet")
    (row,) = read_manifest(tmp_path / "old.parquet")
    assert (row.up_axis, row.up_origin, row.warnings) == (None, None, ())
    assert row == replace(ROW, up_axis=None, up_origin=None, warnings=())
    pq.write_table(table.drop_columns(["listed", *moments]), tmp_path / "before_lists.parquet")
    assert read_manifest(tmp_path / "before_lists.parquet") == [ROW]
    pq.write_table(
        table.drop_columns(["warnings", "listed", *moments]), tmp_path / "partly.parquet"
    )
    with pytest.raises(ValueError, match="must have the columns"):
        read_manifest(tmp_path / "partly.parquet")
