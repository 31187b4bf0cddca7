"""Checkpoints of a training run: writing, restoring and pruning them.

A checkpoint is a directory `OUT/step-XXXXXXXX`. It is written under a temporary name and renamed
when it is complete. The link `OUT/latest` names the newest one.
"""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import nn

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


def check_init(init: Path | None, out: Path) -> None:
    """Check that the checkpoint that a new run starts from exists.

    Args:
        init: Value of `--init`. It is not used if `out` has a checkpoint already.
        out: Directory of the run.

    Raises:
        UserError: If a new run is to start from a checkpoint that does not exist.
    """
    if init is not None and not init.exists() and latest(out) is None:
        raise UserError(f"{init} does not exist; train it first, or name a checkpoint with --init")


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


def save(
    out: Path,
    step: int,
    *,
    weights: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    world: World,
    keep_last: int,
) -> str:
    """Write the checkpoint of a step and let `latest` name it. All ranks call this together.

    If any rank fails to write, the new checkpoint is deleted and the older ones stay as they are.

    Args:
        out: Directory of the run.
        step: Number of steps done.
        weights: Modules by the name of their file, "model" and "ema".
        optimizer: The optimizer, whose state is kept.
        state: JSON content of state.json.
        config: JSON content of config.json.
        world: This rank. Rank 0 writes everything but the other ranks' random states.
        keep_last: Number of recent checkpoints to keep. 0 keeps all.

    Returns:
        "" on every rank, or on every rank why the checkpoint could not be written.
    """
    final = step_directory(out, step)
    partial = final.with_name(f".{final.name}.partial")
    problem = ""
    if world.is_first:
        problem = _disk_error(_prepare, out, partial)
    if world.any(bool(problem)):
        return problem or "the first rank could not create it"
    problem = _disk_error(_write_rank, partial, world)
    if world.is_first and not problem:
        problem = _disk_error(_write_shared, partial, weights, optimizer, state, config)
    if not world.any(bool(problem)) and world.is_first:
        problem = _disk_error(_publish, out, partial, final)
    failed = world.any(bool(problem))
    if world.is_first:
        if failed:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            prune(out, keep_last)
    return (problem or "another rank could not write it") if failed else ""


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


def _write_rank(partial: Path, world: World) -> None:
    random_state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(world.device)
    write_durably(partial / f"rank-{world.rank}.pt", _pickled(random_state))


def _write_shared(
    partial: Path,
    weights: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    for stem, module in weights.items():
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
        }
        write_durably(partial / f"{stem}.safetensors", safetensors.torch.save(tensors))
    write_durably(partial / "optimizer.pt", _pickled(optimizer.state_dict()))
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


def _pickled(value: Any) -> memoryview:
    # Into memory first: torch's own writer turns a full disk into a RuntimeError like any other.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a file and force it to the disk, so that a renamed checkpoint survives a power cut."""
    path.write_bytes(data)
    files.sync(path)
