"""Values of USD attributes and primvars as arrays."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pxr import Tf, Usd, UsdGeom

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import Domain

# The first sample of an attribute that has samples, otherwise its default value.
TIME = Usd.TimeCode.EarliestTime()

DOMAINS: dict[str, Domain] = {
    "uniform": "polygon",
    "varying": "vertex",
    "vertex": "vertex",
    "faceVarying": "corner",
}


class UsdError(Exception):
    """A prim cannot be read. The message says why."""


def array(attribute: Usd.Attribute, dtype: Any, width: int = 1) -> NDArray[Any]:
    """Return the values of an attribute, [N] or [N, width]. No value is an empty array.

    Raises:
        UsdError: If the values are of another kind.
    """
    value = attribute.Get(TIME) if attribute else None
    shape = (-1,) if width == 1 else (-1, width)
    if value is None:
        return np.zeros(0, dtype=dtype).reshape(shape)
    try:
        return np.asarray(value, dtype=dtype).reshape(shape)
    except (ValueError, TypeError) as error:
        raise UsdError(f"{attribute.GetPath()} is no array of {width} numbers") from error


def number(attribute: Usd.Attribute, default: float) -> float:
    """Return the number that an attribute states, or the default."""
    value = attribute.Get(TIME) if attribute else None
    return float(value) if isinstance(value, int | float) else default


def matrix(value: Any) -> NDArray[np.float64]:
    """Return a matrix of the library, which is applied to row vectors, for column vectors."""
    return np.array(value, dtype=np.float64).T


@dataclass(frozen=True, kw_only=True)
class Primvar:
    """The values of a primvar.

    Attributes:
        values: [N, W].
        domain: "vertex", "corner", "polygon", or "constant" with N = 1.
    """

    values: NDArray[np.float64]
    domain: str


def primvar(prim: Usd.Prim, name: str, width: int, warnings: WarningLog) -> Primvar | None:
    """Return a primvar of a prim, or one with a constant value of its ancestors.

    Args:
        prim: The prim.
        name: Name without the namespace.
        width: Numbers of a value, W.
        warnings: Receives "attribute_mismatch" for values that cannot be read.

    Returns:
        The values, without indices. None if there are none.
    """
    found = UsdGeom.PrimvarsAPI(prim).FindPrimvarWithInheritance(name)
    return read_primvar(found, width, warnings) if found and found.HasValue() else None


def read_primvar(found: UsdGeom.Primvar, width: int, warnings: WarningLog) -> Primvar | None:
    """Return the values of a primvar, see `primvar`."""
    path = found.GetAttr().GetPath()
    try:
        value = found.Get(TIME)
        if value is None:
            return None
        values = np.asarray(value, dtype=np.float64)
        values = values.reshape(-1, values.shape[-1] if values.ndim > 1 or width > 1 else 1)
        if values.shape[1] < width:
            raise ValueError(f"{values.shape[1]} numbers for {width}")
        values = values[:, :width]
        indices = found.GetIndices(TIME) if found.IsIndexed() else None
        if indices is not None:
            rows = np.asarray(indices, dtype=np.int64)
            if len(rows) and not (rows.min() >= 0 and rows.max() < len(values)):
                raise ValueError("indices of values that do not exist")
            values = values[rows]
        interpolation = found.GetInterpolation()
        if found.GetElementSize() != 1:
            raise ValueError("several values for an element")
        if interpolation == "constant":
            if not len(values):
                return None
            warnings.add("attribute_mismatch", f"{path}: a constant", int(len(values) > 1))
            return Primvar(values=values[:1], domain="constant")
        if interpolation not in DOMAINS:
            raise ValueError(f"the interpolation {interpolation}")
    except (ValueError, TypeError, IndexError, Tf.ErrorException) as error:
        warnings.add("attribute_mismatch", f"{path}: {str(error)[:60]}")
        return None
    return Primvar(values=values, domain=DOMAINS[interpolation])
