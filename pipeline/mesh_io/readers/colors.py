"""Shared steps of the readers of vertex and face colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import SceneMaterial


def to_rgba8(
    rgb: NDArray[np.generic], alpha: NDArray[np.generic] | None, warnings: WarningLog
) -> NDArray[np.uint8]:
    """Convert colours of any number type to 8 bits.

    Floats, and integers of a text, are shares of 1 if none is above 1, and otherwise values up to
    255. Wider integers than 8 bits are scaled by the smallest range of 8, 16 or 32 bits that holds
    all values.

    Args:
        rgb: [N, 3].
        alpha: [N], or None for opaque colours.
        warnings: Receives "invalid_value" for colours that are not finite. They become 0 or 1.

    Returns:
        uint8 [N, 4].
    """
    is_finite = np.isfinite(rgb).all(axis=1)
    if alpha is not None:
        is_finite &= np.isfinite(alpha)
    warnings.add("invalid_value", "colours that are not finite", int((~is_finite).sum()))
    rgba = np.full((len(rgb), 4), 255, dtype=np.uint8)
    rgba[:, :3] = _to_8_bits(rgb)
    if alpha is not None:
        rgba[:, 3] = _to_8_bits(alpha)
    return rgba


def _to_8_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return np.asarray(values, dtype=np.uint8)
    if values.dtype == np.int8:
        return values.astype(np.int8).view(np.uint8)
    is_integer = values.dtype.kind in "iu"
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=1e30, neginf=0.0)
    largest = numbers.max(initial=0.0)
    limits = (255, 65535, 2**32 - 1) if is_integer else (1, 255, 65535)
    limit = next((limit for limit in limits if largest <= limit), limits[-1])
    return np.rint(np.clip(numbers / limit, 0, 1) * 255).astype(np.uint8)


def material_of_colors(
    colors: NDArray[np.uint8] | None, warnings: WarningLog
) -> tuple[NDArray[np.uint8] | None, list[SceneMaterial]]:
    """Return colours [N, 4] and the materials that draw them: one if they are translucent.

    Colours that all have alpha 0 come from writers that do not know alpha. They become opaque,
    with the warning "invalid_value".
    """
    if colors is None or not len(colors) or (colors[:, 3] == 255).all():
        return colors, []
    if not colors[:, 3].any():
        warnings.add("invalid_value", "all colours have alpha 0")
        colors = colors.copy()
        colors[:, 3] = 255
        return colors, []
    return colors, [SceneMaterial(base_color=(1.0, 1.0, 1.0, 1.0), alpha_mode="BLEND")]
