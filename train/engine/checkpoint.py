"""Checkpoints of a run: written beside, renamed when whole; `latest` always names one from which the run goes on."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import nn

from model.checkpoint import load_weights, read_config
from pipeline.core.errors import UserError
from pipeline.core.provenance import provenance as core_provenance
from train.engine.distributed import World

log = logging.getLogger(__name__)

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


def folder_of(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint of a run's directory, or None. UserError if it is of another format version.

    Where `latest` is missing, as in a copy made without links, it is the last step that is there.
    """
    path = (out / LATEST).resolve()
    if not path.exists():
        whole = [
            step
            for step in _steps(out)
            if (step / "config.json").exists() and (step / "state.json").exists()
        ]
        if not whole:
            return None
        path = whole[-1].resolve()
    read_config(path)
    return path


def check_init(init: Path | None, out: Path) -> None:
    """UserError if a new run in `out` is to start from a checkpoint that is not there."""
    if init is not None and not init.exists() and latest(out) is None:
        raise UserError(f"{init} does not exist; train it first, or name a checkpoint with --init")


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
    """Write `out/step-XXXXXXXX` and let `latest` name it; on every rank, all of which return the same way.

    `weights`: file stem -> module (model, ema). Returns "", or on every rank why it could not be written: then what was
    there before is untouched and what was written of this one is gone.
    """
    final, partial = folder_of(out, step), out / f".step-{step:08d}.partial"
    problem = ""
    if world.is_first:
        problem = _try(_prepare, out, partial)
    if world.any(bool(problem)):
        return problem or "the first rank could not create it"
    problem = _try(_write_rank, partial, world)
    if world.is_first and not problem:
        problem = _try(_write_shared, partial, weights, optimizer, state, config)
    if not world.any(bool(problem)) and world.is_first:
        problem = _try(_publish, out, partial, final)
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
    """Load a checkpoint into modules and optimizer and set this rank's random state; returns what state.json holds.

    UserError if a file is missing, damaged or does not fit.
    """
    for stem, module in weights.items():
        load_weights(path / f"{stem}.safetensors", module)
    try:
        optimizer.load_state_dict(
            torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        )
        state = json.loads((path / "state.json").read_text())
        mine = path / f"rank-{world.rank}.pt"
        if state["world_size"] != world.size:
            log.warning(
                "%s was trained on %d ranks, this is %d: batches differ",
                path,
                state["world_size"],
                world.size,
            )
        missing = {"data", "guard", "step"} - state.keys()
        if missing:
            raise ValueError(f"state.json lacks {', '.join(sorted(missing))}")
        if mine.exists():
            random = torch.load(mine, map_location="cpu", weights_only=True)
            torch.set_rng_state(random["cpu"])
            if world.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], world.device)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {error}"[:500]) from error
    return state


def prune(out: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints, of 0 none; never the one that `latest` names."""
    named = (out / LATEST).resolve().name
    for path in _steps(out)[:-keep_last] if keep_last else ():
        if path.name != named:
            shutil.rmtree(path, ignore_errors=True)


def _steps(out: Path) -> list[Path]:
    """The folders of steps, in order."""
    return sorted(path for path in out.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _prepare(out: Path, partial: Path) -> None:
    for old in out.glob(".step-*.partial"):  # of a run that was killed
        shutil.rmtree(old)
    partial.mkdir(parents=True)


def _write_rank(partial: Path, world: World) -> None:
    random = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(world.device)
    write_bytes(partial / f"rank-{world.rank}.pt", _pickled(random))


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
        write_bytes(partial / f"{stem}.safetensors", safetensors.torch.save(tensors))
    write_bytes(partial / "optimizer.pt", _pickled(optimizer.state_dict()))
    write_bytes(partial / "state.json", (json.dumps(state, indent=1) + "\n").encode())
    write_bytes(partial / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def _publish(out: Path, partial: Path, final: Path) -> None:
    if final.exists():  # the same step again, after a checkpoint whose `latest` was never written
        shutil.rmtree(final)
    partial.replace(final)
    if not (out / LATEST).is_symlink():  # a copy that followed the link
        shutil.rmtree(out / LATEST, ignore_errors=True)
    link = out / f".{LATEST}.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(out / LATEST)
    folder = os.open(out, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _try(function: Any, *args: Any) -> str:
    """What went wrong with the disk, or ""."""
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


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write and sync, so that a renamed checkpoint is whole even after a power cut."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def provenance() -> dict[str, Any]:
    """Return the versions and the commit of the running code, for config.json."""
    return core_provenance(PACKAGES)
