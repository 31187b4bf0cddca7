"""What the data loaders of four trainers take from an export, in this project's own words.

Each function starts from the files, as the loader does, and returns the surface samples and the
supervision in the frame of the network: [-1, 1]^3, with distances that are negative inside. The
facts are listed with their sources in docs/exports.md.
"""

import json
from typing import NamedTuple

import numpy as np


class Loaded(NamedTuple):
    surface: np.ndarray  # [N, 3]
    normals: np.ndarray  # [N, 3]
    sharp: np.ndarray  # [M, 3]
    sharp_normals: np.ndarray  # [M, 3]
    points: np.ndarray  # [P, 3]
    sdf: np.ndarray  # [P], negative inside


def hunyuan(split_folder):
    """The list is the glob of a directory; the uid is the last part of each path."""
    for item in sorted(split_folder.glob("*")):
        uid = str(item).split("/")[-1]
        images = [item / "render_cond" / f"{number:03d}.png" for number in range(24)]
        surface = np.load(item / "geo_data" / f"{uid}_surface.npz")
        volume = np.load(item / "geo_data" / f"{uid}_sdf.npz")
        uniform, sharp = surface["random_surface"], surface["sharp_surface"]
        points = [volume[f"{name}_points"] for name in ("vol", "random_near", "sharp_near")]
        labels = [volume[f"{name}_label"] for name in ("vol", "random_near", "sharp_near")]
        loaded = Loaded(
            *(uniform[:, 0:3], uniform[:, 3:6], sharp[:, 0:3], sharp[:, 3:6]),
            *(np.concatenate(points), -np.concatenate(labels)),
        )
        yield uid, Loaded(*(part.astype(np.float64) for part in loaded)), images


def dora(root, split, near_rows=400_000, sharp_samples=1, near_samples=1, space_samples=1):
    """The list has paths; distances are positive inside; the volume starts at a fixed row."""
    for path in json.loads((root / f"{split}.json").read_text(encoding="utf-8")):
        data = np.load(path)
        coarse, sharp = data["fps_coarse_surface"][:, 0, :], data["fps_sharp_surface"][:, 0, :]
        rng = np.random.default_rng(0)
        near, space = data["rand_points"][:near_rows], data["rand_points"][near_rows:]
        rng.choice(len(data["sharp_near_surface"]), sharp_samples, replace=False)
        rng.choice(len(near), near_samples, replace=False)
        rng.choice(len(space), space_samples, replace=False)
        rows = np.concatenate([data["sharp_near_surface"], near, space])
        yield (
            path,
            Loaded(
                *(coarse[:, :3], coarse[:, 3:], sharp[:, :3], sharp[:, 3:]),
                *(rows[:, :3], -rows[:, 3]),
            ),
        )


def step1x(root, split, samples=8):
    """One index picks uniform and sharp points; occupied is where the distance is 1e-3 or more."""
    for uid in json.loads((root / f"{split}.json").read_text(encoding="utf-8")):
        data = np.load(root / "surfaces" / f"{uid}.npz")
        surface, sharp = data["surface"], data["sharp_surface"]
        chosen = np.random.default_rng(0).choice(len(surface), samples, replace=True)
        assert len(sharp[chosen]) == samples
        rows = np.concatenate([data["volume_rand_points"], data["near_surface_points"]])
        image = root / "images" / "/".join(uid.split("/")[-2:]) / "0000_rgb.png"
        yield (
            uid,
            Loaded(
                *(surface[:, :3], surface[:, 3:], sharp[:, :3], sharp[:, 3:]),
                *(rows[:, :3], -rows[:, 3:].ravel()),
            ),
            image,
        )


def ultrashape(root, split, half=300_000):
    """Stored in [0, 1]^3; the first half of the surface is uniform; negative inside."""
    images = json.loads((root / "data_list" / "images.json").read_text(encoding="utf-8"))
    for uid in json.loads((root / "data_list" / f"{split}.json").read_text(encoding="utf-8")):
        data = np.load(root / "sample" / f"{uid}.npz")
        surface = (data["clean_surface_points"] - 0.5) * 2
        normals = data["clean_surface_normals"]
        assert len(surface) == 2 * half
        names = ("uniform_near", "curvature_near", "space")
        points = [(data[f"{name}_points"] - 0.5) * 2 for name in names]
        folder = images[uid]
        image = f"{folder}/{folder.split('/')[-1]}/rgba/015.png"
        yield (
            uid,
            Loaded(
                *(surface[:half], normals[:half], surface[half:], normals[half:]),
                *(
                    np.concatenate(points),
                    np.concatenate([data[f"{name}_sdf"] * 2 for name in names]),
                ),
            ),
            image,
        )
