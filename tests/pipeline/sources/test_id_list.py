"""Lists of assets: the published layouts, what they match, and what they carry along."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid
from pipeline.core.schema import Record
from pipeline.sources.folder import FolderSource
from pipeline.sources.id_list import (
    ListedAssets,
    check_splits,
    listed_columns,
    read_id_list,
    split_of_record,
    warn_of_missing,
)

ID = "8476c4170df24cf5bbe6967222d1a42d"
GITHUB = "https://github.com/owner/repo/blob/0123/chair.obj"


class Catalogue:
    """A source of records by key, as Objaverse and Objaverse-XL make them."""

    def __init__(self, name, *keys, sha256=None):
        self.name = name
        self.keys = keys
        self.sha256 = sha256

    def records(self):
        for key in self.keys:
            url = f"https://hub/{key.rpartition('/')[2]}.glb" if "github" not in key else key
            yield Record(
                uid=make_uid(self.name, key), source=self.name, url=url, sha256=self.sha256
            )


def matched(tmp_path, name, content, source):
    path = tmp_path / name
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_text(content, encoding="utf-8")
    return list(ListedAssets(source=source, ids=read_id_list(path), matched=set()).records())


@pytest.mark.parametrize("identifier", [f"https://sketchfab.com/3d-models/{ID}", GITHUB])
def test_a_csv_like_that_of_trellis_500k(tmp_path, identifier):
    """Its rows have a hash, a file identifier of Objaverse-XL, a score and captions."""
    captions = json.dumps(["a chair, red", 'a "red" chair']).replace('"', '""')
    text = f"sha256,file_identifier,aesthetic_score,captions\n{'a' * 64},{identifier},6.5,"
    text += f'"{captions}"\n'
    source = Catalogue("objaverse-xl", identifier, GITHUB + "x")
    (record,) = matched(tmp_path, "list.csv", text, source)
    assert record.uid == make_uid("objaverse-xl", identifier)
    assert record.sha256 == "a" * 64  # the download is checked against it
    assert listed_columns(record.metadata) == {
        "aesthetic_score": 6.5,
        "captions": '["a chair, red", "a \\"red\\" chair"]',
    }


@pytest.mark.parametrize(
    "entry", [ID, f"000-023/{ID}", f"000-023/{ID}.glb", f"https://sketchfab.com/3d-models/{ID}"]
)
@pytest.mark.parametrize("source", ["objaverse", "objaverse-xl"])
def test_a_json_list_like_those_of_step1x_3d(tmp_path, entry, source):
    key = ID if source == "objaverse" else f"https://sketchfab.com/3d-models/{ID}"
    (record,) = matched(tmp_path, "list.json", json.dumps([entry]), Catalogue(source, key, "other"))
    assert record.uid == make_uid(source, key)
    assert record.metadata == ""


def test_json_objects_like_those_of_objaverse_plus_plus(tmp_path):
    rows = [{"UID": ID, "style": "realistic", "score": 3, "is_scene": False, "none": None}]
    (record,) = matched(tmp_path, "list.json", json.dumps(rows), Catalogue("objaverse", ID, "x"))
    assert listed_columns(record.metadata) == {"style": "realistic", "score": 3, "is_scene": False}


@pytest.mark.parametrize(
    "content",
    [{"ids": [ID]}, {ID: {"score": 1}}, {ID: 1, "f" * 32: 2}],
    ids=["one list", "objects by id", "values by id"],
)
def test_json_objects_of_identifiers(tmp_path, content):
    (record,) = matched(tmp_path, "list.json", json.dumps(content), Catalogue("objaverse", ID))
    assert record.uid == make_uid("objaverse", ID)


def test_parquet_with_uids_keeps_types(tmp_path):
    uid = make_uid("objaverse", ID)
    table = pa.table({"uid": [uid, "gone"], "tags": [["a", "b"], ["c"]], "n": [1, 2]})
    (record,) = matched(tmp_path, "list.parquet", table, Catalogue("objaverse", "x", ID))
    assert (record.uid, listed_columns(record.metadata)) == (uid, {"tags": ["a", "b"], "n": 1})


def test_files_of_a_folder_are_matched_by_hash_and_by_path(tmp_path):
    folder = tmp_path / "meshes"
    folder.mkdir()
    for name in ("a.obj", "b.obj", "c.obj"):
        (folder / name).write_text(name, encoding="utf-8")
    sha256 = hashlib.sha256(b"b.obj").hexdigest()
    text = f"sha256,path\n{sha256},\n,c.obj\n"
    records = matched(tmp_path, "list.csv", text, FolderSource(root=folder))
    assert [record.url for record in records] == ["b.obj", "c.obj"]


def test_an_asset_with_another_hash_is_left_out(tmp_path):
    text = f"uid,sha256\n{ID},{'a' * 64}\n"
    assert matched(tmp_path, "a.csv", text, Catalogue("objaverse", ID, sha256="b" * 64)) == []
    assert len(matched(tmp_path, "a.csv", text, Catalogue("objaverse", ID, sha256="a" * 64))) == 1


def test_rows_without_an_asset_are_reported(tmp_path, caplog):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([ID, "lost", "gone"]), encoding="utf-8")
    ids = read_id_list(path)
    assert warn_of_missing(ids, {0}) == 2
    assert "2 of 3 rows are no assets of the sources, such as lost, gone" in caplog.text
    with pytest.raises(UserError, match="names no asset of the sources"):
        warn_of_missing(ids, set())


BAD_LISTS = {
    "txt": {"x": "csv, json or parquet"},
    "json": {
        "{": "cannot read the list .*; --ids must name a readable csv, json or parquet file",
        "3": "a list or an object",
        "[3]": "must be a text or an object",
        "[]": "names no asset",
    },
    "csv": {
        "name\nx\n": "row 1 names no asset",
        "uid\na,b\n": "row 1 does not have as many values",
        "uid,sha256\na,12\n": "sha256 '12', not 64 digits",
    },
    "parquet": {"x": "cannot read the list"},
}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (f"a.{ending}", text, words)
        for ending, lists in BAD_LISTS.items()
        for text, words in lists.items()
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_id_list(path)
    with pytest.raises(UserError, match="no file"):
        read_id_list(tmp_path / "missing.csv")


def test_a_column_of_the_list_decides_the_split(tmp_path):
    source = Catalogue("objaverse-xl", GITHUB, GITHUB + "x")
    text = f"url,side\n{GITHUB},val\n{GITHUB}x,train\n"
    records = matched(tmp_path, "list.csv", text, source)
    check_splits(read_id_list(tmp_path / "list.csv"), "side")
    for val_percent in (0, 100):
        splits = [
            split_of_record(record, val_percent=val_percent, column="side") for record in records
        ]
        assert splits == ["val", "train"]
    by_uid = [split_of_record(record, val_percent=100, column=None) for record in records]
    assert by_uid == ["val", "val"]


@pytest.mark.parametrize(("column", "value"), [("side", "test"), ("side", ""), ("other", "val")])
def test_a_row_without_a_split_is_refused(tmp_path, column, value):
    path = tmp_path / "list.csv"
    path.write_text(f"url,{column}\nfirst,train\nsecond,{value}\n", encoding="utf-8")
    shown = "None" if column == "other" or not value else repr(value)
    row = 1 if column == "other" else 2
    with pytest.raises(UserError, match=rf"row {row} must have train or val .* side .*{shown}"):
        check_splits(read_id_list(path), "side")
