"""Times our kernels against their hardware floors and against dense attention: `python -m benchmarks.ssa ssa`."""

from __future__ import annotations

import collections
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.token_sets import surface_coords
from kernels import BlockIndex, select_blocks, spatial_sparse_attention, token_order

GRIDS = {2062: 32, 5509: 48, 10682: 64}  # of the paper's token counts; others lie in 128^3


@dataclass(frozen=True, kw_only=True)
class SsaConfig:
    """Spatial sparse attention, forward and backward, whole and by kernel."""

    tokens: tuple[int, ...] = (2062, 5509, 10682, 16417, 32757, 46031, 65497, 130812)
    coords: Path | None = None  # .npy [N, 3] or .npz of several, instead of generated sets
    top_k: tuple[int, ...] = (8,)
    smooth: bool = False  # spatially coherent q and k instead of independent ones
    heads: int = 32
    kv_heads: int = 2
    head_size: int = 32
    dense: bool = True  # also time dense attention
    peer: Path | None = (
        None  # a file that defines spatial_sparse_attention(q, k, v, ck, cv, gates, coords, top_k)
    )
    out: Path = Path("runs/bench")  # ssa.json and ssa.png go here


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median of CUDA event times after a warm-up."""
    for _ in range(3):
        function()
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return float(np.median([start.elapsed_time(end) for start, end in events]))


def replayed(function: Callable[[], object]) -> float:
    """Median time of the function as a CUDA graph: without the host's launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()
    time = milliseconds(graph.replay)
    del kept
    return time


def by_kernel(function: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Milliseconds in each kernel of one call, largest first."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    times: dict[str, float] = collections.defaultdict(float)
    for event in profile.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name if event.name.startswith("_") else "torch"
            times[name] += event.device_time / 1e3 / repeats
    return dict(sorted(times.items(), key=lambda item: -item[1]))


@triton.jit
def _exponentials(x_ptr, y_ptr, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(y_ptr + i, x)


def ceilings() -> dict[str, float]:
    """This GPU's measured rates: bf16 FLOP/s, bytes/s of a copy (read + written), exp2/s."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    x = torch.rand(1 << 24, device="cuda")
    y = torch.empty_like(x)
    big = torch.empty(2, 1 << 30, dtype=torch.uint8, device="cuda")
    rounds, grid = 256, (x.numel() // 1024,)
    return {
        "flop": 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3,
        "byte": 2 * (1 << 30) / milliseconds(lambda: big[0].copy_(big[1])) * 1e3,
        "exp": rounds
        * x.numel()
        / milliseconds(lambda: _exponentials[grid](x, y, rounds, 1024))
        * 1e3,
    }


def floors(
    index: BlockIndex, selected_GNT: Tensor, config: SsaConfig, rates: dict[str, float]
) -> dict[str, float]:
    """Least milliseconds of one step: the arithmetic, exponentials and bytes it cannot do without."""
    H, G, D, N = config.heads, config.kv_heads, config.head_size, index.num_tokens
    sizes = torch.diff(index.block_starts).double()
    compressed = float(
        H * (torch.diff(index.token_starts) * torch.diff(index.asset_compressed).double()).sum()
    )
    chosen = torch.where(selected_GNT >= 0, sizes[selected_GNT.clamp(min=0).long()], 0.0)
    selected = float(chosen.sum()) * H / G
    window = float((torch.diff(index.window_starts).double() ** 2).sum()) * H
    scores = compressed + selected + window
    rows, keys = 2 * N * H * D, 2 * (2 * N + 2 * index.num_compressed) * G * D  # bytes
    work = {
        "forward_flop": (4 * scores + 2 * compressed) * D / rates["flop"],
        "forward_exp": (scores + compressed) / rates["exp"],
        "forward_byte": (2 * rows + keys) / rates["byte"],
        "backward_flop": 10 * scores * D / rates["flop"],
        "backward_exp": scores / rates["exp"],
        "backward_byte": (6 * rows + 2 * keys) / rates["byte"],  # q, three outputs, do; dq
    }
    return {name: seconds * 1e3 for name, seconds in work.items()}


def make_inputs(index: BlockIndex, coords: Tensor, config: SsaConfig) -> list[Tensor]:
    """q, k, v, ck, cv and gates in bf16. Smooth ones are random cosines of the position."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    N, P, H, G, D = (
        index.num_tokens,
        index.num_compressed,
        config.heads,
        config.kv_heads,
        config.head_size,
    )
    place_N3 = coords[:, 1:].float()
    place_P3 = place_N3[index.compressed_starts[:-1].long()]

    def draw(rows: int, heads: int, place: Tensor | None) -> Tensor:
        if place is None or not config.smooth:
            return torch.randn(rows, heads, D, device="cuda", generator=generator)
        waves = torch.randn(3, heads * D, device="cuda", generator=generator) / 12
        phase = torch.rand(heads * D, device="cuda", generator=generator) * 6.28
        return (2**0.5 * torch.cos(place @ waves + phase)).view(rows, heads, D)

    shapes = ((N, H, place_N3), (N, G, place_N3), (N, G, None), (P, G, place_P3), (P, G, None))
    tensors = [draw(*shape) for shape in shapes]
    tensors.append(torch.randn(N, 3, device="cuda", generator=generator))
    return [x.bfloat16().requires_grad_() for x in tensors]


def time_step(
    function: Callable[..., Tensor], inputs: list[Tensor], repeats: int = 20
) -> tuple[float, float]:
    """Milliseconds of forward and of backward, as a training loop sees them."""
    forward = milliseconds(lambda: function(*inputs), repeats)
    out = function(*inputs)
    cotangent = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, inputs, cotangent, retain_graph=True, allow_unused=True)

    return forward, milliseconds(backward, repeats)


