"""Golden files: settings, inputs and outputs of the authors' code, and the errors of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.model.official.golden_weights import golden_weights, normal

FOLDER = Path(__file__).resolve().parent
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class GoldenSet:
    """What the authors' code was given for one set of outputs.

    Attributes:
        name: Name of the set in its file.
        settings: The settings of the file, with those of the set on top.
        weights: Weights by their published names. They must not be changed.
        inputs: Arrays by name.
    """

    name: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: Arrays


Function = Callable[[GoldenSet], Mapping[str, Any]]  # returns {name of an output: array}


class Golden:
    """One golden file.

    Attributes:
        settings: The constructor's settings, the shapes of the state dict, and notes.
        controls: What the outputs are off by when one thing is wrong.
        inputs: Arrays by set and name.
        outputs: Arrays by set and name, which the authors' code computed.
    """

    def __init__(self, name: str):
        with np.load(FOLDER / f"golden_{name}.npz") as file:
            self.settings: dict[str, Any] = json.loads(str(file["settings"]))
            self.controls: list[dict[str, Any]] = json.loads(str(file["controls"]))
            arrays = {key: file[key] for key in file.files if "/" in key}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self.inputs: dict[str, Arrays] = {}
        self.outputs: dict[str, Arrays] = {}
        for key, array in arrays.items():
            side, name_of_set, what = key.split("/")
            sets = self.inputs if side == "in" else self.outputs
            sets.setdefault(name_of_set, {})[what] = array

    def settings_of(self, name: str) -> dict[str, Any]:
        """Return the settings of the file, with those of one set on top."""
        return {**self.settings, **self.settings["sets"].get(name, {})}

    def weights(self, name: str) -> dict[str, Tensor]:
        """Return the weights of a set by their published names. They must not be changed."""
        settings = self.settings_of(name)
        own = name if "shapes" in self.settings["sets"].get(name, {}) else ""
        if own not in self._weights:
            arrays = golden_weights(settings["shapes"], settings["salt"])
            self._weights[own] = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return self._weights[own]

    def given(self, name: str) -> GoldenSet:
        """Return what the authors' code was given for a set."""
        inputs = self.inputs.get(name, {})
        return GoldenSet(name, self.settings_of(name), self.weights(name), inputs)

    def errors(self, function: Function, sets: tuple[str, ...] = ()) -> dict[str, float]:
        """Return {"set/output": relative L2 error} of everything that a function returns.

        Args:
            function: Computes the outputs of a set.
            sets: The sets. Empty takes all of them.
        """
        errors = {}
        for name in sets or self.outputs:
            for what, array in function(self.given(name)).items():
                errors[f"{name}/{what}"] = error(array, self.outputs[name][what])
        return errors

    def control(self, wrong: str) -> dict[str, float]:
        """Return {"set/output": relative L2} of a control, as its file records it."""
        rows = [row for row in self.controls if row["wrong"] == wrong]
        assert rows, f"there is no control {wrong!r}"
        return {f"{row['set']}/{row['output']}": row["rel_l2"] for row in rows}


def error(got: Any, want: NDArray[Any]) -> float:
    """Return the relative L2 difference, or of whole numbers the share that differs.

    It is infinite for another shape.
    """
    got = got.detach().cpu().numpy() if isinstance(got, Tensor) else np.asarray(got)
    if got.shape != want.shape:
        return float("inf")
    if want.dtype.kind != "f":
        return float((got != want).mean()) if want.size else 0.0
    difference = got.astype(np.float64) - want
    return float(np.linalg.norm(difference) / max(np.linalg.norm(want), 1e-30))


def shapes(name: str) -> dict[str, list[int]]:
    """Return the names and shapes of a published state dict at full size."""
    return json.loads((FOLDER / "shapes" / f"{name}.json").read_text(encoding="utf-8"))


__all__ = ["Golden", "GoldenSet", "error", "golden_weights", "normal", "shapes"]
