"""Checkpoints of a training run: writing, restoring and pruning them.

A checkpoint is a directory `OUT/step-XXXXXXXX`. It is written under a temporary name while
training goes on, and renamed when it is complete. The link `OUT/latest` names the newest one.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from model.checkpoint import keep_older_values, load_weights, read_config
from pipeline.core import files
from pipeline.core.errors import UserError
from pipeline.core.provenance import provenance as core_provenance
from train.engine.distributed import World

log = logging.getLogger(__name__)

Model = TypeVar("Model")
LATEST = "latest"
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    UnpicklingError,
)
PACKAGES = ("sparse3d", "torch", "triton", "numpy", "safetensors", "zarr")
STATE_ENTRIES = {"data", "guard", "step"}


def provenance() -> dict[str, Any]:
    """Return the versions and the commit of the running code, as config.json records them."""
    return core_provenance(PACKAGES)


def step_directory(out: Path, step: int) -> Path:
    """Return the directory of the checkpoint after `step` steps."""
    return out / f"step-{step:08d}"


def latest(out: Path) -> Path | None:
    """Return the newest complete checkpoint of a run.

    If the link `latest` is missing, as in a copy made without links, the highest step is taken.

    Args:
        out: Directory of the run.

    Returns:
        Directory of the checkpoint, or None if the run has none.

    Raises:
        UserError: If the checkpoint has another format version.
    """
    path = (out / LATEST).resolve()
    if not path.exists():
        complete = [
            step
            for step in _step_directories(out)
            if (step / "config.json").exists() and (step / "state.json").exists()
        ]
        if not complete:
            return None
        path = complete[-1].resolve()
    read_config(path)
    return path


def model_of_run(config: Model, out: Path) -> Model:
    """Return the configuration of a run's model, with what an older run was trained with.

    Args:
        config: The model's configuration, a dataclass, as the options give it.
        out: Directory of the run. If it has a checkpoint that lacks fields that were added later,
            they get the values that describe what the code did when it was written.
    """
    newest = latest(out)
    stored = None if newest is None else read_config(newest).get("config")
    if not isinstance(stored, dict):
        return config
    kept = keep_older_values(config, stored)
    if kept != config:
        log.info("%s is older than some options of the model and keeps what they were.", newest)
    return kept


class CheckpointWriter:
    """Writes the checkpoints of a run while training goes on.

    `begin` copies weights, optimizer and random states to the host and starts a thread that writes
    them. `finish` waits for the threads of all ranks and lets `latest` name the checkpoint. If any
    rank fails to write, the new checkpoint is deleted and the older ones stay as they are.

    Args:
        out: Directory of the run.
        weights: Modules by the name of their file, "model" and "ema".
        optimizer: The optimizer, whose state is kept.
        config: JSON content of config.json.
        world: This rank. Rank 0 writes everything but the other ranks' random states.
        keep_last: Number of recent checkpoints to keep. 0 keeps all.
    """

    def __init__(
        self,
        out: Path,
        *,
        weights: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        world: World,
        keep_last: int,
    ):
        self.out = out
        self.weights = weights
        self.optimizer = optimizer
        self.config = config
        self.world = world
        self.keep_last = keep_last
        self._host = HostCopies(world.device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[str] | None = None
        self._step = 0

    @property
    def pending_step(self) -> int | None:
        """The step whose checkpoint has begun and is not finished. The same on all ranks."""
        return None if self._written is None else self._step

    @property
    def is_waiting(self) -> bool:
        """Whether this rank has written its part of the pending checkpoint."""
        return self._written is not None and self._written.done()

    def begin(self, step: int, state: Mapping[str, Any]) -> str:
        """Copy the state after a step and start to write it. All ranks call this together.

        Args:
            step: Number of steps done.
            state: JSON content of state.json.

        Returns:
            "" on every rank, or on every rank why the checkpoint could not be created.

        Raises:
            ValueError: If another checkpoint is pending.
        """
        if self._written is not None:
            raise ValueError(f"the checkpoint of step {self._step} must be finished first")
        partial = self._partial(step)
        problem = _disk_error(_prepare, self.out, partial) if self.world.is_first else ""
        if self.world.any(bool(problem)):
            return problem or "the first rank could not create it"
        random_state = _random_state(self.world.device)
        shared = None
        if self.world.is_first:
            shared = self._host.copy(
                {
                    "weights": {stem: part.state_dict() for stem, part in self.weights.items()},
                    "optimizer": self.optimizer.state_dict(),
                }
            )
            self._host.wait()
        self._step = step
        self._written = self._pool.submit(self._write, partial, random_state, shared, dict(state))
        return ""

    def finish(self) -> str:
        """Wait until all ranks have written and publish the checkpoint. All ranks call this.

        Returns:
            "" on every rank, or on every rank why the checkpoint could not be written.
        """
        assert self._written is not None
        error = self._written.exception()
        problem = f"{type(error).__name__}: {error}" if error else self._written.result()
        self._written = None
        partial, final = self._partial(self._step), step_directory(self.out, self._step)
        if not self.world.any(bool(problem)) and self.world.is_first:
            problem = _disk_error(_publish, self.out, partial, final)
        failed = self.world.any(bool(problem))
        if self.world.is_first:
            if failed:
                shutil.rmtree(partial, ignore_errors=True)
            else:
                prune(self.out, self.keep_last)
        return (problem or "another rank could not write it") if failed else ""

    def abandon(self) -> None:
        """Wait for this rank's thread after an error, without the other ranks.

        A single rank publishes the checkpoint. With several ranks it stays unpublished, because
        nobody knows whether the others have written their parts.
        """
        if self._written is None:
            return
        if self.world.size == 1:
            self.finish()
        else:
            wait([self._written])
            self._written = None

    def _partial(self, step: int) -> Path:
        final = step_directory(self.out, step)
        return final.with_name(f".{final.name}.partial")

    def _write(
        self,
        partial: Path,
        random_state: dict[str, Tensor],
        shared: dict[str, Any] | None,
        state: dict[str, Any],
    ) -> str:
        """Write this rank's files. Return why that failed, or ""."""
        rank_file = partial / f"rank-{self.world.rank}.pt"
        problem = _disk_error(_write_pickled, rank_file, random_state)
        if shared is not None and not problem:
            problem = _disk_error(_write_shared, partial, shared, state, self.config)
        return problem


