"""Checks that a wrong implementation fails a golden test, by as much as the authors' code shows."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.model.official.golden import Function, Golden

WITHIN = 1.5  # factor between our error of a control and that of the authors' code


def assert_golden(golden: Golden, function: Function, tolerances: float | dict[str, float]) -> None:
    """Check that all outputs of a function are within the tolerance of their name."""
    errors = golden.errors(function)
    assert errors
    for key, error in errors.items():
        limit = tolerances[key.split("/")[1]] if isinstance(tolerances, dict) else tolerances
        assert error <= limit, f"{key} is off by {error:.2e}"


def assert_control_fails(
    golden: Golden, wrong: str, function: Function, tolerance: float, **options: Any
) -> None:
    """Check that one wrong thing gives an error above the tolerance, and the recorded one."""
    recorded = golden.control(wrong)
    sets = tuple(dict.fromkeys(key.split("/")[0] for key in recorded))
    errors = golden.errors(partial(function, wrong=wrong, **options), sets)
    for key, expected in recorded.items():
        assert expected > tolerance, f"{wrong} cannot be told from a correct implementation"
        assert errors[key] > tolerance, f"{wrong}: {key} is off by only {errors[key]:.2e}"
        assert expected / WITHIN < errors[key] < expected * WITHIN, (wrong, key, errors[key])


def names_of_controls(golden: Golden, *left_out: str) -> list[str]:
    """Return what is wrong in each control. Those that must agree are left out."""
    names = dict.fromkeys(row["wrong"] for row in golden.controls)
    return [name for name in names if not name.startswith("none:") and name not in left_out]
