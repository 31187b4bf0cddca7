"""File layouts of training samples: what the data loader of each trainer reads.

The loaders are the files that `docs/exports.md` names. A layout decides the names of files and
arrays, the frame, the types and the sign of the distances.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.conversion.config import ULTRASHAPE_POINTS, Trainer
from pipeline.conversion.surface_samples import Points, SurfaceSampler
from pipeline.core.errors import Reject
from pipeline.core.files import write_atomically
from pipeline.core.hashing import seed_of

Arrays = dict[str, NDArray]
SPACE_SIDE = 1.05  # half side of the cube of the volume points, in the frame [-1, 1]^3
TRUNCATION = 0.25  # largest offset of a near point along each axis, where it is truncated
DORA_NEAR = 400_000  # its loader takes the first rows of rand_points for those near the surface


class Frame(NamedTuple):
    """How stored numbers follow from cube units: point * scale + shift and sdf * sign * scale."""

    scale: float
    shift: float
    sign: float
    dtype: DTypeLike


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many points of each kind are made.

    Attributes:
        surface: Uniform points, and as many on sharp edges.
        space: Points of the volume.
        near: Points near uniform surface points, if they do not follow from `surface`.
    """

    surface: int
    space: int
    near: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of one trainer.

    Attributes:
        half_side: Largest coordinate of the longest side of an asset, before the shift.
        shift: What is added to every coordinate.
        inside_positive: Whether distances are positive inside.
        dtype: Type of the stored points, normals and distances.
        counts: Numbers of points that the trainer's own script makes.
        arrays: Returns the arrays of each npz file by the end of its name.
        npz: Path of a npz file, with {split}, {shard}, {uid} and {end}.
        image: Path of an image, with {split}, {shard}, {uid} and {view}. "" if none are read.
        views: Number of images that the loader expects, 0 for any.
        lists: Writes the lists of assets into a directory.
    """

    half_side: float
    shift: float = 0.0
    inside_positive: bool
    dtype: DTypeLike
    counts: Counts
    arrays: Callable[[AssetSamples, Counts], dict[str, Arrays]]
    npz: str
    image: str = ""
    views: int = 0
    lists: Callable[[Path, Mapping[str, Sequence[tuple[str, str]]]], None]

    def frame(self, half_extent: float) -> Frame:
        """Return the frame for meshes whose largest coordinate is `half_extent`."""
        sign = -1.0 if self.inside_positive else 1.0
        return Frame(self.half_side / half_extent, self.shift, sign, self.dtype)


class AssetSamples:
    """The samples of one asset in the frame of a trainer.

    Distances belong to the stored positions: a position is rounded to its type first.

    Args:
        sampler: The surface of the asset.
        frame: The frame of the trainer.
        seed: What decides the samples: numbers or names.
        fill_smooth: Whether uniform points take the place of sharp-edge points if there is no
            sharp edge.
    """

    def __init__(
        self, sampler: SurfaceSampler, frame: Frame, seed: tuple[object, ...], fill_smooth: bool
    ):
        self._sampler, self._frame, self._seed = sampler, frame, seed
        self._fill_smooth = fill_smooth
        self.is_smooth = not sampler.sharp_length > 0

    def random(self, name: str) -> np.random.Generator:
        """Return the random numbers of one kind of samples. Other kinds do not change them."""
        return np.random.default_rng(seed_of(*self._seed, name))

    def uniform(self, count: int, name: str = "uniform") -> NDArray[np.float64]:
        """Return uniform surface points with normals, float64 [count, 6], before rounding."""
        return self._stored(self._sampler.uniform(count, self.random(name)))

    def sharp(self, count: int) -> NDArray[np.float64]:
        """Return sharp-edge points with normals, float64 [count, 6], before rounding.

        Raises:
            Reject: "no_sharp_edges" if there are none and uniform points may not take their place.
        """
        if not self.is_smooth:
            return self._stored(self._sampler.sharp(count, self.random("sharp")))
        if not self._fill_smooth:
            raise Reject("no_sharp_edges")
        return self.uniform(count, "sharp")

    def space(self, count: int, half_side: float) -> NDArray[np.float64]:
        """Return points of a cube around the asset, float64 [count, 3], before the rounding."""
        points = self.random("space").uniform(-half_side, half_side, (count, 3))
        return points + self._frame.shift

    def near(
        self, points: NDArray[np.float64], sigma: float, name: str, *, truncated: bool = False
    ) -> NDArray[np.float64]:
        """Return surface points with normally distributed offsets, float64 [N, 3].

        Args:
            points: [N, 3 or more] whose first columns are positions.
            sigma: Standard deviation of each coordinate in the trainer's frame.
            name: Name of the random numbers.
            truncated: Whether offsets beyond TRUNCATION are drawn again.
        """
        rng = self.random(f"{name} {sigma}")
        offsets = rng.normal(scale=sigma, size=(len(points), 3))
        while truncated and (far := np.abs(offsets) > TRUNCATION).any():
            offsets[far] = rng.normal(scale=sigma, size=int(far.sum()))
        return points[:, :3] + offsets

    def rounded(self, values: NDArray[np.float64]) -> NDArray:
        """Return values in the type of the layout."""
        return values.astype(self._frame.dtype)

    def with_distances(self, points: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
        """Return rounded positions [N, 3] and the distances [N] of exactly these positions."""
        stored = self.rounded(points)
        scale, shift, sign, _ = self._frame
        sdf = self._sampler.sdf.at((stored.astype(np.float64) - shift) / scale)
        return stored, self.rounded(sdf * (sign * scale))

    def _stored(self, points: Points) -> NDArray[np.float64]:
        return np.concatenate(
            [points[0] * self._frame.scale + self._frame.shift, points[1]], axis=1
        )


def near_in_parts(
    samples: AssetSamples, points: NDArray[np.float64], sigmas: Sequence[float]
) -> NDArray[np.float64]:
    """Return each of the points once, with a standard deviation for each of equal parts."""
    parts = np.array_split(points, len(sigmas))
    return np.concatenate(
        [
            samples.near(part, sigma, f"sharp {n}")
            for n, (part, sigma) in enumerate(zip(parts, sigmas))
        ]
    )


def _hunyuan_arrays(samples: AssetSamples, counts: Counts) -> dict[str, Arrays]:
    uniform, sharp = samples.uniform(counts.surface), samples.sharp(counts.surface)
    near = [samples.near(uniform, sigma, "near", truncated=True) for sigma in (0.005, 0.05)]
    near_sharp = near_in_parts(samples, sharp, (0.001, 0.003, 0.06, 0.01, 0.02, 0.04))
    sdf: Arrays = {}
    for name, points in (
        ("vol", samples.space(counts.space, SPACE_SIDE)),
        ("random_near", np.concatenate(near)),
        ("sharp_near", near_sharp),
    ):
        sdf[f"{name}_points"], sdf[f"{name}_label"] = samples.with_distances(points)
    surface = {"random_surface": samples.rounded(uniform), "sharp_surface": samples.rounded(sharp)}
    return {"_surface": surface, "_sdf": sdf}


def _dora_arrays(samples: AssetSamples, counts: Counts) -> dict[str, Arrays]:
    uniform, sharp = samples.uniform(counts.surface), samples.sharp(counts.surface)
    near_sharp = [samples.near(sharp, sigma, "sharp") for sigma in (0.001, 0.005, 0.007, 0.01)]
    around = samples.uniform(counts.near // 2, "near")
    near = [samples.near(around, sigma, "near") for sigma in (0.001, 0.005)]
    volume = np.concatenate([*near, samples.space(counts.space, SPACE_SIDE)])
    return {
        "": {
            "fps_coarse_surface": samples.rounded(uniform)[:, None],
            "fps_sharp_surface": samples.rounded(sharp)[:, None],
            "sharp_near_surface": _four_columns(samples, np.concatenate(near_sharp)),
            "rand_points": _four_columns(samples, volume),
        }
    }


def _step1x_arrays(samples: AssetSamples, counts: Counts) -> dict[str, Arrays]:
    uniform, sharp = samples.uniform(counts.surface), samples.sharp(counts.surface)
    near = [samples.near(uniform, sigma, "near") for sigma in (0.001, 0.005)]
    space = samples.space(counts.space, SPACE_SIDE)
    return {
        "": {
            "surface": samples.rounded(uniform),
            "sharp_surface": samples.rounded(sharp),
            "volume_rand_points": _four_columns(samples, space),
            "near_surface_points": _four_columns(samples, np.concatenate(near)),
            "bounds": np.asarray(1.0, np.float32),
        }
    }


def _ultrashape_arrays(samples: AssetSamples, counts: Counts) -> dict[str, Arrays]:
    uniform, sharp = samples.uniform(counts.surface), samples.sharp(counts.surface)
    near = [samples.near(uniform, sigma, "near", truncated=True) for sigma in (0.005, 0.05)]
    near_sharp = near_in_parts(samples, sharp, (0.001, 0.003, 0.006, 0.01, 0.02, 0.04))
    surface = samples.rounded(np.concatenate([uniform, sharp]))
    arrays: Arrays = {
        "clean_surface_points": surface[:, :3],
        "clean_surface_normals": surface[:, 3:],
    }
    for name, points in (
        ("uniform_near", np.concatenate(near)),
        ("curvature_near", near_sharp),
        ("space", samples.space(counts.space, 0.5)),
    ):
        arrays[f"{name}_points"], arrays[f"{name}_sdf"] = samples.with_distances(points)
    return {"": arrays}


def _four_columns(samples: AssetSamples, points: NDArray[np.float64]) -> NDArray:
    """Return positions and distances as [N, 4]."""
    stored, distances = samples.with_distances(points)
    return np.concatenate([stored, distances[:, None]], axis=1)


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def _folder_lists(out: Path, assets: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Create the directories train and val, which are the lists of hunyuan3d-2.1."""
    for split in assets:
        (out / split).mkdir(parents=True, exist_ok=True)


