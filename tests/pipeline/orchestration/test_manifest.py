"""Manifest rows from the results of visits."""

from dataclasses import replace

import pytest

from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.orchestration.asset_results import AssetResult
from pipeline.orchestration.manifest import new_row, updated_row

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
    verdict = {"status": status, "stage": stage, "reason": reason}
    return AssetResult(uid=RECORD.uid, row=GEOMETRY, products=made, numbers=numbers, **verdict)


def row_of(result):
    return new_row(RECORD, result, shard="000000", row=3, split="val")


def test_a_row_holds_the_record_the_geometry_and_the_verdict():
    row = row_of(visit(sdf_64=5, sdf_512=50))
    assert (row.uid, row.url, row.licence) == (RECORD.uid, "a.obj", "cc0")
    assert (row.sha256, row.faces, row.center) == ("0" * 64, 12, (0.0, 1.0, 2.0))
    assert (row.status, row.tokens) == ("done", {64: 5, 512: 50})
    assert (row.shard, row.row, row.numbers) == ("000000", 3, {"seen": "sdf_512"})


def test_an_asset_that_was_not_read_has_the_hash_of_its_record():
    early = AssetResult(uid=RECORD.uid, status="rejected", stage="fetch", reason="wrong_sha256")
    row = new_row(replace(RECORD, sha256="1" * 64), early, shard="0", row=0, split="val")
    assert (row.sha256, row.faces, row.center) == ("1" * 64, None, None)
    assert (row.split, row.visible_moments) == ("val", None)


def test_the_split_of_an_asset_with_a_shape_waits_for_those_of_its_copies():
    shape = {name: bytes(range(136)).hex() for name in ("visible_moments", "face_moments")}
    result = replace(visit(sdf_64=5), row={**GEOMETRY, **shape})
    row = new_row(RECORD, result, shard="000000", row=0, split="val")
    assert (row.split, row.visible_moments, row.face_moments) == ("", *[bytes(range(136))] * 2)


REJECTED = [
    (visit(sdf_64=5), visit(sdf_128=9)),
    (visit("rejected", "sdf-64", "thin"), visit(sdf_128=9)),
    (visit(sdf_64=5), visit("rejected", "sdf-128", "thin")),
    (visit("rejected", "sdf-64", "thin"), visit("rejected", "sdf-128", "odd")),
]


@pytest.mark.parametrize(("small", "large"), REJECTED)
def test_products_added_in_either_order_give_one_row(small, large):
    upwards = updated_row(row_of(small), large)
    downwards = updated_row(row_of(large), small)
    assert replace(upwards, numbers={}) == replace(downwards, numbers={})
    assert upwards.stage == (small.stage or large.stage)
