"""Models on disk: exports and training checkpoints, and weights published under other names."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.core.errors import UserError
from pipeline.core.files import replacing, sync_directory
from pipeline.core.options import BEFORE
from pipeline.core.provenance import FORMAT_VERSION

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
AVERAGED_WEIGHTS = "ema.safetensors"  # only training checkpoints have them
ADAPTERS = "lora"  # entry of a checkpoint's "training" that has the options of its LoRA adapters
MAX_MESSAGE = 500  # characters of an error that lists tensors

# What layers fill their weights with. torch.nn.init passes only some of its functions to a mode.
RANDOM_FILLS = (
    Tensor.uniform_,
    Tensor.normal_,
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.kaiming_uniform_,
)

# Published name -> (our name, conversion from the published layout to ours).
KeyMap = Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]
Model = TypeVar("Model", bound=nn.Module)


class ZeroInitialization(TorchFunctionMode):
    """A context in which new weights are zeros where a model would draw them at random.

    The weights of a file replace them. To draw half a billion of them takes half a minute.
    """

    def __torch_function__(
        self, func: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Fill with zeros in place of random numbers."""
        arguments = kwargs or {}
        if func in RANDOM_FILLS:
            with torch.no_grad():
                return (args[0] if args else arguments["tensor"]).zero_()
        return func(*args, **arguments)


class CheckpointError(UserError, ValueError):
    """A directory or file does not hold the model that was asked for.

    Commands print it as one line. Programs may catch it as a ValueError.
    """


def save_model(
    path: Path | str,
    model: nn.Module,
    config: Any,
    *,
    matrices: torch.dtype | None = None,
    **notes: Any,
) -> None:
    """Write a model to a directory, which holds config.json and model.safetensors.

    The directory is complete or absent, also after a power cut. An old directory is replaced.

    Args:
        path: The directory. Its parents are created.
        model: The model whose state dict is written.
        config: The frozen dataclass that `model` was made from.
        matrices: Dtype in which weights of two or more axes are written. Biases, norms and
            statistics keep theirs. None keeps that of all weights.
        **notes: Further entries of config.json, which must be JSON values.
    """
    path = Path(path)
    weights = {}
    for name, tensor in model.state_dict().items():
        if matrices is not None and tensor.is_floating_point() and tensor.ndim > 1:
            tensor = tensor.to(matrices)
        weights[name] = tensor.detach().cpu().contiguous()
    description = {
        "format_version": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": dataclasses.asdict(config),
        **notes,
    }
    with replacing(path, durable=True) as partial:
        partial.mkdir()
        save_file(weights, partial / WEIGHTS)
        (partial / CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        sync_directory(partial)
    sync_directory(path.parent)


def read_config(path: Path | str) -> dict[str, Any]:
    """Return the content of config.json of an export or a training checkpoint.

    Raises:
        CheckpointError: If there is no readable config.json or its format version is another one.
    """
    path = Path(path)
    try:
        description = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        version = description["format_version"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        cause = getattr(error, "strerror", None) or repr(error)
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no readable {CONFIG} ({cause}); "
            "name the directory of a checkpoint or of an exported stage"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version}, this code reads {FORMAT_VERSION}"
        )
    return description


