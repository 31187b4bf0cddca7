import json

import pyarrow.parquet as pq
import pytest

from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.orchestration.manifest import (
    Result,
    append_stats,
    funnel,
    manifest_row,
    manifest_schema,
    read_manifest,
    with_products,
    write_manifest,
)

RECORD = Record(
    uid=make_uid("folder", "a.obj"), source="folder", url="a.obj", licence="cc0", format="obj"
)
GEOMETRY = {
    **{"sha256": "0" * 64, "faces": 12, "vertices": 8, "components": 1, "area": 6.0, "volume": 1.0},
    **{"sign_path": "closed", "center": [0.0, 1.0, 2.0], "scale": 0.5},
}


def visit(status="done", stage="", reason="", **products):
    made = {name.replace("_", "-"): {"tokens": n} for name, n in products.items()}
    numbers = {"seen": sorted(products)[0]} if products else {}
    return Result(
        uid=RECORD.uid,
        status=status,
        stage=stage,
        reason=reason,
        row=GEOMETRY,
        products=made,
        numbers=numbers,
    )


def row_of(result):
    return manifest_row(RECORD, result, shard="000000", row=3, val_percent=2)


def test_columns_are_those_agreed_in_their_order(tmp_path):
    write_manifest(tmp_path / "m.parquet", [row_of(visit(sdf_64=5, sdf_512=50))], [512, 64])
    assert " ".join(pq.read_table(tmp_path / "m.parquet").column_names) == (
        "uid source url licence sha256 format status stage reason numbers faces vertices components area volume "
        "sign_path tokens_64 tokens_512 center scale shard row split"
    )
    (row,) = read_manifest(tmp_path / "m.parquet")
    assert row == {**row_of(visit(sdf_64=5, sdf_512=50)), "center": [0.0, 1.0, 2.0]}
    assert (row["tokens_64"], row["tokens_512"]) == (5, 50)
    assert json.loads(row["numbers"]) == {"seen": "sdf_512"}


def test_same_rows_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_manifest(tmp_path / name, [row_of(visit(sdf_64=5))] * 3, [64])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_ended_early_has_nulls_for_what_was_not_reached(tmp_path):
    early = Result(uid=RECORD.uid, status="rejected", stage="load", reason="empty_file")
    write_manifest(tmp_path / "m.parquet", [row_of(early)], [64])
    (row,) = read_manifest(tmp_path / "m.parquet")
    assert [
        row[name] for name in ("faces", "area", "sign_path", "tokens_64", "center", "scale")
    ] == [None] * 6
    assert (row["status"], row["stage"], row["reason"]) == ("rejected", "load", "empty_file")


REJECTED = [
    (visit(sdf_64=5), visit(sdf_128=9)),
    (visit("rejected", "sdf-64", "thin"), visit(sdf_128=9)),
    (visit(sdf_64=5), visit("rejected", "sdf-128", "thin")),
    (visit("rejected", "sdf-64", "thin"), visit("rejected", "sdf-128", "odd")),
]


@pytest.mark.parametrize(("small", "large"), REJECTED)
def test_products_added_in_either_order_give_one_row(small, large):
    upwards = with_products(row_of(small), large)
    downwards = with_products(row_of(large), small)
    assert {**upwards, "numbers": ""} == {**downwards, "numbers": ""}
    assert upwards["stage"] == (small.stage or large.stage)


def test_another_format_version_and_other_columns_are_refused(tmp_path):
    write_manifest(tmp_path / "m.parquet", [row_of(visit())], [])
    table = pq.read_table(tmp_path / "m.parquet")
    pq.write_table(table.replace_schema_metadata({"format_version": "99"}), tmp_path / "v.parquet")
    pq.write_table(table.drop_columns(["licence"]), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="format_version 1, got 99"):
        read_manifest(tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="must have the columns"):
        read_manifest(tmp_path / "c.parquet")
    (tmp_path / "n.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="readable manifest"):
        read_manifest(tmp_path / "n.parquet")


def test_funnel_counts_every_verdict_done_first():
    rows = [row_of(visit("rejected", "load", "empty_file"))] * 3 + [row_of(visit())] * 2
    assert funnel(rows) == [("done", "", "", 2), ("rejected", "load", "empty_file", 3)]


def test_stats_keep_every_visit(tmp_path):
    for attempts in (1, 2):
        append_stats(
            tmp_path / "s.parquet",
            [Result(uid="a", status="done", stage="", reason="", attempts=attempts)],
        )
    assert pq.read_table(tmp_path / "s.parquet")["attempts"].to_pylist() == [1, 2]


def test_schema_sorts_resolutions_as_numbers():
    names = manifest_schema([1024, 64, 512]).names
    assert [name for name in names if name.startswith("tokens")] == [
        "tokens_64",
        "tokens_512",
        "tokens_1024",
    ]