class HostCopies:
    """Copies nested dicts and lists of tensors to the host.

    Copies from a GPU go to page-locked memory, which is kept for the next copy, because it is slow
    to allocate. A copy is therefore valid until the next one.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, value: Any, place: tuple[Any, ...] = ()) -> Any:
        """Start to copy every tensor of `value`, and return the same structure with the copies."""
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), place)
        if isinstance(value, Mapping):
            return {key: self.copy(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.copy(inner, (*place, index)) for index, inner in enumerate(value)]
        return value

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _copy_tensor(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.clone(memory_format=torch.contiguous_format)
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._buffers[place] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def restore(
    path: Path, *, weights: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, world: World
) -> dict[str, Any]:
    """Load a checkpoint into modules and optimizer and set this rank's random state.

    Args:
        path: Directory of the checkpoint.
        weights: Modules by the name of their file, as in `save`.
        optimizer: The optimizer whose state is replaced.
        world: This rank.

    Returns:
        The content of state.json.

    Raises:
        UserError: If a file is missing or damaged, or does not fit the modules.
    """
    for stem, module in weights.items():
        load_weights(path / f"{stem}.safetensors", module)
    try:
        optimizer.load_state_dict(
            torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        )
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["world_size"] != world.size:
            log.warning(
                "%s was trained on %d ranks and this run has %d, so its batches differ.",
                path,
                state["world_size"],
                world.size,
            )
        missing = STATE_ENTRIES - state.keys()
        if missing:
            raise ValueError(f"state.json lacks {', '.join(sorted(missing))}")
        rank_file = path / f"rank-{world.rank}.pt"
        if rank_file.exists():
            random_state = torch.load(rank_file, map_location="cpu", weights_only=True)
            torch.set_rng_state(random_state["cpu"])
            if world.device.type == "cuda" and "cuda" in random_state:
                torch.cuda.set_rng_state(random_state["cuda"], world.device)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}"[:500]) from error
    return state


def prune(out: Path, keep_last: int) -> None:
    """Delete old checkpoints.

    Args:
        out: Directory of the run.
        keep_last: Number of recent checkpoints to keep. 0 keeps all. The checkpoint that `latest`
            names is always kept.
    """
    if not keep_last:
        return
    latest_name = (out / LATEST).resolve().name
    for path in _step_directories(out)[:-keep_last]:
        if path.name != latest_name:
            shutil.rmtree(path, ignore_errors=True)


def _step_directories(out: Path) -> list[Path]:
    """Return the checkpoints of a run in the order of their steps."""
    return sorted(path for path in out.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _prepare(out: Path, partial: Path) -> None:
    for leftover in out.glob(".step-*.partial"):  # of a run that was killed
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _write_shared(
    partial: Path, copies: Mapping[str, Any], state: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    for stem, tensors in copies["weights"].items():
        write_durably(partial / f"{stem}.safetensors", safetensors.torch.save(tensors))
    _write_pickled(partial / "optimizer.pt", copies["optimizer"])
    write_durably(partial / "state.json", (json.dumps(state, indent=1) + "\n").encode())
    write_durably(partial / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def _publish(out: Path, partial: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name and let `latest` name it."""
    if final.exists():  # written before, but the run was killed before `latest` was set
        shutil.rmtree(final)
    partial.replace(final)
    if not (out / LATEST).is_symlink():  # a copy of a run may hold a directory instead of the link
        shutil.rmtree(out / LATEST, ignore_errors=True)
    with files.replacing(out / LATEST) as link:
        link.symlink_to(final.name)
    files.sync_directory(out)


def _disk_error(function: Callable[..., None], *args: Any) -> str:
    """Return why the function could not write, or "" if it succeeded."""
    try:
        function(*args)
    except OSError as error:
        return f"{error.filename or args[0]}: {error.strerror or error}"
    return ""


def _write_pickled(path: Path, value: Any) -> None:
    # Into memory first: torch's own writer turns a full disk into a RuntimeError like any other.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_durably(path, buffer.getbuffer())


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a file and force it to the disk, so that a renamed checkpoint survives a power cut."""
    path.write_bytes(data)
    files.sync(path)
