"""Measures spatial sparse attention against hardware limits, dense attention and other code."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.flex_selection import flex_selection, selection_mask
from benchmarks.gpu import require_gpu
from benchmarks.gpu_timing import (
    gpu_and_versions,
    graph_milliseconds,
    kernel_milliseconds,
    milliseconds,
    milliseconds_pair,
    peak_rates,
)
from benchmarks.ssa_config import SsaConfig
from benchmarks.token_sets import surface_coords
from kernels import (
    BlockIndex,
    select_blocks,
    selection_attention,
    spatial_sparse_attention,
    token_order,
)
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically

log = logging.getLogger(__name__)

# Grid sides of the paper's token counts (Direct3D-S2, arXiv 2505.17412).
GRIDS = {2062: 32, 5509: 48, 10682: 64}


def grid_side(tokens: int) -> int:
    """Return the side of the grid of a generated set: 128, or 256 for more than 200,000 tokens."""
    return GRIDS.get(tokens, 128 if tokens <= 200_000 else 256)


def floors(
    index: BlockIndex, selected_GNT: Tensor, cfg: SsaConfig, rates: dict[str, float]
) -> dict[str, float]:
    """Return the least possible milliseconds of one step, by arithmetic, exponentials and bytes.

    Args:
        index: Block index of the tokens.
        selected_GNT: Selected blocks, -1 for none.
        cfg: Head counts and sizes.
        rates: Result of `peak_rates`.

    Returns:
        Milliseconds by "forward_flop", "forward_exp", "forward_byte" and the same for backward.
    """
    H, G, D, N = cfg.heads, cfg.kv_heads, cfg.head_size, index.num_tokens
    # Numbers of scores of the three branches.
    asset_compressed = torch.diff(index.asset_compressed).double()
    compressed = float(H * (torch.diff(index.token_starts) * asset_compressed).sum())
    sizes = torch.diff(index.block_starts).double()
    chosen = torch.where(selected_GNT >= 0, sizes[selected_GNT.clamp(min=0).long()], 0.0)
    selected = float(chosen.sum()) * H / G
    window = float((torch.diff(index.window_starts).double() ** 2).sum()) * H
    scores = compressed + selected + window
    # Bytes of the queries, and of keys and values, in bf16.
    rows = 2 * N * H * D
    keys = 2 * (2 * N + 2 * index.num_compressed) * G * D
    work = {
        "forward_flop": (4 * scores + 2 * compressed) * D / rates["flop"],
        "forward_exp": (scores + compressed) / rates["exp"],
        "forward_byte": (2 * rows + keys) / rates["byte"],
        "backward_flop": 10 * scores * D / rates["flop"],
        "backward_exp": scores / rates["exp"],
        # q, three outputs, the gradient of the output, and dq.
        "backward_byte": (6 * rows + 2 * keys) / rates["byte"],
    }
    return {name: seconds * 1e3 for name, seconds in work.items()}


def make_inputs(index: BlockIndex, coords: Tensor, cfg: SsaConfig) -> list[Tensor]:
    """Return q, k, v, ck, cv and gates in bf16. Smooth ones are random cosines of the position."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    N, P = index.num_tokens, index.num_compressed
    H, G, D = cfg.heads, cfg.kv_heads, cfg.head_size
    xyz_N3 = coords[:, 1:].float()
    xyz_P3 = xyz_N3[index.compressed_starts[:-1].long()]

    def draw(rows: int, heads: int, xyz: Tensor | None) -> Tensor:
        if xyz is None or not cfg.smooth:
            return torch.randn(rows, heads, D, device="cuda", generator=generator)
        waves = torch.randn(3, heads * D, device="cuda", generator=generator) / 12
        phase = torch.rand(heads * D, device="cuda", generator=generator) * 6.28
        return (2**0.5 * torch.cos(xyz @ waves + phase)).view(rows, heads, D)

    shapes = ((N, H, xyz_N3), (N, G, xyz_N3), (N, G, None), (P, G, xyz_P3), (P, G, None))
    tensors = [draw(*shape) for shape in shapes]
    tensors.append(torch.randn(N, 3, device="cuda", generator=generator))
    return [x.bfloat16().requires_grad_() for x in tensors]


def time_step(
    function: Callable[..., Tensor], inputs: list[Tensor], repeats: int = 20
) -> tuple[float, float]:
    """Return milliseconds of forward and of backward, with launches by the host."""
    forward = milliseconds(lambda: function(*inputs), repeats)
    out = function(*inputs)
    cotangent = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, inputs, cotangent, retain_graph=True, allow_unused=True)

    return forward, milliseconds(backward, repeats)


