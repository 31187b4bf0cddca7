"""Training from a build in an object store: the same results as from a directory, and faults."""

import errno
import json
import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from s3fs import S3FileSystem

from pipeline.core.errors import RunError, UserError
from pipeline.core.signals import Stopped
from pipeline.storage import remote
from pipeline.storage.remote import RemotePath, store_path
from tests.pipeline import s3_server
from tests.pipeline.s3_server import BUCKET, Cut
from tests.train.analytic_builds import tiny_training
from tests.train.metric_rows import metric_rows
from tests.train.ss_dit_fixtures import VIEWS, config, weights
from train.data.bricks import BrickReader, read_build_index
from train.data.config import CacheConfig
from train.data.latents import LatentStore
from train.data.render_conditions import ViewReader
from train.data.source import open_source
from train.engine.distributed import World
from train.evaluation.config import VAEEvaluation
from train.evaluation.vae import evaluate_vae
from train.stages.dit.run import train_dit
from train.stages.vae.config import EncodeConfig
from train.stages.vae.encode import encode
from train.stages.vae.run import train_vae
from train.stages.vae.task import VAETask


@pytest.fixture(scope="module")
def store():
    with s3_server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def settings(store, monkeypatch):
    """Let this process find the store, and retry at once.

    A file system that another test has made talks to that test's server.
    """
    S3FileSystem.clear_instance_cache()
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(RemotePath.__init__, "__defaults__", ((0.05, 0.05), None))
    store.proxy.cuts, store.proxy.down, store.proxy.latency_s = [], False, 0.0
    yield
    store.proxy.cuts, store.proxy.down, store.proxy.latency_s = [], False, 0.0
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def url(store, rendered):
    """The URL of the build with renders and latents."""
    return store.upload(rendered[0], "rendered")


@pytest.fixture
def cache(tmp_path):
    return CacheConfig(dir=tmp_path / "cache", max_gb=0.01)


def losses(out):
    return [row["loss"] for row in metric_rows(out) if "loss" in row]


