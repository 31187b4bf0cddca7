"""Options of `python -m benchmarks.ssa`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SsaConfig:
    """Time spatial sparse attention, forward and backward, as a whole and by kernel."""

    tokens: tuple[int, ...] = (2062, 5509, 10682, 16417, 32757, 46031, 65497, 130812)
    """Numbers of tokens of the generated token sets."""

    coords: Path | None = None
    """File of token sets to use instead of generated ones: .npy [N, 3], or .npz of several."""

    top_k: tuple[int, ...] = (8,)
    """Numbers of blocks that each query selects."""

    smooth: bool = False
    """Draw queries and keys that vary smoothly in space instead of independent ones."""

    heads: int = 32
    """Number of query heads."""

    kv_heads: int = 2
    """Number of key/value heads."""

    head_size: int = 32
    """Number of channels of a head."""

    dense: bool = True
    """Also time dense attention."""

    flex: bool = True
    """Also time the selected branch alone, and the same through torch's FlexAttention."""

    peer: Path | None = None
    """Python file of another implementation to time. It must define
    spatial_sparse_attention(q, k, v, ck, cv, gates, coords, top_k)."""

    out: Path = Path("runs/bench")
    """Directory that ssa.json and ssa.png are written to."""


@dataclass(frozen=True, kw_only=True)
class TopBlocksConfig:
    """Time the choice of the blocks of largest score, for rows of several lengths."""

    blocks: tuple[int, ...] = (493, 914, 2048, 4760, 16384)
    """Numbers of blocks of an asset, which are the lengths of the rows of scores."""

    top_k: int = 8
    """Number of blocks that each query selects."""

    groups: tuple[int, ...] = (0, 128, 256, 512)
    """Numbers of groups of columns by which rows are narrowed. 0 holds a row at once."""

    rows: int = 32768
    """Number of queries, which have two rows each."""


@dataclass(frozen=True, kw_only=True)
class LaunchesConfig:
    """Time the launch of each SSA kernel against alternatives, to tune the kernels for a GPU."""

    tokens: tuple[int, ...] = (46031, 130812)
    """Numbers of tokens of the generated token sets."""

    coords: Path | None = None
    """File of token sets to use instead of generated ones: .npy [N, 3], or .npz of several."""

    kernels: tuple[str, ...] = ()
    """Kernels to measure, as the rows of the table name them. None stands for all."""

    top_k: int = 8
    """Number of blocks that each query selects."""

    heads: int = 32
    """Number of query heads."""

    kv_heads: int = 2
    """Number of key/value heads."""

    head_size: int = 32
    """Number of channels of a head."""

    total_s: float = 240
    """Seconds after which no other measurement begins. What was measured is written."""

    sample_ms: float = 150
    """Milliseconds that the repetitions of one launch may take. There are at least three."""

    out: Path = Path("runs/bench/launches.json")
    """JSON file of the measurements, which is written anew after each kernel."""
