"""`--device cuda`, mostly on machines without a GPU. See also tests/kernels/sdf."""

import ctypes
import json
import resource
from dataclasses import replace
from mmap import MAP_ANONYMOUS, MAP_PRIVATE

import numpy as np
import pytest
import torch

from pipeline.config import BuildConfig
from pipeline.core.errors import RunError, Transient, UserError
from pipeline.core.grid import band, spacing
from pipeline.geometry import sdf as cpu
from pipeline.geometry import sdf_cuda
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.topology import build_topology
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.rendering import gl_context
from pipeline.sources import open_source
from tests.child_python import run_python
from tests.pipeline import known_shapes as geo
from tests.pipeline.builds import build, config, environment, finish, start

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
GB = 10**9
pytestmark = pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value):RuntimeWarning"
)  # of padding


@without_cuda
def test_without_cuda_the_command_ends_before_it_starts_work(tmp_path):
    args = ["--device", "cuda", "--out", tmp_path / "out"]
    said = finish(start("pipeline.build", *args, env=environment(tmp_path)), code=2)
    assert "--device cuda cannot be used because " in said
    assert "use --device cpu, which gives the same signs" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_cluster_without_a_gpu_is_refused(tmp_path, shared_ray):
    cfg = config(tmp_path / "out", device="cuda", limit=1)
    source = open_source("procedural")
    with pytest.raises(UserError, match="Ray finds no GPU in its cluster"):
        build(cfg, [source])
    assert not (cfg.out / "shards").exists()


@without_cuda
def test_without_cuda_distances_are_refused():
    topology = build_topology(geo.box().mesh, TopologyConfig(resolution=64))
    with pytest.raises(RunError, match="no CUDA device"):
        cpu.compute_bricks(topology, 64, "cuda")
    with pytest.raises(ValueError, match=r"device must be one of \('cpu', 'cuda'\), got 'gpu'"):
        cpu.compute_bricks(topology, 64, "gpu")


def test_the_device_changes_no_hash_and_screening_needs_no_gpu():
    base, other = BuildConfig(), BuildConfig(device="cuda", assets_per_gpu=3)
    assert other.shared() == base.shared()
    assert [other.product_hash(name) for name in base.products] == [
        base.product_hash(name) for name in base.products
    ]
    assert base.gpu_share == 0
    assert (other.gpu_share, replace(other, run="screen").gpu_share) == (0.3333, 0)
    with pytest.raises(ValueError, match=r"assets_per_gpu must be in 1\.\.1000, got 0"):
        BuildConfig(assets_per_gpu=0)


def test_chunks_are_all_cells_in_order_within_the_limits(monkeypatch):
    monkeypatch.setattr(sdf_cuda, "CHUNK_CELLS", 4)
    monkeypatch.setattr(sdf_cuda, "CHUNK_CANDIDATES", 10)
    counts = np.array([3, 3, 3, 3, 30, 1, 1, 1, 1, 1, 10, 1])
    chunks = list(sdf_cuda._chunks(np.concatenate([[0], np.cumsum(counts)])))
    assert chunks == [(0, 3), (3, 4), (4, 5), (5, 9), (9, 10), (10, 11), (11, 12)]
    assert list(sdf_cuda._chunks(np.array([0]))) == []


def test_chunks_give_the_bricks_of_the_cpu(monkeypatch):
    """The kernels run in Triton's interpreter."""
    monkeypatch.setattr(sdf_cuda, "CHUNK_CELLS", 3)
    for name in ("NARROW_TILE", "DISTANCE_TILE", "VOTE_TILE"):
        monkeypatch.setattr(f"kernels.sdf.distances.{name}", 32)
    topology, R = build_topology(geo.box((0.5, 0.3, 0.2)).mesh, TopologyConfig(resolution=64)), 16
    fill = sdf_cuda.fill_cells
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(
        sdf_cuda, "fill_cells", lambda *args, **kwargs: fill(*args, **kwargs, device=device)
    )
    expected, found = cpu.compute_bricks(topology, R), cpu.compute_bricks(topology, R, "cuda")
    np.testing.assert_array_equal(found.cells, expected.cells)
    assert len(found.cells) == 8
    np.testing.assert_array_equal(found.sharp, expected.sharp)
    assert found.values.dtype == np.float16
    apart = np.abs(found.values.astype(np.float32) - expected.values.astype(np.float32))
    assert apart.max() < 2**-11 + 1e-3 * spacing(R) / band(R)