def test_from_url_every_array_and_image_is_that_of_the_directory(rendered, url, cache):
    local, remote_root = rendered[0], open_source(store_path(url), cache)
    ours, theirs = (read_build_index(root, [32]) for root in (remote_root, local))
    assert replace(ours, root=local, tokens=theirs.tokens, is_val=theirs.is_val) == theirs
    np.testing.assert_array_equal(ours.is_val, theirs.is_val)
    np.testing.assert_array_equal(ours.tokens[32], theirs.tokens[32])
    bricks = [BrickReader(index) for index in (ours, theirs)]
    views = [
        ViewReader(index, "paper", ahead=ahead) for index in (ours, theirs) for ahead in (0, 2)
    ]
    stores = [LatentStore(root / "latents", 32) for root in (remote_root, local)]
    assert stores[0].tokens == stores[1].tokens
    torch.testing.assert_close(stores[0].mean, stores[1].mean, rtol=0, atol=0)
    for asset, uid in enumerate(ours.uids):
        one, other = (reader.read(asset, 32) for reader in bricks)
        for name in ("cells", "values", "sharp"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        one, other = (latents.read(uid) for latents in stores)
        for name in ("cells", "mean", "logvar"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for view in range(VIEWS):
            images = [reader.read(asset, view) for reader in views]
            for image in images[1:]:
                np.testing.assert_array_equal(image, images[0])


def test_from_url_the_vae_has_the_losses_of_the_directory(rendered, url, cache, tmp_path):
    """A small cache that evicts all the time and a run that is resumed change nothing."""
    local = tiny_training(rendered[0], tmp_path / "local", steps=6, workers=3)
    assert train_vae(local, World()) == 6
    tiny = replace(cache, max_gb=1e-5)
    for steps in (3, 6):
        cfg = tiny_training(
            store_path(url), tmp_path / "remote", steps=steps, workers=3, cache=tiny
        )
        assert train_vae(cfg, World()) == steps
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    for name, tensor in weights(tmp_path / "local").items():
        assert torch.equal(weights(tmp_path / "remote")[name], tensor)
    used = sum(p.stat().st_size for p in tiny.dir.rglob("*") if p.is_file() and p.name != "usage")
    assert 0 < used <= tiny.max_bytes


def test_from_url_the_dit_has_the_losses_of_the_directory(rendered, url, cache, tmp_path, store):
    train_dit(config(rendered, tmp_path / "local"), World())
    remote_build = (store_path(url), rendered[1])
    train_dit(config(remote_build, tmp_path / "remote", cache=cache), World())
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    # A second run on the same machine finds all ranges in the cache.
    store.proxy.cuts = [Cut(r"^GET /bucket/rendered/(sdf|renders|latents)", "answer", times=1000)]
    train_dit(config(remote_build, tmp_path / "again", cache=cache), World())
    assert losses(tmp_path / "again") == losses(tmp_path / "local")
    assert store.proxy.cuts[0].done == []


def test_from_url_latents_are_written_back_and_resumed(store, build, rendered, cache, tmp_path):
    url = store.upload(build, "encoded")
    options = {"vae": rendered[1], "resolutions": (32,), "device": "cpu", "precision": "fp32"}
    local = encode(EncodeConfig(data=build, latents=tmp_path / "latents", **options), World())
    remote_cfg = EncodeConfig(data=store_path(url), cache=cache, **options)
    # The store is gone in the middle of the upload of the second shard.
    store.proxy.cuts = [Cut(r"^PUT /bucket/encoded/latents/.*/000001\.zarr/zarr\.json", "body", 99)]
    with pytest.raises(RunError, match=r"000001\.zarr/zarr\.json cannot be written .*to resume"):
        encode(remote_cfg, World())
    store.proxy.cuts = []
    with pytest.raises(UserError, match="is not complete"):
        LatentStore(open_source(store_path(url) / "latents", cache), 32)
    folder = encode(remote_cfg, World())
    assert str(folder) == f"{url}/latents/{local.name}"
    names = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    assert set(store.keys(f"encoded/latents/{local.name}")) == names
    for name in names:
        assert store.get(f"encoded/latents/{local.name}/{name}") == (local / name).read_bytes()


def test_from_url_the_evaluation_of_a_vae_is_that_of_the_directory(rendered, url, cache, tmp_path):
    options = {"checkpoint": rendered[1], "samples": 500, "device": "cpu", "split": "val"}
    contents = [
        evaluate_vae(VAEEvaluation(data=data, out=tmp_path / name, cache=cache, **options))
        for name, data in (("local", rendered[0]), ("remote", store_path(url)))
    ]
    for content in contents:
        del content["data"]
    assert json.dumps(contents[0], sort_keys=True) == json.dumps(contents[1], sort_keys=True)


@pytest.mark.parametrize("after_bytes", [0, 900])
def test_from_url_a_cut_answer_is_read_again(store, url, cache, after_bytes):
    """The connection ends before the answer, or within the body."""
    index = read_build_index(open_source(store_path(url), cache), [32])
    cut = Cut(r"^GET /bucket/rendered/sdf/32/000000\.zarr/values/c", "answer", 1, after_bytes)
    store.proxy.cuts = [cut]
    assert len(BrickReader(index).read(0, 32).cells) == index.tokens[32][0]
    assert cut.done


def test_from_url_a_store_that_stalls_ends_the_run_in_one_line(store, url, cache, monkeypatch):
    impatient(monkeypatch)
    index = read_build_index(open_source(store_path(url), cache), [32])
    cut = Cut(r"^GET /bucket/rendered/sdf", "stall", times=1000)
    store.proxy.cuts = [cut]
    with pytest.raises(RunError, match=r"cannot be read .*; .* run the same command") as error:
        BrickReader(index).read(0, 32)
    assert "\n" not in str(error.value)


def impatient(monkeypatch):
    """Let requests fail after a fraction of a second, without retries of the store's package."""
    s3 = remote.FILESYSTEM_OPTIONS["s3"]
    options = {**s3, "config_kwargs": {"read_timeout": 0.5, "retries": {"max_attempts": 0}}}
    monkeypatch.setitem(remote.FILESYSTEM_OPTIONS, "s3", options)


DRILL = {"steps": 6, "workers": 1, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def expected(rendered, tmp_path_factory):
    """The losses of the drills' run from the directory."""
    run = tiny_training(rendered[0], tmp_path_factory.mktemp("local"), **DRILL)
    train_vae(run, World())
    return losses(run.out)


@pytest.fixture
def drill(url, cache, tmp_path):
    """A run from the URL that needs the store in every step."""
    tiny = replace(cache, max_gb=1e-5)
    return tiny_training(store_path(url), tmp_path / "remote", cache=tiny, **DRILL)


def at_step(monkeypatch, number, act):
    """Call a function in a step of a run, once."""
    original, calls = VAETask.losses, []

    def compute(self, model, batch):
        calls.append(1)
        if len(calls) == number:
            act()
        return original(self, model, batch)

    monkeypatch.setattr(VAETask, "losses", compute)


def test_from_url_a_store_that_throttles_and_answers_late_changes_no_loss(drill, expected, store):
    store.proxy.latency_s = 0.02
    throttle = Cut(r"^GET /bucket/rendered/sdf/32/.*/c/0/0", "throttle", times=5)
    # A read has three attempts. Three cuts of one object could use all of them, which rightly ends
    # the run, so each cut is of another shard.
    short = [
        Cut(f"^GET /bucket/rendered/sdf/32/00000{n}.*/values/c/0/0", "answer", 1, after_bytes=700)
        for n in range(2)
    ]
    store.proxy.cuts = [throttle, *short]
    assert train_vae(drill, World()) == 6
    assert losses(drill.out) == expected
    assert (len(throttle.done), [len(cut.done) for cut in short]) == (5, [1, 1])


@pytest.mark.parametrize(
    "fault",
    [
        "down",
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("throttle", "stall")),
    ],
)
def test_from_url_a_lost_store_is_one_line_and_the_run_resumes(
    drill, expected, store, monkeypatch, fault
):
    impatient(monkeypatch)

    def lose() -> None:
        store.proxy.down = fault == "down"
        store.proxy.cuts = [] if fault == "down" else [Cut("^GET .*/sdf/", fault, times=10_000)]

    at_step(monkeypatch, 3, lose)
    with pytest.raises(RunError, match=r"cannot be read .* to resume") as error:
        train_vae(drill, World())
    assert "\n" not in str(error.value)
    kept = int((drill.out / "latest").resolve().name.removeprefix("step-"))
    assert 3 <= kept < 6
    store.proxy.cuts, store.proxy.down = [], False
    assert train_vae(drill, World()) == 6
    assert losses(drill.out) == expected


def test_from_url_a_signal_while_the_store_stalls_ends_with_a_checkpoint(
    drill, expected, store, monkeypatch
):
    """The grace period of a spot instance is shorter than the retries."""
    monkeypatch.setattr(RemotePath.__init__, "__defaults__", ((0.5,) * 20, None))
    impatient(monkeypatch)
    stall = Cut("^GET .*/sdf/", "stall", times=10_000)

    def interrupt() -> None:
        while not stall.done:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    at_step(monkeypatch, 3, lambda: (store.proxy.cuts.append(stall), thread.start()))
    with pytest.raises(Stopped):
        train_vae(drill, World())
    thread.join()
    (last,) = {row["step"] for row in metric_rows(drill.out)[-1:]}
    assert 3 <= last < 6
    assert (drill.out / "latest").resolve().name == f"step-{last:08d}"
    store.proxy.cuts = []
    assert train_vae(drill, World()) == 6
    assert losses(drill.out) == expected


def test_from_url_readers_end_soon_after_the_run_although_the_store_is_down(
    drill, store, monkeypatch
):
    """Their retries would take minutes, and the process would wait for them."""
    monkeypatch.setattr(RemotePath.__init__, "__defaults__", ((120.0,) * 5, None))
    before = set(threading.enumerate())
    signals = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))

    def lose() -> None:
        store.proxy.down = True
        signals.start()

    at_step(monkeypatch, 3, lose)
    with pytest.raises(Stopped):
        train_vae(drill, World())
    ended = time.monotonic() + 5
    started = set(threading.enumerate()) - before
    readers = [thread for thread in started if thread.name.startswith("prefetch")]
    assert readers
    for reader in readers:
        reader.join(max(0.0, ended - time.monotonic()))
        assert not reader.is_alive()


