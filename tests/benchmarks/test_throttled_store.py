"""The throttled store answers the S3 client as a real store does, late and slowly."""

import asyncio
import time

import pytest
from s3fs import S3FileSystem

from benchmarks.remote_data_build import BuildSize, copy_shard, finish_latents, make_shard
from benchmarks.throttled_store import BUCKET, Bandwidth, running
from benchmarks.throttled_store_config import StoreConfig
from pipeline.core.errors import RunError
from pipeline.storage.remote import RemoteObject, store_path
from train.data.bricks import BrickReader, read_build_index
from train.data.config import CacheConfig
from train.data.latents import LatentStore
from train.data.render_conditions import ViewReader
from train.data.source import open_source

LATENCY_S = 0.05


@pytest.fixture
def url(tmp_path, monkeypatch):
    """The URL of a folder of two files."""
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "inner" / "a").write_bytes(bytes(range(100)))
    (tmp_path / "data" / "b").write_bytes(b"b")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    cfg = StoreConfig(folder=tmp_path / "data", latency_ms=1000 * LATENCY_S)
    with running(cfg) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield store_path(f"s3://{BUCKET}")
    S3FileSystem.clear_instance_cache()


def test_object_store_objects_and_ranges_are_those_of_the_files(url, tmp_path):
    found = url.list_objects()
    assert {name: item.size for name, item in found.items()} == {"b": 1, "inner/a": 100}
    assert [path.name for path in url.iterdir()] == ["b", "inner"]
    version = (url / "inner" / "a").describe()
    assert version == found["inner/a"]
    started = time.monotonic()
    assert (url / "inner" / "a").read_range_of(version, 7, 20) == bytes(range(7, 27))
    assert time.monotonic() - started >= LATENCY_S
    assert not (url / "c").exists()
    (tmp_path / "data" / "inner" / "a").write_bytes(b"other")
    with pytest.raises(RunError, match="was changed or deleted"):
        (url / "inner" / "a").read_range_of(RemoteObject(100, version.version), 7, 20)


def test_bandwidth_is_shared():
    async def take() -> float:
        bandwidth, started = Bandwidth(1e6), time.monotonic()
        await asyncio.gather(*(bandwidth.take(50_000) for _ in range(4)))
        return time.monotonic() - started

    assert asyncio.run(take()) == pytest.approx(0.2, rel=0.5)


def test_object_store_the_synthetic_build_is_readable(url, tmp_path):
    """The second shard is a copy of the first one with other assets."""
    root = tmp_path / "data"
    size = BuildSize(resolution=32, assets=4, shard_size=2, views=2, image_size=32)
    make_shard(root, size, 0)
    copy_shard(root, size, 0, 1)
    finish_latents(root, size)
    source = open_source(url, CacheConfig(dir=tmp_path / "cache", max_gb=0.01))
    index = read_build_index(source, [32])
    assert len(set(index.uids)) == 4
    bricks = [BrickReader(index).read(asset, 32) for asset in range(4)]
    assert (bricks[0].values == bricks[2].values).all()
    latents = LatentStore(source / "latents", 32)
    assert [len(latents.read(uid).cells) for uid in index.uids] == index.tokens[32].tolist()
    assert ViewReader(index, "paper", ahead=1).read(3, 1).shape == (32, 32, 4)
