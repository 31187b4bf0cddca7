"""Models on disk: a directory of weights and configuration, and weights published under other names."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
KeyMap = Mapping[
    str, tuple[str, Callable[[Tensor], Tensor]]
]  # their name -> (our name, their layout to ours)
Model = TypeVar("Model", bound=nn.Module)


def save_model(directory: Path | str, model: nn.Module, config: Any, **notes: str) -> None:
    """Write model.safetensors and config.json to `directory`, replacing what is there; all of it or nothing.

    config: the frozen dataclass the model was made from; notes are further entries of config.json. Parent directories
    are made. Until everything is on the disk the files lie in a temporary directory beside the target, which is removed
    if writing fails.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        new, old = made / "new", made / "old"
        new.mkdir()
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
        }
        save_file(weights, new / WEIGHTS)
        described = {
            "format_version": FORMAT_VERSION,
            "model": type(model).__name__,
            "config": dataclasses.asdict(config),
            **notes,
        }
        (new / CONFIG).write_text(json.dumps(described, indent=1) + "\n")
        for path in (new / WEIGHTS, new / CONFIG, new):
            _sync(path)
        if directory.exists():
            directory.rename(old)
        try:
            new.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
        _sync(directory.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_model(
    directory: Path | str,
    cls: type[Model],
    *,
    config: Any | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """The model that `save_model` wrote, as `cls(cls.Config(...))`, in eval mode on the device.

    config: what the caller needs it to be. ValueError if the directory holds no such model, one of another class or
    format version, another configuration than asked for (naming every field that differs) or broken weights.
    """
    directory = Path(directory)
    try:
        described = json.loads((directory / CONFIG).read_text())
        version, name, stored = (described[key] for key in ("format_version", "model", "config"))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory} must hold a model ({CONFIG}, {WEIGHTS}): {error!r}"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{directory} must have format_version {FORMAT_VERSION}, got {version}")
    if name != cls.__name__:
        raise ValueError(f"{directory} must hold a {cls.__name__}, got a {name}")
    found = config_from(cls.Config, stored, str(directory))  # pyright: ignore[reportAttributeAccessIssue]
    if config is not None and found != config:
        wanted, there = dataclasses.asdict(config), dataclasses.asdict(found)
        fields = [
            f"{key} = {wanted[key]} (there: {there[key]})"
            for key in wanted
            if wanted[key] != there[key]
        ]
        raise ValueError(f"{directory} must have {', '.join(fields)}")
    with torch.device(device):
        model = cls(found)
    try:
        weights = load_file(directory / WEIGHTS, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / WEIGHTS} must be readable weights: {error}") from error
    load_weights(model, weights, str(directory))
    return model.eval()


def config_from(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """A config dataclass, perhaps of others, from JSON values (lists become tuples).

    ValueError naming unknown and missing fields.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    if names != set(values):
        unknown, missing = sorted(set(values) - names), sorted(names - set(values))
        raise ValueError(
            f"{where} must have the fields of {cls.__name__}; unknown: {unknown}, missing: {missing}"
        )
    types = typing.get_type_hints(cls)
    inner = {
        name
        for name in names
        if dataclasses.is_dataclass(types[name]) and isinstance(values[name], dict)
    }
    return cls(
        **{
            name: config_from(types[name], value, f"{where}: {name}")
            if name in inner
            else _tuples(value)
            for name, value in values.items()
        }
    )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy weights of the model's own names. ValueError listing every unknown or missing name and wrong shape."""
    load_mapped(model, weights, {name: (name, lambda x: x) for name in model.state_dict()}, where)


def load_mapped(model: nn.Module, weights: Mapping[str, Tensor], keys: KeyMap, where: str) -> None:
    """Copy weights published under other names and layouts; `keys` has one entry for each of the model's tensors.

    ValueError listing every unknown name, missing name and wrong shape; the model is then untouched.
    """
    targets = model.state_dict()
    assert {ours for ours, _ in keys.values()} == set(targets), "the key map must cover the model"
    problems = [f"unknown {name}" for name in sorted(set(weights) - set(keys))]
    problems += [f"missing {name}" for name in sorted(set(keys) - set(weights))]
    converted = {}
    for name in sorted(set(weights) & set(keys)):
        ours, convert = keys[name]
        try:
            converted[ours] = convert(weights[name])
            matches = converted[ours].shape == targets[ours].shape
        except RuntimeError:  # a shape that the conversion cannot take
            matches = False
        if not matches:
            problems.append(
                f"{name} of shape {list(weights[name].shape)} does not fit {list(targets[ours].shape)}"
            )
    if problems:
        raise ValueError(
            f"{where} must hold the weights of this {type(model).__name__}: {'; '.join(problems)}"
        )
    with torch.no_grad():
        for name, tensor in converted.items():
            targets[name].copy_(tensor)