def test_from_url_processes_load_the_batches_of_the_directory(drill, expected):
    """The versions of the objects go with the index to the processes, the locks do not."""
    bricks = replace(drill.bricks, worker_kind="processes", workers=2)
    assert train_vae(replace(drill, bricks=bricks), World()) == 6
    assert losses(drill.out) == expected


def test_from_url_opening_a_shard_takes_few_round_trips(store, url, cache):
    """Listing, marker, descriptions and indexes: what does not depend on each other is parallel."""
    latency = 0.1
    index = read_build_index(open_source(store_path(url), cache), [32])
    reader = BrickReader(index)
    store.proxy.latency_s = latency
    began = time.monotonic()
    reader._open_shard(32, index.shards[0])
    assert time.monotonic() - began < 11 * latency


def test_from_url_shards_are_opened_at_the_same_time(url, cache, monkeypatch):
    index = read_build_index(open_source(store_path(url), cache), [32])
    assets = [index.shards.index(name) for name in sorted(set(index.shards))]
    assert len(assets) > 1
    meeting, original = threading.Barrier(len(assets), timeout=20), BrickReader._open_shard

    def open_together(self, resolution, name):
        meeting.wait()  # for the other shards to be opened
        return original(self, resolution, name)

    monkeypatch.setattr(BrickReader, "_open_shard", open_together)
    reader = BrickReader(index)
    found = reader.concurrent.map(lambda asset: reader.read(asset, 32), assets)
    assert [len(bricks.cells) for bricks in found] == index.tokens[32][assets].tolist()


