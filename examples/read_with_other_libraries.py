"""Read a build with zarr, webdataset and datasets alone: none of this project's code is imported.

python examples/read_with_other_libraries.py data/smoke 128
"""

import io
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import webdataset
import zarr
from PIL import Image


def points_and_distances(path: Path, asset: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the grid points [P, 3] of one asset's bricks and their signed distances [P]."""
    group = zarr.open_group(path, mode="r")
    resolution, tau = group.attrs["resolution"], group.attrs["tau"]
    first, last = group["offsets"][asset : asset + 2]
    cells = group["blocks"][first:last].astype(np.int64)  # [M, 3]
    local = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), axis=-1).reshape(512, 3)
    points = (8 * cells[:, None] + local) / (resolution - 1) - 0.5  # [M, 512, 3]
    values = group["values"][first:last].astype(np.float32) * tau  # [M, 512]
    return points.reshape(-1, 3), values.reshape(-1)


def main(build: Path, resolution: int) -> None:
    path = min((build / "sdf" / str(resolution)).glob("*.zarr"))
    points, distances = points_and_distances(path, 0)
    print(
        f"zarr: {len(points)} grid points, distances {distances.min():.4f} to {distances.max():.4f}"
    )

    tar = next((build / "renders").glob(f"*/{path.stem}.tar"))
    for sample in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
        picture = next(sample[kind] for kind in ("png", "webp") if kind in sample)
        meta = json.loads(sample["json"])
        size = Image.open(io.BytesIO(picture)).size
        print(f"webdataset: {sample['__key__']} has {size} pixels, fov {meta['fov_degrees']:.1f}")
        break

    files = sorted(map(str, (build / "manifest").glob("*.parquet")))
    manifest = datasets.Dataset.from_parquet(files, cache_dir=str(build / "report" / "cache"))
    done = manifest.filter(lambda row: row["status"] == "done")
    print(f"datasets: {len(done)} of {len(manifest)} assets are done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
