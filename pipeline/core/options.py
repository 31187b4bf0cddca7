"""What configurations share: camera sets, image formats, options that were added later, bounds."""

from dataclasses import field, fields, is_dataclass
from typing import Any, Literal

CameraSet = Literal["paper", "wide", "orthographic"]
Light = Literal["lamps", "ibl"]  # ibl: image-based light
ViewProduct = Literal["normals", "depth", "albedo", "metallic-roughness", "mask", "transforms"]
ImageFormat = Literal["png", "webp"]

BOUNDS = "bounds"  # metadata of a field: its smallest and its largest value
BEFORE = "before"  # metadata of a field: its value in files that were written before it existed


def added(default: Any, *, before: Any) -> Any:
    """Return a field that was added after files with its dataclass had been written.

    `pipeline.core.hashing.options_of` leaves the field out while it has the value `before`, so that
    those files keep their hashes and can be extended.

    Args:
        default: Value of new instances.
        before: Value that describes what the code did with files that lack the field.
    """
    return field(default=default, metadata={BEFORE: before})


def at_least(minimum: float, default: Any) -> Any:
    """Return a field for `check_bounds` with a smallest value. None is allowed."""
    return field(default=default, metadata={BOUNDS: (minimum, None)})


def between(minimum: float, maximum: float, default: Any, *, is_added: bool = False) -> Any:
    """Return a field for `check_bounds` with a smallest and a largest value. None is allowed.

    Args:
        minimum: Smallest value.
        maximum: Largest value.
        default: Value of new instances.
        is_added: Whether the field was added as `added` does it, and its default describes what the
            code did before.
    """
    metadata = {BOUNDS: (minimum, maximum)} | ({BEFORE: default} if is_added else {})
    return field(default=default, metadata=metadata)


def check_bounds(config: Any) -> None:
    """Check the values of fields that were made by `at_least` and `between`.

    A field that a subclass declares again keeps its bounds, unless it gets others.

    Raises:
        ValueError: If a value is out of range.
    """
    classes = [cls for cls in reversed(type(config).__mro__) if is_dataclass(cls)]
    declared = [item for cls in classes for item in fields(cls)]
    bounds = {item.name: item.metadata[BOUNDS] for item in declared if BOUNDS in item.metadata}
    for name, (minimum, maximum) in bounds.items():
        value = getattr(config, name)
        if value is None:
            continue
        if maximum is None and value < minimum:
            raise ValueError(f"{name} must be {minimum} or more, got {value}")
        if maximum is not None and not minimum <= value <= maximum:
            raise ValueError(f"{name} must be from {minimum} to {maximum}, got {value}")
