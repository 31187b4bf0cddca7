"""Training on two ranks equals training on one: with gloo on CPUs and NCCL on GPUs."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import safetensors.torch
import torch
from torch.distributed import HashStore

from pipeline.core.devices import choose_device
from pipeline.core.errors import RunError, UserError
from tests.child_python import project_environment, start_python
from tests.train.analytic_builds import tiny_training
from tests.train.two_rank_gradients import gradients
from train.engine import distributed
from train.engine.distributed import World, fresh_store, join_world, reporting_lost_ranks
from train.stages.vae.run import train_vae


def torchrun(*arguments):
    """Start two ranks."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    return start_python(*launcher, *arguments, env=project_environment(OMP_NUM_THREADS="1"))


def compare_gradients(build, path, device, tolerance):
    process = torchrun("-m", "tests.train.two_rank_gradients", build, path, device.type)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    two, one = safetensors.torch.load_file(path), gradients(build, World(device=device))
    assert two.keys() == one.keys()
    for name, expected in one.items():
        expected = expected.cpu()
        size = expected.abs().max().clamp(min=1e-3)
        assert expected.isfinite().all()
        assert (two[name] - expected).abs().max() <= tolerance * size, name
    assert sum(bool(x.abs().max() > 1e-6) for x in one.values()) > 0.9 * len(one), (
        "most gradients must differ from zero to be compared"
    )


def test_two_ranks_have_the_gradients_of_one(build, tmp_path):
    compare_gradients(build, tmp_path / "two.safetensors", torch.device("cpu"), 1e-10)


@pytest.mark.gpu
def test_two_gpus_have_the_gradients_of_one(build, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    compare_gradients(build, tmp_path / "two.safetensors", torch.device("cuda", 0), 2e-3)


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all_ranks_with_a_checkpoint(build, tmp_path):
    """The checkpoint has the random state of both ranks."""
    out = tmp_path / "run"
    options = [
        "--data",
        build,
        "--out",
        out,
        "--device",
        "cpu",
        "--bricks.resolutions",
        32,
        "--loop.steps",
        100000,
    ]
    process = torchrun(
        "-m", "train.vae", *options, "--bricks.batch-size", 1, "--loop.validate-every", 0
    )
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "stopped by SIGTERM; run the same command to resume" in output
    latest = (out / "latest").resolve()
    assert {"rank-0.pt", "rank-1.pt"} <= {path.name for path in latest.iterdir()}
    assert not list(out.glob(".step*"))


def test_a_fresh_store_does_not_show_the_keys_of_killed_ranks():
    shared = HashStore()
    together = threading.Barrier(3)
    keys = [f"address-{rank}" for rank in range(3)]

    def start(attempt):
        def one(rank):
            store = fresh_store(shared, rank, 3)
            together.wait(10)
            old_keys = [key for key in keys if store.check([key])]
            together.wait(10)
            store.set(keys[rank], str(attempt))
            return old_keys, [store.get(key).decode() for key in keys]

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, (2, 1, 0)))

    for attempt in range(4):
        assert start(attempt) == [([], [str(attempt)] * 3)] * 3


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, r"ranks \[1, 2\] of 3 did not start within"), (1, "rank 0 of 3 did not start within")],
)
def test_a_rank_that_never_arrives_is_one_line(monkeypatch, rank, message):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.2))
    with pytest.raises(RunError, match=message) as error:
        fresh_store(HashStore(), rank, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/gloo/tcp/pair.cc:534] Connection closed by peer [::1]\nat A\nat B"),
        torch.distributed.DistBackendError("NCCL error in: x.cpp:1\nLast error: remote closed"),
    ],
)
def test_a_lost_rank_is_one_line(error):
    with (
        pytest.raises(RunError, match=r"rank 0 of 2 lost the connection .*; see the m") as raised,
        reporting_lost_ranks(0, 2),
    ):
        raise error
    assert "\n" not in str(raised.value)


def test_other_errors_of_a_rank_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"), reporting_lost_ranks(0, 2):
        raise RuntimeError("shapes differ")


def test_more_ranks_than_gpus_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _index: None)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(
        UserError,
        match=r"rank 2 of this machine needs a CUDA device, 2 found; .* --nproc-per-node 2",
    ):
        choose_device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"needs a CUDA device, 0 found; use --device cpu"):
        choose_device("cuda")


def test_a_checkpoint_of_two_ranks_can_be_resumed_with_one(build, tmp_path, caplog):
    cfg = tiny_training(build, tmp_path, steps=2)
    assert train_vae(cfg, World()) == 2
    state = (tmp_path / "latest").resolve() / "state.json"
    state.write_text(
        state.read_text(encoding="utf-8").replace('"world_size": 1', '"world_size": 2'),
        encoding="utf-8",
    )
    assert train_vae(tiny_training(build, tmp_path, steps=3), World()) == 3
    assert "was trained on 2 ranks and this run has 1, so its batches differ" in caplog.text


@pytest.mark.parametrize("size", ["2", "eight", ""])
def test_a_stray_world_size_is_refused_at_once(size, monkeypatch):
    """A rank that torchrun did not start would wait for others for half an hour."""
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29555")
    message = f"WORLD_SIZE={size}, .*unset WORLD_SIZE, or .*torchrun"
    with pytest.raises(UserError, match=message), join_world("cpu"):
        pass


def test_a_stray_rank_trains_alone(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with join_world("cpu") as world:
        assert (world.rank, world.size) == (0, 1)