def _dora_lists(out: Path, assets: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Write train.json, val.json and test.json with absolute paths. test repeats val."""
    for name, split in (("train", "train"), ("val", "val"), ("test", "val")):
        paths = [
            str(out.absolute() / "samples" / shard / f"{uid}.npz") for shard, uid in assets[split]
        ]
        _write_json(out / f"{name}.json", paths)


def _step1x_lists(out: Path, assets: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Write train.json, val.json and test.json with shard/uid. test repeats val."""
    for name, split in (("train", "train"), ("val", "val"), ("test", "val")):
        _write_json(out / f"{name}.json", [f"{shard}/{uid}" for shard, uid in assets[split]])


def _ultrashape_lists(out: Path, assets: Mapping[str, Sequence[tuple[str, str]]]) -> None:
    """Write data_list/train.json, val.json and images.json, which has the folder of each uid."""
    for split, rows in assets.items():
        _write_json(out / "data_list" / f"{split}.json", [uid for _, uid in rows])
    folders = {
        uid: str(out.absolute() / "images" / uid) for rows in assets.values() for _, uid in rows
    }
    _write_json(out / "data_list" / "images.json", folders)


LAYOUTS: dict[Trainer, Layout] = {
    "hunyuan3d-2.1": Layout(
        half_side=0.9999,
        inside_positive=True,
        dtype=np.float16,
        counts=Counts(surface=124_928, space=249_856),
        arrays=_hunyuan_arrays,
        npz="{split}/{uid}/geo_data/{uid}{end}.npz",
        image="{split}/{uid}/render_cond/{view:03d}.png",
        views=24,
        lists=_folder_lists,
    ),
    "dora": Layout(
        half_side=1.0,
        inside_positive=True,
        dtype=np.float32,
        counts=Counts(surface=32_768, space=200_000, near=DORA_NEAR),
        arrays=_dora_arrays,
        npz="samples/{shard}/{uid}{end}.npz",
        lists=_dora_lists,
    ),
    "step1x-3d": Layout(
        half_side=1.0,
        inside_positive=True,
        dtype=np.float32,
        counts=Counts(surface=200_000, space=200_000),
        arrays=_step1x_arrays,
        npz="surfaces/{shard}/{uid}{end}.npz",
        image="images/{shard}/{uid}/{view:04d}_rgb.png",
        views=20,
        lists=_step1x_lists,
    ),
    "ultrashape": Layout(
        half_side=0.5 / 1.02,
        shift=0.5,
        inside_positive=False,
        dtype=np.float32,
        counts=Counts(surface=ULTRASHAPE_POINTS, space=400_000),
        arrays=_ultrashape_arrays,
        npz="sample/{uid}{end}.npz",
        image="images/{uid}/{uid}/rgba/{view:03d}.png",
        views=16,
        lists=_ultrashape_lists,
    ),
}
