"""Plans are written once, read back whole, and refused if they do not match."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import BuildConfig
from pipeline.core.errors import UserError
from pipeline.core.hashing import hash_of, make_uid
from pipeline.core.product import Product
from pipeline.core.schema import Record
from pipeline.curation.catalogue import Catalogue
from pipeline.orchestration.plan import make_plan, read_plan, with_values_of_plan
from pipeline.sources.folder import FolderSource
from tests.child_python import run_python
from tests.pipeline.builds import Listing


def test_a_plan_is_read_back_whole_and_is_not_made_again(tmp_path):
    cfg = BuildConfig(out=tmp_path / "out", shard_size=2, limit=5)
    plan = make_plan(cfg, [Listing("abcdefg")])
    assert plan.shards == ["000000", "000001", "000002"]
    assert [record.url for name in plan.shards for record in plan.records(name)] == list("abcde")
    again = make_plan(cfg, [Listing("xyz")])
    assert again.records("000001") == plan.records("000001") == list(Listing("cd").records())
    assert read_plan(cfg.out).info == plan.info


def test_an_asset_listed_twice_counts_once(tmp_path, caplog):
    plan = make_plan(BuildConfig(out=tmp_path), [Listing("ab"), Listing("bc")])
    assert [record.url for record in plan.records("000000")] == list("abc")
    assert "is listed twice" in caplog.text


def test_a_list_selects_assets_of_sources_and_not_of_a_catalogue(tmp_path):
    """The catalogue has URLs that the list does not name, as those of Objaverse."""
    (tmp_path / "list.json").write_text('["b"]', encoding="utf-8")
    cfg = BuildConfig(out=tmp_path / "screen", ids=tmp_path / "list.json")
    (record,) = make_plan(cfg, [Listing("abc")]).records("000000")
    assert record.url == "b"
    row = {**vars(record), "url": "https://hub/x.glb", "keep": True, "copy_group": record.uid}
    del row["split_key"]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "catalogue.parquet")
    catalogue = Catalogue(path=tmp_path / "catalogue.parquet")
    plan = make_plan(replace(cfg, out=tmp_path / "out"), [catalogue])
    assert [record.url for record in plan.records("000000")] == ["https://hub/x.glb"]


def test_a_plan_counts_the_files_that_a_listed_folder_leaves_out(tmp_path):
    folder = tmp_path / "meshes"
    folder.mkdir()
    for name in ("a.obj", "b.obj", "notes.txt"):
        (folder / name).touch()
    (tmp_path / "list.json").write_text('["b.obj"]', encoding="utf-8")
    cfg = BuildConfig(out=tmp_path / "out", ids=tmp_path / "list.json")
    info = make_plan(cfg, [FolderSource(root=folder)]).info
    assert (info.assets, info.skipped_files) == (1, {"folder": 1})


def test_a_plan_needs_an_asset(tmp_path):
    with pytest.raises(UserError, match="no assets"):
        make_plan(BuildConfig(out=tmp_path / "out"), [Listing("")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 99}, "format_version 99, this code reads 1"),
        ({"config": {}}, "was built with"),
    ],
)
def test_a_plan_of_another_format_or_configuration_is_refused(tmp_path, change, words):
    cfg = BuildConfig(out=tmp_path)
    make_plan(cfg, [Listing("ab")])
    info = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    (tmp_path / "plan.json").write_text(json.dumps({**info, **change}), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        make_plan(cfg, [Listing("ab")])


# Options of reader 1, as builds have stored them before there were reader versions.
HASHES_OF_READER_1 = [
    (BuildConfig(topology_resolution=128), "96a0d7ae55518b5b"),
    (BuildConfig(up="z", source=("folder:x",), topology_resolution=128), "2e2d206d07aa68ee"),
]


@pytest.mark.parametrize(("cfg", "stored"), HASHES_OF_READER_1)
def test_options_of_reader_1_keep_their_hash(cfg, stored):
    assert hash_of(replace(cfg, reader_version=1).shared()) == stored
    assert hash_of(cfg.shared()) != stored
    product = Product.sdf(64)
    assert replace(cfg, reader_version=1).product_hash(product) != cfg.product_hash(product)


def test_a_build_keeps_the_reader_version_that_it_was_begun_with(tmp_path):
    cfg = BuildConfig(out=tmp_path / "new", topology_resolution=128)
    make_plan(cfg, [Listing("ab")])
    assert with_values_of_plan(cfg) == replace(cfg, light="lamps")
    old = replace(cfg, out=tmp_path / "old", reader_version=1)
    plan = make_plan(old, [Listing("ab")])
    assert (plan.info.reader_version, "reader_version" in plan.info.config) == (1, False)
    assert plan.info.config["up"] == "y"
    asked = replace(cfg, out=tmp_path / "old")
    assert with_values_of_plan(asked) == replace(old, light="lamps")
    make_plan(with_values_of_plan(asked), [])  # the same options, so the plan is read
    screening = replace(cfg, out=tmp_path / "ranked" / "screen", reader_version=1)
    make_plan(screening, [Listing("ab")])
    assert with_values_of_plan(replace(cfg, out=tmp_path / "ranked")).reader_version == 1


def test_a_build_keeps_the_topology_resolution_that_it_was_begun_with(tmp_path):
    """Builds of before decided at 128, whatever resolutions they made."""
    old = BuildConfig(out=tmp_path, resolutions=(256, 512), topology_resolution=128)
    make_plan(old, [Listing("ab")])
    resumed = with_values_of_plan(BuildConfig(out=tmp_path, resolutions=(256, 512)))
    assert resumed == replace(old, light="lamps")
    make_plan(resumed, [])
    more = with_values_of_plan(BuildConfig(out=tmp_path, resolutions=(1024,)))
    assert more.topology.resolution == 128
    make_plan(more, [])
    other = BuildConfig(out=tmp_path, resolutions=(256, 512), topology_resolution=512)
    with pytest.raises(UserError, match="--topology-resolution 128, now 512"):
        make_plan(with_values_of_plan(other), [])


class LongListing:
    """A long catalogue in which one record occurs twice."""

    name = "many"

    def __init__(self, count):
        self.count = count

    def records(self):
        for number in [*range(self.count), 5]:
            yield Record(
                uid=make_uid(self.name, str(number)),
                source=self.name,
                url=str(number),
                metadata='{"n": 1}',
            )


def test_a_long_plan_is_written_in_pieces(tmp_path, monkeypatch):
    pieces = []
    write = pq.ParquetWriter.write_table
    monkeypatch.setattr("pipeline.orchestration.plan.ROWS_PER_WRITE", 100)
    monkeypatch.setattr(
        pq.ParquetWriter,
        "write_table",
        lambda self, table: pieces.append(len(table)) or write(self, table),
    )
    plan = make_plan(BuildConfig(out=tmp_path / "out", limit=None), [LongListing(250)])
    assert pieces == [100, 100, 50]
    assert plan.assets == 250
    assert [record.url for name in plan.shards for record in plan.records(name)] == [
        str(number) for number in range(250)
    ]
    assert plan.records("000003")[0].metadata == '{"n": 1}'
    assert not (tmp_path / "out/.plan.parquet.partial").exists()


def test_a_plan_from_before_there_were_catalogues_is_read(tmp_path):
    cfg = BuildConfig(out=tmp_path, limit=None)
    plan = make_plan(cfg, [LongListing(10)])
    pq.write_table(plan.table.drop_columns(["metadata"]), tmp_path / "plan.parquet")
    assert [record.metadata for record in read_plan(tmp_path).records("000000")] == [""] * 10


@pytest.mark.slow
def test_the_plan_of_a_million_assets_takes_less_than_a_minute_and_2_gb(tmp_path):
    code = f"""
import resource, time
from pathlib import Path
from pipeline.config import BuildConfig
from pipeline.orchestration.plan import make_plan
from tests.pipeline.orchestration.test_plan import LongListing
make_plan(BuildConfig(out=Path({str(tmp_path / "out")!r}), limit=None), [LongListing(1_000_000)])
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    seconds, kilobytes = map(float, run_python("-c", code).stdout.split())
    assert seconds < 60
    assert kilobytes < 2e6
