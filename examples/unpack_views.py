"""Unpack what a build has of the views of one asset, with a transforms.json for NeRF trainers.

    python examples/unpack_views.py BUILD UID OUT

The build needs the products renders and transforms of one camera set. Depth, normals, albedo,
material and masks are unpacked if the build has them.
"""

import json
import sys
from pathlib import Path

from pipeline import RenderShard
from pipeline.core.product import VIEW_KINDS
from pipeline.storage.transforms_shard import read_transforms_shard


def main(build: Path, uid: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((build / "transforms").glob("*/*.tar")):
        content = read_transforms_shard(path).get(uid)
        if content is None:
            continue
        cameras = path.parent.name
        for kind in VIEW_KINDS:
            for tar in sorted((build / kind).glob(f"{cameras}*/{path.name}")):
                shard = RenderShard(tar)
                for view in shard.views(uid):
                    data, meta = shard.read_bytes(uid, view)
                    folder = out / kind / tar.parent.name
                    folder.mkdir(parents=True, exist_ok=True)
                    suffix = ".webp" if data.startswith(b"RIFF") else ".png"
                    if kind in ("normals", "depth"):
                        suffix = ".exr"
                    file = folder / f"{view:02d}{suffix}"
                    file.write_bytes(data)
                    frame = content["frames"][view]
                    is_same_camera = frame["transform_matrix"] == meta["c2w"]
                    if kind == "renders" and is_same_camera:
                        frame["file_path"] = file.relative_to(out).as_posix()
                    elif kind == "depth":
                        frame["depth_file_path"] = file.relative_to(out).as_posix()
        (out / "transforms.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        return
    raise SystemExit(f"{build} has no transforms of {uid}; build with --view-products transforms")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
