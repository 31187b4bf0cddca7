"""Build verified training data from 3D assets: sparse SDF bricks and rendered views.

`SdfShard` and `RenderShard` read the shards of a finished build. They are imported on first use,
so that `import pipeline` itself loads neither numpy nor zarr:

    from pipeline import RenderShard, SdfShard
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.storage.render_shard import RenderShard
    from pipeline.storage.sdf_shard import SdfShard

__all__ = ["RenderShard", "SdfShard"]

_MODULES = {
    "RenderShard": "pipeline.storage.render_shard",
    "SdfShard": "pipeline.storage.sdf_shard",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
