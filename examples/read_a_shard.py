"""Read one asset of a build with this library: its bricks, its mesh and a view.

python examples/read_a_shard.py data/smoke 128
"""

import sys
from pathlib import Path

from pipeline import RenderShard, SdfShard
from pipeline.core.primitives.marching_cubes import extract


def main(build: Path, resolution: int) -> None:
    path = min((build / "sdf" / str(resolution)).glob("*.zarr"))
    shard = SdfShard(path)
    uid = shard.uids[0]
    bricks = shard.bricks(uid)
    print(f"{uid}: {len(bricks.cells)} bricks of 512 values at R = {resolution}")

    vertices, faces = extract(bricks)
    print(f"its surface has {len(vertices)} vertices and {len(faces)} faces")

    tar = next((build / "renders").glob(f"*/{path.stem}.tar"))
    view = RenderShard(tar).read(uid, 0)
    print(
        f"view 0 has {view.rgba.shape[1]} x {view.rgba.shape[0]} pixels, camera {view.meta['c2w']}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
