"""Autotuning: the fastest of a few tile sizes, measured once per GPU and shape and kept on disk.

The cache file is `~/.cache/sparse3d/tiles.json`. Entries of other kernel sources or candidates are
ignored. Results are right with any choice and without a file. On the CPU the choice is the first
candidate. Nothing is measured while a CUDA graph is captured or under
`torch.use_deterministic_algorithms`: the choice is a known one or the first candidate, because a
resumed run must sum in the order of the first run.
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
_choices: dict[str, int] | None = None
_entry_names: dict[tuple[torch.device, tuple[object, ...]], str] = {}
T = TypeVar("T")


def size_class(rows: int) -> int:
    """Return the class of a number of rows. Classes are factors of four and share a choice."""
    return (max(rows, 1).bit_length() + 1) // 2


def _load() -> dict[str, int]:
    """Read the choices on disk. A missing or damaged file only means measuring again."""
    try:
        entries = json.loads(CACHE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if isinstance(value, int)}


def _save(name: str, choice: int) -> None:
    """Add a choice to the file, atomically. A failure only means measuring again."""
    try:
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=CACHE.parent, suffix=".json", delete=False
        ) as file:
            json.dump(_load() | {name: choice}, file, indent=0, sort_keys=True)
        Path(file.name).replace(CACHE)
    except OSError as error:
        _log.warning("The tile sizes cannot be saved in %s: %s", CACHE, error)


def _milliseconds(launch: Callable[[], None]) -> float:
    """Best of three times, after one warm-up."""
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


def _fastest(candidates: Sequence[T], launch: Callable[[T], None]) -> int:
    """Number of the fastest candidate."""
    times = []
    for candidate in candidates:
        try:
            times.append(_milliseconds(lambda candidate=candidate: launch(candidate)))
        except OutOfResources:  # more shared memory than this GPU has
            times.append(float("inf"))
    return times.index(min(times))


def _entry_name(
    device: torch.device,
    key: tuple[object, ...],
    candidates: Sequence[object],
    kernels: Sequence[Any],
) -> str:
    """Name of a choice. It changes with the sources of the kernels and with the candidates."""
    code = " ".join([*map(repr, candidates), *(kernel.cache_key for kernel in kernels)])
    digest = hashlib.sha256(code.encode()).hexdigest()[:12]
    shape = " ".join(map(str, key))
    gpu = torch.cuda.get_device_name(device)
    return f"{gpu} | triton {triton.__version__} | {digest} | {shape}"


def choose(
    key: tuple[object, ...],
    candidates: Sequence[T],
    launch: Callable[[T], None],
    like: Tensor,
    kernels: Sequence[Any],
) -> T:
    """Return the fastest candidate.

    If the key is new, every candidate is measured, which waits for the GPU.

    Args:
        key: Shape and dtype of the launch. In one process a key always comes with the same
            candidates and kernels.
        candidates: Tile sizes. The first is the default.
        launch: Runs the kernels with a candidate. It may be called any number of times.
        like: A tensor on the device in question.
        kernels: The `triton.jit` kernels that `launch` runs.
    """
    global _choices
    if not like.is_cuda or len(candidates) == 1:
        return candidates[0]
    if _choices is None:
        _choices = _load()
    name = _entry_names.get((like.device, key))
    if name is None:
        name = _entry_name(like.device, key, candidates, kernels)
        _entry_names[like.device, key] = name
    choice = _choices.get(name)
    if choice is None or not 0 <= choice < len(candidates):
        if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        choice = _fastest(candidates, launch)
        _choices[name] = choice
        _save(name, choice)
    return candidates[choice]
