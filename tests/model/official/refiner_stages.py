"""The refiners of golden files: our models with the golden weights on the golden inputs.

The option `wrong` makes one thing wrong, as the controls of the golden files name it.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import refiner as refiner_module
from model.inference import refine_volume
from model.inference.refine_volume import halved_bricks, outside_of, refined_volume
from model.published_settings import refiner as refiner_config
from model.refiner import VolumeRefiner
from model.sparse_tensor import POINTS
from tests.model.official.golden import Arrays, Golden, GoldenSet, normal
from tests.model.official.sparse_stages import level_of

FEATURES = 32
PATCH = 16  # voxels along one side of the golden patches
HALVED_CELLS = torch.from_numpy(Golden("refiner_1024").outputs["whole"]["halved_cells"])


def make_refiner(
    settings: dict[str, Any], weights: dict[str, Tensor], patch_size: int, *, signs: bool
) -> VolumeRefiner:
    """Return our refiner with golden weights, for patches of another size."""
    values = {**settings["constructor"], "patch_size": patch_size}
    with torch.device("meta"):
        model = VolumeRefiner(refiner_config(values, signs=signs, where="golden settings"))
    model = model.to_empty(device="cpu").eval()
    model.load_published(weights)
    return model


class RememberingRefiner:
    """A refiner that computes equal patches once, also in later tests: each takes about a second.

    Args:
        model: The refiner.
    """

    _results: ClassVar[dict[tuple[str, bytes], Tensor]] = {}

    def __init__(self, model: VolumeRefiner):
        self.model = model
        self.config = model.config

    def embed_features(self, features_NF: Tensor) -> Tensor:
        return self.model.embed_features(features_NF)

    def __call__(self, *inputs: Tensor) -> Tensor:
        digest = hashlib.sha256()
        for x in inputs:
            digest.update(x.contiguous().numpy().tobytes())
        key = self.config.output, digest.digest()
        if key not in self._results:
            self._results[key] = self.model(*inputs)
        return self._results[key]


def use_groups(model: nn.Module, groups: int) -> None:
    """Change the number of groups of every GroupNorm."""
    for part in model.modules():
        if isinstance(part, nn.GroupNorm):
            part.num_groups = groups


_made: dict[tuple[bool, int], VolumeRefiner] = {}


def made_once(
    settings: dict[str, Any], weights: dict[str, Tensor], patch: int, *, signs: bool, wrong: str
) -> VolumeRefiner:
    """Return the refiner, which is kept for other tests unless its modules are made wrong."""
    if "groups" in wrong:
        return make_refiner(settings, weights, patch, signs=signs)
    key = signs, patch
    if key not in _made:
        _made.clear()
        _made[key] = make_refiner(settings, weights, patch, signs=signs)
    return _made[key]


def golden_bricks(inputs: Arrays, side: int) -> tuple[Any, Tensor, Tensor]:
    """Return the level of the cells, the golden row of each of its rows, and the values."""
    level, order = level_of(torch.from_numpy(inputs["cells"]), side // 8, 1)
    return level, order, torch.from_numpy(inputs["values"])[order]


def make_taps_wrong(monkeypatch: Any, wrong: str) -> bool:
    """Normalise or count the taps of the adaptive filters wrongly, if a control says so."""
    forward = nn.Sequential.forward
    changes = {
        "filter taps divided by their sum, not by the sum of magnitudes": lambda x: (
            x / x.sum(1, keepdim=True)
        ),
        "filter taps normalised in L2": lambda x: F.normalize(x, dim=1),
        "filter taps counted x fastest": lambda x: (
            F.normalize(x, p=1, dim=1).unflatten(1, (3, 3, 3)).transpose(1, 3).flatten(1, 3)
        ),
    }
    if wrong in changes:
        monkeypatch.setattr(
            refiner_module._AdaptiveTaps,
            "forward",
            lambda self, x: changes[wrong](forward(self, x).float()),
        )
    return wrong in changes


def run_refiner_512(
    given: GoldenSet, *, wrong: str = "", monkeypatch: Any = None
) -> dict[str, Any]:
    """Return the results of a golden patch or of the golden volume."""
    settings, inputs = given.settings, given.inputs
    known = not wrong or make_taps_wrong(monkeypatch, wrong)
    side, patch = settings.get("volume", PATCH), settings.get("patch", PATCH)
    model = made_once(settings, given.weights, patch, signs=False, wrong=wrong)
    if wrong == "8 groups":
        use_groups(model, 8)
        known = True
    if given.name == "patch":
        features = normal("patch_features", [1, FEATURES, PATCH, PATCH, PATCH], settings["salt"])
        features[:, :, :, 9:] = 0
        if wrong == "no features":
            features[:] = 0
            known = True
        assert known, f"nothing is made wrong by {wrong!r}"
        rows = torch.from_numpy(features.astype(np.float32))[0].movedim(0, -1).flatten(0, 2)
        with torch.no_grad():
            embedded = model.embed_features(rows).T.unflatten(1, (PATCH,) * 3)[None]
            sdf = torch.from_numpy(inputs["sdf"])
            unet = model.unet3d1(torch.cat([model.conv_in(sdf), embedded], 1))
            return {"unet": unet, "refined": model(sdf, embedded)}
    assert settings["stride"] == patch - model.config.overlap
    assert settings["ramp"] == model.config.overlap
    assert settings["level"] == model.config.iso_value
    if wrong == "filled with 0 outside the cells":
        monkeypatch.setattr(refine_volume, "OUTSIDE", 0.0)
    elif wrong == "ramps reversed":
        monkeypatch.setattr(torch, "linspace", lambda _a, _b, n, **_: 1 - torch.arange(n) / (n - 1))
    elif wrong == "ramps (i + 1) / (n + 1)":
        monkeypatch.setattr(
            torch, "linspace", lambda _a, _b, n, **_: torch.arange(1, n + 1) / (n + 1)
        )
    else:
        assert not wrong
    level, order, values = golden_bricks(inputs, side)
    features = normal("features", [len(order), POINTS, FEATURES], settings["salt"])
    rows = torch.from_numpy(features.astype(np.float32))[order].flatten(0, 1)
    volume = refined_volume(RememberingRefiner(model), level, values, rows)  # pyright: ignore[reportArgumentType]
    return {"volume_values": volume.flatten()[::7]}


def run_refiner_1024(
    given: GoldenSet, *, wrong: str = "", monkeypatch: Any = None
) -> dict[str, Any]:
    """Return the results of a golden patch or of the golden volume."""
    settings, inputs = given.settings, given.inputs
    side, patch = settings.get("volume", PATCH), settings.get("patch", PATCH)
    model = made_once(settings, given.weights, patch, signs=True, wrong=wrong)
    if given.name == "patch":
        if wrong == "8 groups":
            use_groups(model, 8)
        else:
            assert not wrong
        with torch.no_grad():
            sdf = torch.from_numpy(inputs["sdf"])
            return {"unet": model.unet3d1(model.conv_in(sdf)), "logits": model(sdf)}
    assert settings["stride"] == patch - model.config.overlap
    assert settings["level"] == model.config.iso_value
    if wrong == "halved with the mean":
        monkeypatch.setattr(refine_volume, "halved_bricks", lambda x: 9 / 8 * halved_bricks(x))
    elif wrong == "first patch wins":
        product = itertools.product
        monkeypatch.setattr(
            refine_volume.itertools, "product", lambda *axes: reversed(list(product(*axes)))
        )
    else:
        assert not wrong
    level, _, values = golden_bricks(inputs, side)
    remembering = RememberingRefiner(model)
    volume = signed_volume(level, values, outside_of(remembering, level, values))  # pyright: ignore[reportArgumentType]
    halved = torch.ones((side // 2,) * 3)
    bricks = refine_volume.halved_bricks(values).unflatten(1, (4, 4, 4))
    for (x, y, z), brick in zip(4 * level.coords[:, 1:].long(), bricks, strict=True):
        halved[x : x + 4, y : y + 4, z : z + 4] = brick
    return {
        "halved": halved[tuple(HALVED_CELLS[:, 1:].long().T)],
        "signs": np.packbits(volume[::2, ::2, ::2].numpy() > 0),
        "volume_values": volume.flatten()[::13],
    }


def signed_volume(level: Any, values: Tensor, outside: Tensor) -> Tensor:
    """Return the whole volume: decoded values, and the sign of all other points."""
    volume = 2.0 * outside - 1
    for axis in range(3):
        volume = volume.repeat_interleave(2, axis)
    bricks = values.unflatten(1, (8, 8, 8))
    for (x, y, z), brick in zip(8 * level.coords[:, 1:].long(), bricks, strict=True):
        volume[x : x + 8, y : y + 8, z : z + 8] = brick
    return volume