def load_model(
    path: Path | str,
    cls: type[Model],
    *,
    config: Any | None = None,
    adapt: Callable[[Any], Any] | None = None,
    make: Callable[[Any], Model] | None = None,
    adapters: bool = False,
    skeleton: bool = False,
    device: torch.device | str = "cpu",
    averaged: bool = True,
) -> Model:
    """Load a model from an export or a training checkpoint.

    Args:
        path: The directory.
        cls: Class of the model. It is constructed as `cls(cls.Config(...))`.
        config: The configuration that the model must have. None accepts any.
        adapt: Changes the configuration before the model is made. None keeps it.
        make: Makes the model of a configuration. None calls `cls`.
        adapters: Whether `make` adds the LoRA adapters of a training checkpoint. Without it, a
            checkpoint that has adapters is refused.
        skeleton: Return the model on the meta device. The names and shapes of its weights are
            checked, and the weights are not read.
        device: Where the model is moved.
        averaged: Take the averaged weights, if there are any, instead of those of the last step.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: If the directory does not hold such a model. The message names every field
            of the configuration and every tensor that differs.
    """
    path = Path(path)
    description = read_config(path)
    name, stored = description.get("model"), description.get("config")
    if name != cls.__name__ or not isinstance(stored, dict):
        raise CheckpointError(f"{path} must be a checkpoint of a {cls.__name__}, got {name}")
    if not adapters:
        check_merged(path, description)
    found = build_config(cls.Config, stored, str(path))  # pyright: ignore[reportAttributeAccessIssue]
    if config is not None and found != config:
        wanted = dataclasses.asdict(config)
        actual = dataclasses.asdict(found)
        fields = [
            f"{key} = {wanted[key]} (found: {actual[key]})"
            for key in wanted
            if wanted[key] != actual[key]
        ]
        raise CheckpointError(f"{path} must have {', '.join(fields)}")
    final = found if adapt is None else adapt(found)
    weights = weights_file(path) if averaged else path / WEIGHTS
    if skeleton:
        with torch.device("meta"):
            model = (make or cls)(final)
        check_weights(weights, model)
        return model.eval()
    with ZeroInitialization():
        model = (make or cls)(final)
    load_weights(weights, model)
    return model.to(device).eval()


def check_merged(path: Path, description: Mapping[str, Any]) -> None:
    """Check that a checkpoint has no LoRA adapters beside the weights of its model.

    Args:
        path: The directory, for error messages.
        description: The content of its config.json.

    Raises:
        CheckpointError: If it has.
    """
    training = description.get("training")
    if isinstance(training, dict) and training.get(ADAPTERS):
        raise CheckpointError(
            f"{path} has LoRA adapters; merge them with python -m train.export and load the export"
        )