def peak_bytes(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Return the peak memory of forward and backward in bytes, without the inputs."""
    cotangent = torch.randn_like(inputs[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(function(*inputs), inputs, cotangent)
    return torch.cuda.max_memory_allocated() - before


def time_dense(inputs: list[Tensor], backend: SDPBackend) -> tuple[float, float] | None:
    """Time dense attention over the same tokens, with keys repeated for every head.

    Returns:
        Milliseconds of forward and of backward. None if the backend refuses the inputs.
    """
    q, k, v = (x.detach().transpose(0, 1)[None].contiguous() for x in inputs[:3])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    x = [t.requires_grad_() for t in (q, k, v)]
    repeats = 5 if q.shape[2] < 60000 else 2
    try:
        with sdpa_kernel(backend):
            return time_step(torch.nn.functional.scaled_dot_product_attention, x, repeats)
    except RuntimeError as refusal:
        log.warning("%s cannot run: %s", backend.name, refusal)
        return None


def time_selection(inputs: list[Tensor], index: BlockIndex, selected_GNT: Tensor) -> dict:
    """Time the selected branch alone, by our kernels and by FlexAttention, compiled.

    Returns:
        "ours" and "flex", milliseconds of forward and of backward, "error", the relative difference
        of the results, and "tiles", the share of the tiles of scores that FlexAttention computes.
    """
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    mask, share = selection_mask(index, selected_GNT, q.shape[1])
    compiled = torch.compile(flex_attention, dynamic=False)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return selection_attention(q, k, v, selected_GNT, index)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_selection(q, k, v, mask, compiled)

    with torch.no_grad():
        expected = ours(q, k, v).float()
        error = ((flex(q, k, v).float() - expected).norm() / expected.norm()).item()
    return {
        "ours": time_step(ours, [q, k, v]),
        "flex": time_step(flex, [q, k, v], 5),
        "error": error,
        "tiles": share,
    }


def load_peer(path: Path) -> Callable[..., Tensor]:
    """Return `spatial_sparse_attention` of the user's file.

    Raises:
        UserError: If the file is no Python file or does not define it.
    """
    spec = importlib.util.spec_from_file_location("peer", path)
    if spec is None or spec.loader is None:
        raise UserError(f"peer must be a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    if not hasattr(module, "spatial_sparse_attention"):
        raise UserError(f"peer must define spatial_sparse_attention, got {path}")
    return module.spatial_sparse_attention


def token_sets(cfg: SsaConfig) -> list[Tensor]:
    """Return the token sets in token order: int32 [N, 4] = (batch 0, x, y, z) each.

    Raises:
        UserError: If an array of the user's file is not [N, 3] integers.
    """
    if cfg.coords is None:
        return [surface_coords(n, grid_side(n)) for n in cfg.tokens]
    loaded = np.load(cfg.coords)
    sets = []
    for array in loaded.values() if hasattr(loaded, "values") else [loaded]:
        if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "iu":
            raise UserError(
                f"coords must hold integer arrays [N, 3], got {array.dtype} {array.shape}"
            )
        xyz = torch.from_numpy(array.astype(np.int32))
        coords = torch.cat([torch.zeros(len(xyz), 1, dtype=torch.int32), xyz], 1)
        sets.append(coords[token_order(coords)])
    return sorted(sets, key=len)


def measure(coords: Tensor, top_k: int, cfg: SsaConfig, rates: dict[str, float]) -> dict:
    """Return one row of the table."""
    coords = coords.cuda()
    index = BlockIndex.from_coords(coords, 1)
    inputs = make_inputs(index, coords, cfg)

    def ours(q: Tensor, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, gates: Tensor) -> Tensor:
        return spatial_sparse_attention(q, k, v, ck, cv, gates, index, top_k=top_k)

    out = ours(*inputs)
    cotangent = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, cotangent, retain_graph=True)

    forward_ms, backward_ms = time_step(ours, inputs)
    with torch.no_grad():
        graph_forward = graph_milliseconds(lambda: ours(*inputs))

    def step() -> tuple[Tensor, ...]:
        # New leaves: the inputs are tied to the stream of their first use.
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(ours(*leaves), leaves, cotangent)

    selected_GNT = select_blocks(inputs[0], inputs[3], index, top_k=top_k)
    row = {
        "tokens": index.num_tokens,
        "blocks": index.num_blocks,
        "compressed": index.num_compressed,
        "top_k": top_k,
        "forward": forward_ms,
        "backward": backward_ms,
        "graph_forward": graph_forward,
        "graph_step": graph_milliseconds(step),
        "peak_gb": peak_bytes(ours, inputs) / 2**30,
        "index_ms": milliseconds(lambda: BlockIndex.from_coords(coords, 1), 5),
        "floors": floors(index, selected_GNT, cfg, rates),
        "forward_kernels": kernel_milliseconds(lambda: ours(*inputs)),
        "backward_kernels": kernel_milliseconds(backward),
    }
    if cfg.dense:
        row["flash"] = time_dense(inputs, SDPBackend.FLASH_ATTENTION)
        row["cudnn"] = time_dense(inputs, SDPBackend.CUDNN_ATTENTION)
    if cfg.flex:
        row["selection"] = time_selection(inputs, index, selected_GNT)
    if cfg.peer is not None:
        peer = load_peer(cfg.peer)
        row["peer"] = time_step(lambda *x: peer(*x, coords, top_k), inputs)
    return row


def table(rows: list[dict]) -> str:
    """Return a Markdown table: times, bounds, dense attention and memory."""
    lines = [
        "| N | top-k | eager f/b ms | graph f/b | floor f/b | of it | flash f/b | cuDNN f/b "
        "| gain | GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["forward"], row["backward"]
        graph = row["graph_forward"], row["graph_step"] - row["graph_forward"]
        floor = [
            max(row["floors"][f"{way}_{kind}"] for kind in ("flop", "exp", "byte"))
            for way in ("forward", "backward")
        ]
        share = "/".join(f"{100 * f / t:.0f}%" for f, t in zip(floor, graph, strict=True))
        flash, cudnn = row.get("flash"), row.get("cudnn")
        ratio = "-"
        if flash is not None:
            ratio = "/".join(f"{f / t:.2g}x" for f, t in zip(flash, graph, strict=True))
        pairs = [milliseconds_pair(values) for values in (ours, graph, floor)]
        dense = [milliseconds_pair(values) for values in (flash, cudnn)]
        columns = [row["tokens"], row["top_k"], *pairs, share, *dense, ratio]
        lines.append(f"| {' | '.join(map(str, columns))} | {row['peak_gb']:.2f} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Write a picture of the times over the number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axis, way, i in zip(axes, ("forward", "backward"), (0, 1), strict=True):
        N = [row["tokens"] for row in rows]
        graph = [
            (row["graph_forward"], row["graph_step"] - row["graph_forward"])[i] for row in rows
        ]
        axis.loglog(N, graph, "o-", label="ours")
        floor = [
            max(row["floors"][f"{way}_{kind}"] for kind in ("flop", "exp", "byte")) for row in rows
        ]
        axis.loglog(N, floor, "k:", label="hardware floor of SSA")
        for name, label in (("flash", "dense, flash"), ("cudnn", "dense, cuDNN"), ("peer", "peer")):
            points = [(row["tokens"], row[name][i]) for row in rows if row.get(name)]
            if points:
                axis.loglog(*zip(*points, strict=True), "s--", label=label)
        axis.set(title=way, xlabel="tokens", ylabel="ms")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def time_ssa(cfg: SsaConfig) -> None:
    """Print a table, and write ssa.json and ssa.png.

    Raises:
        UserError: If there is no GPU, or the token sets or the peer cannot be used.
    """
    require_gpu()
    sets = token_sets(cfg)
    rates = peak_rates()
    rows = [measure(coords, top_k, cfg, rates) for coords in sets for top_k in cfg.top_k]
    result = {**gpu_and_versions(), "ceilings": rates, "rows": rows}
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_atomically(cfg.out / "ssa.json", json.dumps(result, indent=1) + "\n")
    plot(rows, cfg.out / "ssa.png")
    machine = ", ".join(f"{name} {result[name]}" for name in ("gpu", "torch", "triton", "commit"))
    measured = ", ".join(f"{rate / 1e12:.4g} T{name}/s" for name, rate in rates.items())
    sys.stdout.write(f"{machine}\npeak rates: {measured}\n{table(rows)}\n")
    for row in rows:
        for way in ("forward", "backward"):
            kernels = row[f"{way}_kernels"].items()
            parts = ", ".join(f"{name.strip('_')} {ms:.3g}" for name, ms in kernels)
            sys.stdout.write(f"{row['tokens']} top-k {row['top_k']} {way}: {parts}\n")
        if "selection" in row:
            found = row["selection"]
            ours, flex = (milliseconds_pair(found[name]) for name in ("ours", "flex"))
            sys.stdout.write(
                f"{row['tokens']} top-k {row['top_k']} selected branch: ours {ours}, FlexAttention "
                f"{flex} ms, {found['tiles']:.0%} of its tiles, difference {found['error']:.1e}\n"
            )