def test_from_url_a_full_cache_disk_changes_no_loss(drill, expected, cache, monkeypatch, caplog):
    original = os.ftruncate

    def full(descriptor: int, length: int) -> None:
        if length == 0:  # the count of used bytes
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor, length)

    monkeypatch.setattr(os, "ftruncate", full)
    drill = replace(drill, cache=cache)
    assert train_vae(drill, World()) == 6
    assert losses(drill.out) == expected
    full_disks = [text for text in caplog.messages if "No space left on device" in text]
    assert len(full_disks) == 1
    assert "What it lacks is downloaded every time; free some space." in full_disks[0]


@pytest.mark.slow
def test_from_url_another_version_in_a_run_is_one_line(drill, expected, store, monkeypatch):
    """The object comes back as it was, and the run resumes."""
    (name,) = (key for key in store.keys("rendered") if key.endswith("000001.zarr/values/c/0/0"))
    content = store.get(f"rendered/{name}")
    at_step(monkeypatch, 3, lambda: store.put(f"rendered/{name}", content[::-1]))
    try:
        with pytest.raises(RunError, match=r"was changed or deleted while it was in use") as error:
            train_vae(drill, World())
    finally:
        store.put(f"rendered/{name}", content)
    assert "\n" not in str(error.value)
    assert train_vae(drill, World()) == 6
    assert losses(drill.out) == expected


def test_from_url_another_version_of_an_object_ends_the_run(store, rendered, cache):
    url = store.upload(rendered[0], "changing")
    index = read_build_index(open_source(store_path(url), cache), [32])
    reader = BrickReader(index)
    reader.read(0, 32)
    (name,) = (key for key in store.keys("changing") if "000000.zarr/values/c/" in key)
    store.put(f"changing/{name}", store.get(f"changing/{name}")[::-1])
    reader.read(0, 32)  # from the cache
    for path in cache.dir.glob("*/*"):
        path.unlink()
    with pytest.raises(RunError, match=r"values/c/0/0 was changed or deleted while it was in use"):
        reader.read(0, 32)


def test_from_url_what_differs_from_its_commit_marker_is_refused(store, rendered, cache):
    url = store.upload(rendered[0], "damaged")
    root = open_source(store_path(url), cache)
    index = read_build_index(root, [32])
    (name,) = (key for key in store.keys("damaged") if "000000.zarr/values/c/" in key)
    store.put(f"damaged/{name}", store.get(f"damaged/{name}")[:-1])
    with pytest.raises(ValueError, match=r"000000\.zarr must have \d+ bytes, got \d+"):
        BrickReader(index).read(0, 32)
    store.put("damaged/manifest/000001.parquet", store.get("damaged/manifest/000000.parquet"))
    with pytest.raises(UserError, match=r"manifest/000001\.parquet differs from what its commit"):
        read_build_index(open_source(store_path(url), cache), [32])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"s3://{BUCKET}/nothing", "nothing at s3://bucket/nothing; give the output directory"),
        ("s3://no-such-bucket/a", "no-such-bucket"),
        ("memory://a", "memory://a is visible to one process only"),
        ("nonsense://a", "cannot be used as a URL|package for nonsense"),
    ],
)
def test_from_url_a_wrong_url_is_one_line(url, message, cache, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train_vae(tiny_training(store_path(url), tmp_path / "run", cache=cache), World())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_from_url_a_store_without_credentials_or_server_is_one_line(store, url, cache, monkeypatch):
    store.proxy.down = True
    with pytest.raises(UserError, match=r"cannot read s3://bucket/rendered: ") as error:
        open_source(store_path(url), cache)
    assert "\n" not in str(error.value)
