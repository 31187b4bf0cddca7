"""What several configurations share: camera sets, image formats, options that were added later."""

from dataclasses import field
from typing import Any, Literal

CameraSet = Literal["paper", "wide"]
ImageFormat = Literal["png", "webp"]

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
