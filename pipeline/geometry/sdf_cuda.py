"""The SDF's distances on a GPU: everything of the pipeline that knows torch, which is imported where it is used."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import RunError, Transient, UserError
from pipeline.core.primitives.triangles import TIE
from pipeline.geometry.flood_fill import Bins, FloodFill

# What is on the GPU at once: 64 MB of distances and 128 MB of lists, since several assets share it
CHUNK_CELLS, CHUNK_CANDIDATES = 1 << 15, 1 << 22


def check_cuda() -> None:
    """UserError if torch finds no CUDA device on this machine. Not before a fork: children could use none then."""
    import torch

    if torch.cuda.is_available():
        return
    why = (
        "torch finds no CUDA device here"
        if torch.version.cuda
        else "the torch installed here has no CUDA"
    )
    raise UserError(
        f"--device cuda cannot be used: {why}; --device cpu gives the same distances, in more time"
    )


def warm_up() -> None:
    """Imports torch and the kernels, which takes seconds, but leaves CUDA alone: it does not survive a fork."""
    import kernels.sdf.distances  # noqa: F401


def select_gpu(gpu: str) -> None:
    """Makes this the process's only GPU (an index or UUID as CUDA knows it). Only before its first use of CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        gpu  # the only way in: torch's own choice leaves contexts on the first
    )


def device_name(device: str) -> str:
    """What the markers call a device: two kinds of GPU may differ in a distance's last bits."""
    if device == "cpu":
        return device
    import torch

    return f"cuda, {torch.cuda.get_device_name()}"


def fill_cells(
    packed: NDArray[np.float64], kinds: NDArray[np.uint8], bins: Bins, flood: FloodFill, *,
    tau: float, half: float, trusted: float, device: str = "cuda",
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float16]]]:  # fmt: skip
    """As `pipeline.geometry.sdf` on the CPU: active cells [m, 3], active points and clamp(sdf / tau) [m, 512], in parts.

    RunError if there is no such device; Transient "gpu_out_of_memory", since what it is shared with will end.
    """
    import torch

    from kernels.sdf.distances import FloodBits, cell_distances, grid_triangles

    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: no CUDA device in the process that works on an asset")

    def there(array: NDArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    try:
        triangles = grid_triangles(there(packed), there(kinds), bins.resolution)
        outside = there(flood.outside.view(np.int64))  # the same bits; torch has little for uint64
        bits = FloodBits(
            bin_of=there(flood.bins.bin_of), outside=outside, whole_cells=there(flood.whole_cells)
        )
        limit = torch.tensor(tau, dtype=torch.float32, device=device)
        for first, last in _chunks(bins.offsets):
            offsets = bins.offsets[first : last + 1]
            values = cell_distances(
                triangles, bits, there(bins.cells[first:last]), there(offsets - offsets[0]),
                there(bins.triangles[offsets[0] : offsets[-1]]),
                tau=tau, sheet_half=half, trusted=trusted, tie=TIE,
            )  # fmt: skip
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
    """Runs of cells, at least one each, within both limits."""
    first = 0
    while first < len(offsets) - 1:
        full = int(np.searchsorted(offsets, offsets[first] + CHUNK_CANDIDATES, side="right")) - 1
        last = min(max(first + 1, full), first + CHUNK_CELLS, len(offsets) - 1)
        yield first, last
        first = last
