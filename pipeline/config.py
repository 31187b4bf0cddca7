"""The configuration of a build, its presets, and the hashes that decide what can be reused."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from pipeline.core.grid import check_resolution
from pipeline.core.hashing import hash_of, options_of
from pipeline.core.options import CameraSet, Light, ViewProduct, added
from pipeline.core.product import Product
from pipeline.core.provenance import FORMAT_VERSION, READER_VERSION
from pipeline.curation.config import FilterConfig, RankConfig, ScreenConfig
from pipeline.download.config import FetchConfig
from pipeline.geometry.config import MIN_TOPOLOGY, TopologyConfig
from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
from pipeline.rendering.config import RenderConfig
from pipeline.storage.config import PathOrUrl

PresetName = Literal["smoke", "full", "paper"]
Pass = Literal["build", "screen", "best"]

# The finest grid on which inside and outside are decided without being asked for.
MAX_DEFAULT_TOPOLOGY = 512


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Allowed time, memory and failures. Limits do not change the contents of a dataset."""

    asset_timeout_s: float = 900.0
    """Wall time in seconds that all stages of one asset may take together. An asset that takes
    longer is recorded as failed."""

    asset_memory_gb: float = 8.0
    """Memory in gigabytes of the process that works on one asset. It limits the address space, or
    the private memory if `--device cuda` is given."""

    retries: int = 2
    """Number of times that an asset is processed again after a lost worker, a lost node or a
    network error. Crashes and rejections are never retried."""

    retry_wait_s: float = 60.0
    """Seconds to wait before the first retry of an asset. Each further wait is twice as long."""

    max_failed_share: float = 0.2
    """Share of the processed assets that may fail. The run stops when more than this share and
    more than 10 assets have failed."""

    min_free_gb: float = 0.5
    """Free space in gigabytes on the disk of `--out`, or of `--scratch` if the output is a URL.
    The run stops when less is left."""

    def __post_init__(self):
        # The upper bound is far below what the system calls accept.
        for name in ("asset_timeout_s", "asset_memory_gb"):
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
    """Turn 3D assets into verified shards of sparse SDF bricks and rendered views."""

    preset: PresetName = "smoke"
    """Set of defaults for the other options. "smoke" is a test of minutes, "full" builds all
    resolutions, and "paper" follows the dataset of the Direct3D-S2 paper."""

    source: tuple[str, ...] = ("procedural",)
    """One or more sources of assets: procedural[:COUNT], folder:PATH, objaverse,
    objaverse-xl[?places=github,...], github:LIST[?folder=DIR] or
    shapenet:PATH[?categories=chair,...]. LIST is a csv file with the columns repository, commit,
    path, sha256 and licence, whose files are downloaded, or read below DIR."""

    ids: Path | None = added(None, before=None)  # noqa: RUF009
    """List of the assets to take from the sources: a csv, json or parquet file with the columns
    uid, sha256, or file_identifier or url. Further columns are kept. None takes all assets."""

    split_column: str | None = added(None, before=None)
    """Column of the list of `--ids` that states the split of each asset, "train" or "val". None
    lets `--val-percent` and the uid of the asset decide."""

    up: Literal["auto", "y", "z"] = "auto"
    """Axis that points up in files that do not state one: obj, ply, stl, off, and dae without
    up_axis. "auto" takes y. glTF, 3MF and COLLADA files that state an axis are not affected."""

    out: PathOrUrl = Path("data/smoke")
    """Output directory, or a URL such as s3://bucket/prefix. A build that was interrupted resumes
    there."""

    scratch: Path | None = None
    """Directory for temporary files on each node if `--out` is a URL. None uses the system's
    temporary directory."""

    limit: int | None = None
    """Number of assets to take from the start of the sources. None takes all. The preset "smoke"
    takes 48, unless `--source` is given."""

    resolutions: tuple[int, ...] = (64, 128)
    """Numbers of SDF grid points along one side of the cube. Each is a multiple of 8."""

    topology_resolution: int | None = None
    """Resolution of the grid on which inside and outside are decided, once for all resolutions. A
    multiple of 8 and at least 64. None takes the finest of the resolutions, from 64 up to 512. An
    existing build keeps its value."""

    cameras: CameraSet = "paper"
    """Camera set of the renders. "paper" looks at the front half from 10 to 40 degrees above the
    horizon, "wide" from all directions."""

    cameras_file: Path | None = None
    """JSON file with the cameras of all assets, which replaces `--cameras` and `--views`. The name
    of the file without its extension is part of the product's name. The format is in the
    documentation of rendering."""

    light: Light | None = None
    """Light of the renders. "ibl" is image-based light from environments, with shadows and all maps
    of the materials, "lamps" is a sky, a ground and three lights. None is the light that an
    existing build was begun with, otherwise "ibl" for the presets "full" and "paper" and "lamps"
    for "smoke"."""

    environment: Annotated[Path | None, tyro.conf.arg(name="render.environment")] = None
    """Directory with .hdr and .exr panoramas for `--light ibl`. Its name is part of the product's
    name. None takes the environments that the project makes."""

    view_products: tuple[ViewProduct, ...] = ()
    """What else is made of each view, in products of their own: normals, depth, albedo,
    metallic-roughness, mask, and transforms, which is one transforms.json for each asset."""

    views: int = 12
    """Number of rendered views of each asset."""

    image_size: int = 256
    """Width and height of the renders in pixels."""

    image_format: Literal["png", "webp"] = "png"
    """File format of the renders. Both formats are lossless."""

    shard_size: int = 64
    """Number of assets that are committed together."""

    val_percent: int = 2
    """Percentage of assets in the validation split. The uid of an asset decides its split, and
    copies of an asset follow it."""

    keep_splits_of: tuple[PathOrUrl, ...] = added((), before=())
    """Earlier builds whose splits this one keeps. Their assets and copies of these are in the split
    that they have there, so that no model is validated on what an earlier one was trained on."""

    workers: int | None = None
    """Number of assets processed at the same time. None uses every core."""

    executor: Literal["ray", "processes"] = "ray"
    """What runs the work: Ray, on this machine or on the cluster of RAY_ADDRESS, or processes of
    this machine alone, which need no Ray. Both make the same bytes."""

    report: bool = True
    """Write the report at the end, which takes up to a minute. `python -m pipeline.report DIR`
    writes it later."""

    # Commit markers record the device, but hashes do not contain it, so that a build can resume on
    # a machine without a GPU.

    device: Literal["cpu", "cuda"] = "cpu"
    """Device that computes distances. A build may switch between them, because their values differ
    by at most a thousandth of a grid spacing."""

    assets_per_gpu: int = 16
    """Number of assets that share a GPU at the same time if `--device cuda` is given. Each needs
    about 1 GB of GPU memory."""

    limits: LimitsConfig = field(default_factory=LimitsConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    screen: ScreenConfig = field(default_factory=ScreenConfig)
    rank: RankConfig = field(default_factory=RankConfig)

    # The pass of a ranked build: "screen" measures all assets, "build" makes the products of the
    # kept ones, and "best" adds resolutions for the best of them.

    run: tyro.conf.Suppress[Pass] = "build"

    # Options of deduplication that a ranked build of an older version was begun with.

    planned_dedup: tyro.conf.Suppress[dict[str, Any] | None] = None

    # Version of the mesh readers that the output directory was begun with.

    reader_version: tyro.conf.Suppress[int] = READER_VERSION

    def __post_init__(self):
        if not self.source:
            raise ValueError("source must name at least one source, got none")
        if self.up not in ("auto", "y", "z"):
            raise ValueError(f'up must be "auto", "y" or "z", got {self.up!r}')
        if not self.resolutions:
            raise ValueError("resolutions must name at least one resolution, got none")
        if self.split_column is not None and self.ids is None:
            raise ValueError(f"split_column needs ids, got the column {self.split_column!r} alone")
        for resolution in self.resolutions:
            check_resolution(resolution, "resolutions")
        decision = check_resolution(self.decision_resolution, "topology_resolution")
        if decision < MIN_TOPOLOGY:
            raise ValueError(f"topology_resolution must be at least {MIN_TOPOLOGY}, got {decision}")
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
        for name, path in (("cameras_file", self.cameras_file), ("environment", self.environment)):
            if path is not None and not re.fullmatch(r"[a-z0-9_]+", path.stem):
                raise ValueError(
                    f"{name} must have a name of a-z, 0-9 and _, because it becomes part of the "
                    f"product's name, got {path.name}"
                )
        if self.cameras_file is not None and self.cameras_file.stem in get_args(CameraSet):
            raise ValueError(f"cameras_file must not be named like a set, got {self.cameras_file}")
        if self.environment is not None and self.light == "lamps":
            raise ValueError("environment is for --light ibl, got --light lamps")
        self.render  # noqa: B018  RenderConfig checks views and image_size

    @property
    def decision_resolution(self) -> int:
        """The topology resolution that applies: the given one, or that of the finest SDF."""
        if self.topology_resolution is not None:
            return self.topology_resolution
        finest = max(*self.resolutions, *self.rank.best_resolutions, MIN_TOPOLOGY)
        return min(finest, MAX_DEFAULT_TOPOLOGY)

    @property
    def gpu_share(self) -> float:
        """The share of a GPU that one asset occupies in Ray's scheduler.

        It is 0 for screening, because the choice of assets must not depend on the device. It is
        rounded down to Ray's unit of 1/10000, because otherwise one asset less would fit.
        """
        return (
            10_000 // self.assets_per_gpu / 10_000
            if self.device == "cuda" and self.run != "screen"
            else 0.0
        )

    @cached_property
    def topology(self) -> TopologyConfig:
        """The topology options of this pass. Screening uses the coarser of two resolutions."""
        coarse = min(self.decision_resolution, self.screen.resolution)
        return TopologyConfig(
            resolution=coarse if self.run == "screen" else self.decision_resolution
        )

    @cached_property
    def render(self) -> RenderConfig:
        """The rendering options of this pass."""
        cameras = self._cameras_of_file
        is_lit = self.planned_light == "ibl"
        return RenderConfig(
            cameras=self.cameras,
            views=len(cameras) or self.views,
            image_size=self.image_size,
            format=self.image_format,
            light=self.planned_light,
            environments=self._environments if is_lit else (),
            camera_list=cameras,
        )

    @property
    def planned_light(self) -> Light:
        """The light that applies: the given one, or that of the preset."""
        if self.light is not None:
            return self.light
        return "lamps" if self.preset == "smoke" and self.environment is None else "ibl"

    @property
    def camera_name(self) -> str:
        """Name of the cameras in the names of products."""
        return self.cameras if self.cameras_file is None else self.cameras_file.stem

    @cached_property
    def _cameras_of_file(self) -> tuple[str, ...]:
        if self.cameras_file is None:
            return ()
        # imported here, because parsing the options must not load numpy
        from pipeline.core.cameras import read_cameras, text_of_camera

        try:
            cameras = read_cameras(self.cameras_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cameras_file {self.cameras_file}: {error}") from error
        return tuple(text_of_camera(camera) for camera in cameras)

    @cached_property
    def _environments(self) -> tuple[str, ...]:
        if self.environment is None:
            return ()
        # imported here, because parsing the options must not load numpy
        from pipeline.rendering.environments import describe_environments

        return describe_environments(self.environment)

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """The products that this pass makes, in the order in which an asset goes through them."""
        if self.run == "screen":
            return (Product.screen(self.screen.resolution),)
        best = self.run == "best"
        resolutions = self.rank.best_resolutions if best else self.resolutions
        bricks = [Product.sdf(resolution) for resolution in sorted(set(resolutions))]
        if best:
            return tuple(bricks)
        name = self.camera_name
        renders = name if self.planned_light == "lamps" else f"{name}-ibl"
        if self.environment is not None:
            renders += f"-{self.environment.stem}"
        views = [Product(kind, name) for kind in dict.fromkeys(self.view_products)]
        return (*bricks, *sorted([Product.renders(renders), *views]))

    def shared(self) -> dict[str, Any]:
        """Return the options that all products of an output directory share, as JSON values.

        A build can resume or extend an output directory only if they are equal.
        """
        stages = ["load", "normalize", "filter", "topology"]
        if self.run != "screen" and self.rank.target_count is not None:
            stages += ["screen", "rank"]
        names = ("source", "ids", "split_column", "up", "limit", "topology_resolution")
        names = (*names, "shard_size", "val_percent", "keep_splits_of")
        options = {**options_of(self), "topology_resolution": self.decision_resolution}
        of_stages = {name: options_of(getattr(self, name)) for name in stages}
        shared = {**{name: options[name] for name in names if name in options}, **of_stages}
        if self.planned_dedup is not None and "rank" in shared:
            shared["rank"] = {**shared["rank"], "dedup": self.planned_dedup}
        if self.reader_version == 1:
            shared["up"] = "y" if self.up == "auto" else self.up
        else:
            shared["reader_version"] = self.reader_version
        return shared

    def of_product(self, product: Product) -> dict[str, Any]:
        """Return the options that only this product depends on, as JSON values."""
        if product.kind == "sdf":
            return {"resolution": product.resolution}
        if product.kind == "screen":
            return options_of(self.screen)
        if product.kind == "renders":
            return options_of(self.render)
        return options_of(replace(self.render, light="lamps", environments=()))

    def product_hash(self, product: Product) -> str:
        """Return the hash of all options that decide the bytes of a product.

        Input files, code, device and renderer also decide them, but are recorded elsewhere.
        """
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
        views=45,  # Direct3D-S2 paper (arXiv 2505.17412), section 2
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
        # Direct3D-S2 paper (arXiv 2505.17412), section 2
        rank=RankConfig(target_count=452_000, best_count=68_000, best_resolutions=(1024,)),
    ),
}
