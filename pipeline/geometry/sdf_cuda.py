"""Signed distances on a GPU. torch is imported only inside the functions that need it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import RunError, Transient, UserError
from pipeline.core.primitives.triangles import TIE
from pipeline.geometry.flood_fill import Bins, FloodFill

# Limits of what is on the GPU at once, because several assets share it: 64 MB of distances and
# 128 MB of candidate lists.
CHUNK_CELLS = 1 << 15
CHUNK_CANDIDATES = 1 << 22


def check_cuda() -> None:
    """Check that this machine has a CUDA device.

    Do not call this in a process that forks later: its children could not use CUDA.

    Raises:
        UserError: If torch finds no CUDA device.
    """
    import torch

    if torch.cuda.is_available():
        return
    if torch.version.cuda:
        cause = "torch finds no CUDA device on this machine"
    else:
        cause = "the installed torch was built without CUDA"
    raise UserError(
        f"--device cuda cannot be used because {cause}; use --device cpu, which gives the same "
        "signs and takes more time"
    )


def device_name(device: str) -> str:
    """Return the name of a device for the commit marker: "cpu", or the model of the GPU.

    Two models of GPU may differ in the last bits of a distance.
    """
    if device == "cpu":
        return device
    import torch

    return f"cuda, {torch.cuda.get_device_name()}"


def warm_up() -> None:
    """Import torch and the kernels, which takes seconds, without initialising CUDA.

    An initialised CUDA cannot be used after a fork.
    """
    import kernels.sdf.distances  # noqa: F401


def select_gpu(gpu: str) -> None:
    """Make one GPU the only one of this process. Call this before the first use of CUDA.

    Args:
        gpu: Index or UUID of the GPU in CUDA's numbering.
    """
    # torch.cuda.set_device would still create contexts on the first GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def fill_cells(
    packed: NDArray[np.float64],
    kinds: NDArray[np.uint8],
    bins: Bins,
    flood: FloodFill,
    *,
    tau: float,
    half: float,
    trusted: float,
    device: str = "cuda",
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float16]]]:
    """Compute the signed distances of all active cells, one chunk at a time.

    Args:
        packed: float64 [T, 16] packed triangles.
        kinds: uint8 [T] kinds of `pipeline.geometry.topology`.
        bins: The triangles near each cell of the grid of the distances.
        flood: Flood fill of the topology.
        tau: Truncation distance in cube units.
        half: Half thickness of a sheet in cube units.
        trusted: Distance in cube units from all triangles, beyond which the flood fill decides the
            side.
        device: Name of a torch device. Tests use "cpu".

    Yields:
        cells: int32 [m, 3] active cells.
        active: bool [m, 512] grid points with |sdf| < tau.
        values: float16 [m, 512] clamp(sdf / tau, -1, 1).

    Raises:
        RunError: If there is no CUDA device.
        Transient: "gpu_out_of_memory", because other users of the GPU will free their memory.
    """
    import torch

    from kernels.sdf.distances import FloodBits, cell_distances, grid_triangles

    if device == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "--device cuda: the process that works on an asset has no CUDA device; check the "
            "driver and CUDA_VISIBLE_DEVICES"
        )

    def on_device(array: NDArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    try:
        triangles = grid_triangles(on_device(packed), on_device(kinds), bins.resolution)
        bits = FloodBits(
            bin_of=on_device(flood.bins.bin_of),
            outside=on_device(flood.outside.view(np.int64)),  # torch lacks operations on uint64
            whole_cells=on_device(flood.whole_cells),
        )
        limit = torch.tensor(tau, dtype=torch.float32, device=device)
        for first, last in _chunks(bins.offsets):
            offsets = bins.offsets[first : last + 1]
            values = cell_distances(
                triangles,
                bits,
                on_device(bins.cells[first:last]),
                on_device(offsets - offsets[0]),
                on_device(bins.triangles[offsets[0] : offsets[-1]]),
                tau=tau,
                sheet_half=half,
                trusted=trusted,
                tie=TIE,
            )
            near = values.abs() < limit
            active = near.any(1)
            stored = (values[active] / limit).clamp(-1, 1).half()
            yield (
                bins.cells[first:last][active.cpu().numpy()],
                near[active].cpu().numpy(),
                stored.cpu().numpy(),
            )
    except torch.OutOfMemoryError as error:
        raise Transient("gpu_out_of_memory") from error


def _chunks(offsets: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield runs of cells [first, end) within both limits. Each run has at least one cell."""
    first = 0
    while first < len(offsets) - 1:
        full = int(np.searchsorted(offsets, offsets[first] + CHUNK_CANDIDATES, side="right")) - 1
        last = min(max(first + 1, full), first + CHUNK_CELLS, len(offsets) - 1)
        yield first, last
        first = last