def test_a_full_gpu_is_a_transient_error(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("in use by others")

    topology = build_topology(geo.box((0.5, 0.3, 0.2)).mesh, TopologyConfig(resolution=64))
    monkeypatch.setattr("kernels.sdf.distances.cell_distances", full)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fill = sdf_cuda.fill_cells
    monkeypatch.setattr(
        sdf_cuda, "fill_cells", lambda *args, **kwargs: fill(*args, **kwargs, device="cpu")
    )
    with pytest.raises(Transient, match="gpu_out_of_memory"):
        cpu.compute_bricks(topology, 16, "cuda")


def reserve_and_allocate(megabytes):
    """Reserve address space, as CUDA does at its start, and allocate memory."""
    mmap = ctypes.CDLL(None).mmap
    mmap.restype = ctypes.c_ssize_t
    mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    if mmap(None, 1 << 40, 0, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == -1:
        raise MemoryError
    np.ones(megabytes << 20, np.uint8)


def nothing():
    pass


def test_private_memory_is_limited_and_address_space_is_not(tmp_path):
    isolated = IsolatedProcess("tests.pipeline.geometry.test_sdf_cuda:nothing")

    def call(megabytes, **limit):
        end = isolated.call(
            "tests.pipeline.geometry.test_sdf_cuda:reserve_and_allocate",
            megabytes,
            log=tmp_path / "log.txt",
            timeout_s=60,
            memory_bytes=3 * GB,
            **limit,
        )
        return end.reason

    try:
        assert call(100, memory_limit=resource.RLIMIT_DATA) == ""
        assert call(4000, memory_limit=resource.RLIMIT_DATA) == "out_of_memory"
        assert call(100) == "out_of_memory"
    finally:
        isolated.close()


def test_images_are_rendered_on_the_given_gpu(monkeypatch):
    devices = ["1", "0", None]  # as drivers may list them, with Mesa last
    monkeypatch.setattr(gl_context, "cuda_indices", lambda: list(devices))

    def order(wanted):
        with gl_context.on_gpu(wanted):
            return [devices[number] for number in gl_context.device_order()]

    assert order("0") == ["0", "1", None]
    assert order("1") == order(None) == order("7") == order("GPU-1234") == ["1", "0", None]


def test_mesa_is_not_a_cuda_device():
    numbers = gl_context.cuda_indices()
    if "Mesa" not in gl_context.renderer_string() and None not in numbers:
        pytest.skip("no Mesa here")
    assert numbers[-1] is None


def test_an_unknown_gpu_falls_back_to_another_device():
    plain = gl_context.renderer_string()
    with gl_context.on_gpu("7"):
        assert gl_context.renderer_string() == plain


@pytest.mark.gpu
def test_a_gpu_with_a_graphics_driver_renders():
    if "0" not in gl_context.cuda_indices():
        pytest.skip("CUDA's first GPU has no graphics driver here")
    with gl_context.on_gpu("0"):
        assert "NVIDIA" in gl_context.renderer_string()


def test_the_commit_marker_names_the_device(tiny_build):
    markers = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((tiny_build / "shards").rglob("sdf-*.json"))
    ]
    assert markers
    assert all(marker["devices"] == ["cpu"] for marker in markers)


_BUILD_ON_A_SIMULATED_GPU = """
import sys, ray
from pathlib import Path
from pipeline.core.errors import RunError
from pipeline.sources import open_source
from tests.pipeline.builds import build, config
ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
try:
    cfg = config(Path(sys.argv[1]), device="cuda", limit=4, assets_per_gpu=3)
    build(cfg, [open_source("procedural")])
except RunError as error:
    print("said:", error)
"""


@pytest.mark.slow
@without_cuda
def test_an_asset_process_gets_its_gpu(tmp_path):
    """Ray assigns a share of a simulated GPU, and the process of the asset finds no CUDA."""
    done = run_python("-c", _BUILD_ON_A_SIMULATED_GPU, tmp_path / "out", env=environment(tmp_path))
    refusal = "said: --device cuda: the process that works on an asset has no CUDA device"
    assert refusal in done.stdout, done.stdout + done.stderr
