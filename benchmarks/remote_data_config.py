"""Options of `python -m benchmarks.remote_data`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.devices import Device, check_device
from pipeline.core.options import at_least, check_bounds
from train.engine.config import WorkerKind


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """Size of the synthetic build. The defaults make about 9 GB on the disk."""

    resolution: int = 256
    """Resolution of the bricks."""
    assets: int = at_least(4, 6912)
    """Number of assets, of about 1.4 MB each at R = 256 with two views."""
    shard_size: int = at_least(2, 64)
    """Number of assets of a shard."""
    views: int = at_least(1, 2)
    """Number of renders of each asset."""
    image_size: int = at_least(16, 1024)
    """Pixels per side of a render."""
    templates: int = at_least(1, 16)
    """Number of shards that are computed. The others are copies with other assets."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class RemoteData:
    """Compare training from a throttled object store with training from the local disk.

    The SS-VAE and the SS-DiT train on the same batches from both, in their first epoch.
    """

    out: Path
    """Directory of the results, remote-data.json and RESULTS.md."""
    scratch: Path = Path("/tmp/remote-data")
    """Directory of the build, the cache and the runs. It is deleted before and after."""
    device: Device = "auto"
    """Device to train on."""
    stages: tuple[str, ...] = ("vae", "dit", "loader")
    """Stages to measure, in this order. "loader" loads the batches of the SS-VAE and trains
    nothing, which says what the store allows. It has no allowed loss."""
    presets: tuple[str, str] = ("base", "256")
    """Presets of the SS-VAE and of the SS-DiT."""
    token_budget: int = 49_152
    """Number of tokens of a step of either stage."""
    mixed_shards: int = at_least(1, 8)
    """Number of shards whose assets the SS-VAE mixes. The cache must hold them."""
    total_s: float = 270.0
    """Seconds after which everything ends. Runs are shortened to end before, and a stage that is
    left without time is not measured."""
    seconds: float = 15.0
    """Seconds of each measured run after its first steps. The two runs of a stage take as many
    steps, which are counted in the local run."""
    warmup_steps: int = at_least(1, 6)
    """Number of steps of each run that are not measured: the threads fill, the first views of the
    open shards are read."""
    workers: int = at_least(1, 8)
    """Number of threads or processes that prepare batches."""
    worker_kind: WorkerKind = "threads"
    """What prepares the batches of the SS-VAE, from the disk as from the store."""
    processes: int = at_least(1, 14)
    """Number of processes that make the build."""
    latency_ms: float = 100.0
    """Milliseconds before each answer of the store."""
    megabytes_per_s: float = 200.0
    """Bandwidth of the store in megabytes per second."""
    cache_share: float = 0.1
    """Size of the cache as a share of what the stage's products take on the disk."""
    allowed_loss: float = 0.05
    """Largest share of the local speed that training from the store may lose."""
    size: DataSize = field(default_factory=DataSize)

    def __post_init__(self) -> None:
        check_device(self.device)
        check_bounds(self)
        unknown = set(self.stages) - {"loader", "vae", "dit"}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise ValueError(f"stages must be loader, vae or dit, got {names}")
