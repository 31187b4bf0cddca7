"""Conversion between sRGB and linear light."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def srgb_to_linear(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert sRGB values in [0, 1], of any shape, to linear light in [0, 1]."""
    # The lower bound keeps the power defined where the other branch is selected.
    power = ((np.maximum(values, 0.04045) + 0.055) / 1.055) ** 2.4
    return np.where(values <= 0.04045, values / 12.92, power)


def linear_to_srgb(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert linear light in [0, 1], of any shape, to sRGB values in [0, 1]."""
    # The lower bound keeps the power finite where the other branch is selected.
    power = 1.055 * np.maximum(values, 0.0031308) ** (1 / 2.4) - 0.055
    return np.where(values <= 0.0031308, values * 12.92, power)
