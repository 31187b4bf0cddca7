"""What a build is asked to do: one frozen config, three presets, and the hashes that say what must match."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tyro

from pipeline.core.grid import check_resolution
from pipeline.core.hashing import hash_of, to_json
from pipeline.core.options import CameraSet
from pipeline.core.product import Product
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.curation.config import FilterConfig, RankConfig, ScreenConfig
from pipeline.download.config import FetchConfig
from pipeline.geometry.config import TopologyConfig
from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
from pipeline.rendering.config import RenderConfig
from pipeline.storage.config import PathOrUrl

PresetName = Literal["smoke", "full", "paper"]
Pass = Literal["build", "screen", "best"]


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one asset, and all of them together, may cost. Limits do not belong to a dataset's identity."""

    asset_timeout_s: float = 900.0  # wall time of one asset, all its stages
    asset_memory_gb: float = (
        8.0  # address space (with CUDA: private memory) of the process that works on one asset
    )
    retries: int = (
        2  # after a lost worker or node, or a network in trouble; never after a crash or a verdict
    )
    retry_wait_s: float = 60.0  # before an asset is fetched again; twice as long the next time
    max_failed_share: float = 0.2  # of the assets tried; beyond it (and 10 failures) the run stops
    min_free_gb: float = (
        0.5  # on the disk of --out, or of --scratch; below it the run stops before it is full
    )

    def __post_init__(self):
        for name in (
            "asset_timeout_s",
            "asset_memory_gb",
        ):  # far below what the system's calls can take
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(
                    f"{name} must be positive and below 1e9, got {getattr(self, name)}"
                )
        if not 0 <= self.max_failed_share <= 1:
            raise ValueError(f"max_failed_share must be in [0, 1], got {self.max_failed_share}")
        for name in ("retries", "retry_wait_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Turn raw 3D assets into verified shards of sparse SDF bricks and renders."""

    preset: PresetName = "smoke"  # where the options below start from
    # procedural[:COUNT] | folder:PATH | objaverse | objaverse-xl[?places=github,...] | shapenet:PATH[?categories=chair]
    source: tuple[str, ...] = ("procedural",)
    up: Literal["y", "z"] = "y"  # the axis that points up in the files of all sources
    out: PathOrUrl = Path(
        "data/smoke"
    )  # directory, or s3://bucket/prefix; a build that was stopped goes on there
    scratch: Path | None = (
        None  # where a node works if `out` is a URL; default: its temporary directory
    )
    limit: int | None = None  # take the first N assets only; smoke: 48, unless --source is given
    resolutions: tuple[int, ...] = (64, 128)  # grid points along one side, multiples of 8
    topology_resolution: int = (
        128  # grid on which inside and outside are decided, once for all resolutions
    )
    cameras: CameraSet = "paper"  # paper: the front half, 10-40 degrees up; wide: the whole sphere
    views: int = 12  # renders of one asset
    image_size: int = 256  # their width and height in pixels
    image_format: Literal["png", "webp"] = "png"  # both lossless
    shard_size: int = 64  # assets that are committed together
    val_percent: int = 2  # share of assets, drawn by uid, in the validation split
    workers: int | None = None  # assets worked on at once; default: every core
    # Where distances are computed. As the renderer it is found in the markers and not in the hashes: cpu and cuda agree
    # to a thousandth of a voxel, so that a build may go on where there is, or no longer is, a GPU.
    device: Literal["cpu", "cuda"] = "cpu"
    assets_per_gpu: int = (
        16  # that share a GPU at once, with `device` cuda; each takes about a gigabyte of it
    )
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    screen: ScreenConfig = field(default_factory=ScreenConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    # Which of a ranking build's passes this is: looking at all assets, the kept ones' products, or more of the best.
    run: tyro.conf.Suppress[Pass] = "build"

    def __post_init__(self):
        if not self.source:
            raise ValueError("source must name at least one source, got none")
        if self.up not in ("y", "z"):
            raise ValueError(f'up must be "y" or "z", got {self.up!r}')
        if not self.resolutions:
            raise ValueError("resolutions must name at least one resolution, got none")
        for resolution in (*self.resolutions, self.topology_resolution):
            check_resolution(resolution)
        for name in ("shard_size", "limit", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if not 1 <= self.assets_per_gpu <= 1000:
            raise ValueError(f"assets_per_gpu must be in 1..1000, got {self.assets_per_gpu}")
        if not 0 <= self.val_percent <= 100:
            raise ValueError(f"val_percent must be in 0..100, got {self.val_percent}")
        if set(self.rank.best_resolutions) & set(self.resolutions):
            raise ValueError(
                f"best_resolutions must not be among resolutions, got {self.rank.best_resolutions}"
            )
        self.render  # noqa: B018  its own checks of views and image_size

    @property
    def gpu_share(self) -> float:
        """Of a GPU that an asset takes. Screening takes none: which assets are kept must not depend on the device.

        Rounded down to Ray's ten-thousandths, or one asset less would fit.
        """
        return (
            10_000 // self.assets_per_gpu / 10_000
            if self.device == "cuda" and self.run != "screen"
            else 0.0
        )

    @cached_property
    def topology(self) -> TopologyConfig:
        coarse = min(self.topology_resolution, self.screen.resolution)
        return TopologyConfig(
            resolution=coarse if self.run == "screen" else self.topology_resolution
        )

    @cached_property
    def render(self) -> RenderConfig:
        return RenderConfig(
            cameras=self.cameras,
            views=self.views,
            image_size=self.image_size,
            format=self.image_format,
        )

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """What the build makes of every shard, in the order in which an asset goes through it."""
        if self.run == "screen":
            return (Product.screen(self.screen.resolution),)
        best = self.run == "best"
        resolutions = self.rank.best_resolutions if best else self.resolutions
        bricks = [Product.sdf(resolution) for resolution in sorted(set(resolutions))]
        return tuple(bricks) if best else (*bricks, Product.renders(self.cameras))

    def shared(self) -> dict[str, Any]:
        """The part that every product of one output directory has in common."""
        stages = ["load", "normalize", "filter", "topology"]
        if self.run != "screen" and self.rank.target_count is not None:
            stages += ["screen", "rank"]
        names = ("source", "up", "limit", "topology_resolution", "shard_size", "val_percent")
        of_stages = {name: asdict(getattr(self, name)) for name in stages}
        return to_json({**{name: getattr(self, name) for name in names}, **of_stages})

    def of_product(self, product: Product) -> dict[str, Any]:
        """The part that this product alone depends on."""
        if product.kind == "sdf":
            return {"resolution": product.resolution}
        if product.kind == "screen":
            return to_json(asdict(self.screen))
        return to_json(asdict(self.render))

    def product_hash(self, product: Product) -> str:
        """Changes with whatever decides the product's bytes, other than input, code, device and renderer."""
        return hash_of(
            {"format": FORMAT_VERSION, "shared": self.shared(), "product": self.of_product(product)}
        )


PRESETS: dict[str, BuildConfig] = {
    "smoke": BuildConfig(limit=48, val_percent=12),
    "full": BuildConfig(
        preset="full",
        out=Path("data/full"),
        resolutions=(256, 384, 512, 1024),
        topology_resolution=512,
        views=45,  # paper, sec. 2 (data)
        image_size=1024,
    ),
    "paper": BuildConfig(
        preset="paper",
        out=Path("data/paper"),
        resolutions=(256, 384, 512),
        topology_resolution=512,
        views=45,
        image_size=1024,
        filter=FilterConfig(min_faces=100),
        rank=RankConfig(
            target_count=452_000, best_count=68_000, best_resolutions=(1024,)
        ),  # paper, sec. 2 (data)
    ),
}