def peak_bytes(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Most memory of a forward and a backward above the inputs, output and gradients included."""
    cotangent = torch.randn_like(inputs[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(function(*inputs), inputs, cotangent)
    return torch.cuda.max_memory_allocated() - before


def time_dense(inputs: list[Tensor], backend: SDPBackend) -> tuple[float, float] | None:
    """Full attention over the same tokens, keys repeated to every head; None where the backend refuses."""
    q, k, v = (x.detach().transpose(0, 1)[None].contiguous() for x in inputs[:3])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    x = [t.requires_grad_() for t in (q, k, v)]
    repeats = 5 if q.shape[2] < 60000 else 2
    try:
        with sdpa_kernel(backend):
            return time_step(torch.nn.functional.scaled_dot_product_attention, x, repeats)
    except RuntimeError as refusal:
        sys.stderr.write(f"{backend.name}: {refusal}\n")
        return None


def load_peer(path: Path) -> Callable[..., Tensor]:
    """`spatial_sparse_attention` of the user's file. ValueError if it has none."""
    spec = importlib.util.spec_from_file_location("peer", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"peer must be a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    if not hasattr(module, "spatial_sparse_attention"):
        raise ValueError(f"peer must define spatial_sparse_attention, got {path}")
    return module.spatial_sparse_attention


def token_sets(config: SsaConfig) -> list[Tensor]:
    """Sorted int32 [N, 4] coordinates. ValueError if the user's array is not [N, 3] integers."""
    if config.coords is None:
        return [surface_coords(n, GRIDS.get(n, 128)) for n in config.tokens]
    loaded = np.load(config.coords)
    sets = []
    for array in loaded.values() if hasattr(loaded, "values") else [loaded]:
        if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "iu":
            raise ValueError(
                f"coords must hold integer arrays [N, 3], got {array.dtype} {array.shape}"
            )
        xyz = torch.from_numpy(array.astype(np.int32))
        coords = torch.cat([torch.zeros(len(xyz), 1, dtype=torch.int32), xyz], 1)
        sets.append(coords[token_order(coords)])
    return sorted(sets, key=len)


def measure(coords: Tensor, top_k: int, config: SsaConfig, rates: dict[str, float]) -> dict:
    """One row of the table."""
    coords = coords.cuda()
    index = BlockIndex.from_coords(coords, 1)
    inputs = make_inputs(index, coords, config)

    def ours(*x: Tensor) -> Tensor:
        return spatial_sparse_attention(*x, index, top_k=top_k)

    out = ours(*inputs)
    cotangent = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, cotangent, retain_graph=True)

    forward_ms, backward_ms = time_step(ours, inputs)
    with torch.no_grad():
        graph_forward = replayed(lambda: ours(*inputs))

    def step() -> tuple[Tensor, ...]:
        leaves = [
            x.detach().requires_grad_() for x in inputs
        ]  # old ones are tied to the stream of their first use
        return torch.autograd.grad(ours(*leaves), leaves, cotangent)

    row = {
        "tokens": index.num_tokens,
        "blocks": index.num_blocks,
        "compressed": index.num_compressed,
        "top_k": top_k,
        "forward": forward_ms,
        "backward": backward_ms,
        "graph_forward": graph_forward,
        "graph_step": replayed(step),
        "peak_gb": peak_bytes(ours, inputs) / 2**30,
        "index_ms": milliseconds(lambda: BlockIndex.from_coords(coords, 1), 5),
        "floors": floors(
            index, select_blocks(inputs[0], inputs[3], index, top_k=top_k), config, rates
        ),
        "forward_kernels": by_kernel(lambda: ours(*inputs)),
        "backward_kernels": by_kernel(backward),
    }
    if config.dense:
        row["flash"] = time_dense(inputs, SDPBackend.FLASH_ATTENTION)
        row["cudnn"] = time_dense(inputs, SDPBackend.CUDNN_ATTENTION)
    if config.peer is not None:
        peer = load_peer(config.peer)
        row["peer"] = time_step(lambda *x: peer(*x, coords, top_k), inputs)
    return row


def table(rows: list[dict]) -> str:
    """Markdown: ours forward/backward, replayed, its floor, dense attention, memory."""

    def pair(values) -> str:
        return "-" if values is None else f"{values[0]:.3g}/{values[1]:.3g}"

    lines = [
        "| N | top-k | eager f/b ms | graph f/b | floor f/b | of it | flash f/b | cuDNN f/b | gain | GB |",
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
        ratio = (
            "-"
            if flash is None
            else "/".join(f"{f / t:.2g}x" for f, t in zip(flash, graph, strict=True))
        )
        lines.append(
            f"| {row['tokens']} | {row['top_k']} | {pair(ours)} | {pair(graph)} | {pair(floor)} | {share} "
            f"| {pair(flash)} | {pair(cudnn)} | {ratio} | {row['peak_gb']:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
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


def commit() -> str:
    """The checkout's commit, or "unknown"."""
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def bench_ssa(config: SsaConfig) -> None:
    """Prints a table, writes ssa.json and ssa.png."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.ssa needs a CUDA device")
    rates = ceilings()
    rows = [
        measure(coords, k, config, rates) for coords in token_sets(config) for k in config.top_k
    ]
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "ceilings": rates,
        "rows": rows,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "ssa.json").write_text(json.dumps(result, indent=1))
    plot(rows, config.out / "ssa.png")
    sys.stdout.write(
        f"{result['gpu']}, torch {result['torch']}, triton {result['triton']}, commit {result['commit']}\n"
    )
    sys.stdout.write(
        "ceilings: " + ", ".join(f"{v / 1e12:.4g} T{k}/s" for k, v in rates.items()) + "\n"
    )
    sys.stdout.write(table(rows) + "\n")
    for row in rows:
        for way in ("forward", "backward"):
            parts = ", ".join(
                f"{name.strip('_')} {ms:.3g}" for name, ms in row[f"{way}_kernels"].items()
            )
            sys.stdout.write(f"{row['tokens']} top-k {row['top_k']} {way}: {parts}\n")


def main() -> None:
    import tyro

    app = tyro.extras.SubcommandApp()
    app.command(name="ssa")(bench_ssa)
    app.cli(config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