def build_config(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Make a configuration dataclass, which may contain others, from JSON values.

    Args:
        cls: The dataclass.
        values: One entry for each field. Lists become tuples. A field that was added later may be
            missing (see `model.config.added`). It then gets the value that describes older models.
        where: Name of the source in error messages.

    Raises:
        CheckpointError: If fields are unknown or missing, or a value is out of range.
    """
    values = with_added_fields(cls, values)
    names = {field.name for field in dataclasses.fields(cls)}
    if names != set(values):
        unknown = sorted(set(values) - names)
        missing = sorted(names - set(values))
        raise CheckpointError(
            f"{where} must have the fields of {cls.__name__}; "
            f"unknown: {unknown}, missing: {missing}"
        )
    types = typing.get_type_hints(cls)
    arguments = {
        name: build_config(types[name], value, f"{where}: {name}")
        if dataclasses.is_dataclass(types[name]) and isinstance(value, dict)
        else _to_tuples(value)
        for name, value in values.items()
    }
    try:
        return cls(**arguments)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where} has no usable configuration: {error}") from error


def with_added_fields(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a stored configuration by the fields that were added after it was written.

    Args:
        cls: The dataclass, which may contain others.
        values: JSON values of its fields.

    Returns:
        The values, with `before` of `pipeline.core.options.added` for the fields that they lack.
    """
    types = typing.get_type_hints(cls)
    complete = dict(values)
    for field in dataclasses.fields(cls):
        if field.name not in complete and BEFORE in field.metadata:
            complete[field.name] = field.metadata[BEFORE]
        value = complete.get(field.name)
        if dataclasses.is_dataclass(types[field.name]) and isinstance(value, dict):
            complete[field.name] = with_added_fields(types[field.name], value)  # pyright: ignore[reportArgumentType]
    return complete


def keep_older_values(config: Any, stored: Mapping[str, Any]) -> Any:
    """Return a configuration with the values that an older run was trained with.

    A field that was added after the run was written describes what the code did then. That replaces
    the default of new runs. A value that is not the default stays, so that it is noticed as a
    change of options.

    Args:
        config: The configuration, a dataclass that may contain others.
        stored: JSON values of the older run's configuration.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = keep_older_values(value, stored.get(field.name, {}))
        elif field.name not in stored and BEFORE in field.metadata and value == field.default:
            changes[field.name] = field.metadata[BEFORE]
    return dataclasses.replace(config, **changes)


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(item) for item in value) if isinstance(value, list) else value


def weights_file(path: Path) -> Path:
    """Return the file with the averaged weights of a directory, or with its only weights.

    Raises:
        CheckpointError: If the directory has neither.
    """
    for name in (AVERAGED_WEIGHTS, WEIGHTS):
        if (path / name).exists():
            return path / name
    raise CheckpointError(
        f"{path} is not a checkpoint: it has neither {AVERAGED_WEIGHTS} nor {WEIGHTS}"
    )


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy weights of a file into a model.

    Args:
        path: A safetensors file, or a directory, of which `weights_file` is taken.
        model: Its state dict must have exactly the file's names and shapes.

    Raises:
        CheckpointError: If the file is missing, damaged or of another model. The model is then
            unchanged.
    """
    if path.is_dir():
        path = weights_file(path)
    try:
        copy_weights(load_file(path), model, "it")
    except (OSError, SafetensorError, ValueError) as error:
        raise _unusable(path, error) from error


def check_weights(path: Path, model: nn.Module) -> None:
    """Check that a file has the names and shapes of a model's weights, without reading weights.

    Args:
        path: A safetensors file.
        model: The model, which may be on the meta device.

    Raises:
        CheckpointError: If the file is missing, damaged or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        shaped = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        convert_weights(shaped, model, "it")
    except (OSError, SafetensorError, ValueError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> CheckpointError:
    unreadable = isinstance(error, (OSError, SafetensorError))
    hint = "; copy the file again, or name another checkpoint" if unreadable else ""
    return CheckpointError(f"{path} cannot be used: {str(error)[:MAX_MESSAGE]}{hint}")


def copy_weights(
    weights: Mapping[str, Tensor], model: nn.Module, where: str, keys: KeyMap | None = None
) -> None:
    """Copy tensors into a model.

    Args:
        weights: The tensors by name.
        model: The model.
        where: Name of the source in error messages.
        keys: Published names and layouts, one entry for each tensor of the model. None if
            `weights` has the model's own names.

    Raises:
        CheckpointError: If names are unknown or missing or shapes differ. The message lists all of
            them, and the model is unchanged.
    """
    targets = model.state_dict()
    with torch.no_grad():
        for name, tensor in convert_weights(weights, model, where, keys).items():
            targets[name].copy_(tensor)


def convert_weights(
    weights: Mapping[str, Tensor], model: nn.Module, where: str, keys: KeyMap | None = None
) -> dict[str, Tensor]:
    """Return tensors under a model's own names and in its layouts. The model is not changed.

    Args:
        weights: The tensors by name. They may be on the meta device.
        model: The model, which may be on the meta device.
        where: Name of the source in error messages.
        keys: As `copy_weights`.

    Raises:
        CheckpointError: If names are unknown or missing or shapes differ. The message lists all of
            them.
    """
    targets = model.state_dict()
    if keys is None:
        keys = {name: (name, unchanged) for name in targets}
    assert {ours for ours, _ in keys.values()} == set(targets), "the key map must cover the model"
    problems = [f"unknown {name}" for name in sorted(set(weights) - set(keys))]
    problems += [f"missing {name}" for name in sorted(set(keys) - set(weights))]
    converted = {}
    for name in sorted(set(weights) & set(keys)):
        ours, convert = keys[name]
        try:
            converted[ours] = convert(weights[name])
            fits = converted[ours].shape == targets[ours].shape
        except RuntimeError:  # the conversion cannot take this shape
            fits = False
        if not fits:
            found, wanted = list(weights[name].shape), list(targets[ours].shape)
            problems.append(f"{name} of shape {found} does not fit {wanted}")
    if problems:
        message = (
            f"{where} must hold the weights of this {type(model).__name__}: {'; '.join(problems)}"
        )
        more = len(message) > MAX_MESSAGE
        raise CheckpointError(f"{message[:MAX_MESSAGE]} ..." if more else message)
    return converted


def unchanged(x: Tensor) -> Tensor:
    """Return `x`: the conversion of a published tensor whose layout is ours."""
    return x
