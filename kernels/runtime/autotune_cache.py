"""Which of a few tile sizes is fastest, measured once for each kind of GPU and shape and remembered on disk.

The file is `~/.cache/sparse3d/tiles.json`; what was measured of other kernels or candidates is not looked at. Results
are right with any choice and with no file at all: without one, in the interpreter, while a CUDA graph is captured and
under `torch.use_deterministic_algorithms` (where a run that is resumed must sum in the order of the first) the default,
which is the first, is taken or what is already known.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

CACHE = Path.home() / ".cache" / "sparse3d" / "tiles.json"
_log = logging.getLogger(__name__)
_known: dict[str, int] | None = None
_names: dict[tuple[torch.device, tuple[object, ...]], str] = {}
T = TypeVar("T")


def size_class(rows: int) -> int:
    """Shapes with about as many rows share a choice: by factors of four."""
    return (max(rows, 1).bit_length() + 1) // 2


def _load() -> dict[str, int]:
    try:
        entries = json.loads(CACHE.read_text())
    except (OSError, ValueError):  # none yet, or not ours: measure again
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if isinstance(value, int)}


def _save(key: str, choice: int) -> None:
    """Adds to what is on disk by now, atomically; a disk that cannot be written only means measuring again."""
    try:
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=CACHE.parent, suffix=".json", delete=False
        ) as file:
            json.dump(_load() | {key: choice}, file, indent=0, sort_keys=True)
        Path(file.name).replace(CACHE)
    except OSError as error:
        _log.warning("cannot remember tile sizes in %s: %s", CACHE, error)


def _milliseconds(launch: Callable[[], None]) -> float:
    launch()
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return best


def _measure(candidates: Sequence[T], launch: Callable[[T], None]) -> int:
    times = []
    for candidate in candidates:
        try:
            times.append(_milliseconds(lambda candidate=candidate: launch(candidate)))
        except OutOfResources:  # more shared memory than this GPU has
            times.append(float("inf"))
    return times.index(min(times))


def _name(
    device: torch.device,
    key: tuple[object, ...],
    candidates: Sequence[object],
    kernels: Sequence[Any],
) -> str:
    """What was measured of another source, or among other candidates, has another name."""
    code = " ".join([*map(repr, candidates), *(kernel.cache_key for kernel in kernels)])
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    return f"{torch.cuda.get_device_name(device)} | triton {triton.__version__} | {digest} | {' '.join(map(str, key))}"


def choose(
    key: tuple[object, ...],
    candidates: Sequence[T],
    launch: Callable[[T], None],
    like: Tensor,
    kernels: Sequence[Any],
) -> T:
    """The fastest candidate for `launch`, which may be called with any of them any number of times.

    Measures, waiting for the GPU, when the key is new; `like` is a tensor on the device in question; `kernels` are
    those (`triton.jit`) that `launch` runs. In one process a key always comes with the same candidates and kernels.
    """
    global _known
    if not like.is_cuda or len(candidates) == 1:
        return candidates[0]
    if _known is None:
        _known = _load()
    name = _names.get((like.device, key))
    if name is None:
        name = _names[like.device, key] = _name(like.device, key, candidates, kernels)
    found = _known.get(name)
    if found is None or not 0 <= found < len(candidates):
        if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        found = _measure(candidates, launch)
        _known[name] = found
        _save(name, found)
    return candidates[found]
