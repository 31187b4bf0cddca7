"""Times the sparse convolutions of the VAE against torch and spconv: `python -m benchmarks.conv [--out DIR]`."""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.ssa import ceilings, commit, milliseconds, replayed
from kernels import duplicate_children, neighbor_map, parent_voxels, sparse_conv, token_order
from kernels.conv import reference as reference_conv

RESOLUTIONS = {512: 10655, 1024: 45904}  # paper, table of section 4: mean latent tokens


@dataclass(frozen=True)
class Layer:
    """A convolution of the VAE: its level (resolution / level) or the size of its full blocks, its channels."""

    name: str
    level: int
    C: int
    O: int
    size: int = 1
    upsample: bool = False


LAYERS = (  # paper, section 3
    Layer("encoder R/2", 2, 32, 64),
    Layer("encoder R/2", 2, 64, 64),
    Layer("encoder R/4", 4, 64, 128),
    Layer("encoder R/4", 4, 128, 128),
    Layer("encoder R/8", 8, 128, 512),
    Layer("encoder R/8", 8, 512, 512),
    Layer("decoder R/8", 8, 512, 128),
    Layer("decoder R/4, after duplication", 8, 128, 128, 2, True),
    Layer("decoder R/4", 8, 128, 64, 2),
    Layer("decoder R/2, after duplication", 8, 64, 64, 4, True),
    Layer("decoder R/2", 8, 64, 32, 4),
    Layer("decoder R, after duplication", 8, 32, 32, 8, True),
)


def distance(p: Tensor) -> Tensor:
    """Signed distance of points [N, 3] of the cube [-0.5, 0.5]^3 to a sphere, a torus and a bar."""
    sphere = (p - p.new_tensor([-0.1, -0.1, 0.05])).norm(dim=1) - 0.23
    q = p - p.new_tensor([0.12, 0.1, -0.05])
    torus = torch.stack([q[:, [0, 2]].norm(dim=1) - 0.24, q[:, 1]], 1).norm(dim=1) - 0.07
    bar = (p - p.new_tensor([0.05, 0.0, 0.25])).abs() - p.new_tensor([0.3, 0.06, 0.04])
    bar = bar.clamp(min=0).norm(dim=1) + bar.amax(1).clamp(max=0)
    return torch.stack([sphere, torus, bar]).amin(0)


def active_voxels(R: int, tokens: int) -> Tensor:
    """int32 [N, 4] in token order: the band of the shapes, scaled until about `tokens` cells of 8^3 hold any of it."""
    band, side = min(max(R / 128, 2), 4) / R, R // 8
    axis = torch.arange(side, device="cuda")
    cells = torch.cartesian_prod(axis, axis, axis)
    local = torch.cartesian_prod(*[torch.arange(8, device="cuda")] * 3)

    def voxels(scale: float) -> Tensor:
        def sdf(index: Tensor) -> Tensor:
            return scale * distance((index / (R - 1) - 0.5) / scale)

        near = cells[(sdf(cells * 8 + 3.5).abs() < band + 7 / R)] * 8
        points = torch.cat([(block[:, None] + local).view(-1, 3) for block in near.split(1 << 16)])
        return torch.cat([p[sdf(p).abs() < band] for p in points.split(1 << 24)])

    low, high = 0.3, 1.6
    for _ in range(12):
        scale = (low + high) / 2
        found = voxels(scale)
        count = len(torch.unique(((found // 8) * found.new_tensor([side * side, side, 1])).sum(1)))
        low, high = (scale, high) if count < tokens else (low, scale)
        if abs(count - tokens) < 0.005 * tokens:
            break
    coords = torch.cat([found.new_zeros(len(found), 1), found], 1).int()
    return coords[token_order(coords)]


def gather_convolution(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """The usual way in torch: all 27 rows gathered, in slices that fit, times the weights."""
    return reference_conv.VoxelConvolution.apply(x, weight, rows) + bias


def block_rows(neighbors: Tensor, size: int) -> Tensor:
    """Neighbours of every voxel of full blocks: int32 [M * size^3, 27]."""
    axis = torch.arange(size, device=neighbors.device)
    local = torch.cartesian_prod(axis, axis, axis)
    columns = []
    for offset in itertools.product((-1, 0, 1), repeat=3):
        place = local + torch.tensor(offset, device=neighbors.device)
        x, y, z = (place.div(size, rounding_mode="floor") + 1).unbind(1)
        i, j, k = (place % size).unbind(1)
        block = neighbors[:, x * 9 + y * 3 + z]
        columns.append(
            torch.where(block < 0, -1, block * size**3 + ((i * size + j) * size + k).int()).view(-1)
        )
    return torch.stack(columns, 1)


def voxel_coords(coords: Tensor, size: int) -> Tensor:
    axis = torch.arange(size, device=coords.device, dtype=torch.int32)
    local = torch.nn.functional.pad(torch.cartesian_prod(axis, axis, axis), (1, 0))
    return (
        (coords[:, None] * torch.tensor([1, size, size, size], device=coords.device) + local)
        .view(-1, 4)
        .int()
    )


def measure_spconv(layer: Layer, coords: Tensor) -> tuple[float, float]:
    """Milliseconds of spconv's submanifold convolution in fp16 (it has no bf16), its pairs made beforehand."""
    import spconv.pytorch as spconv

    voxels = coords if layer.size == 1 else voxel_coords(coords, layer.size)
    rows = len(voxels)
    side = int(voxels[:, 1:].max()) + 1
    module = spconv.SubMConv3d(layer.C, layer.O, 3, bias=True, indice_key="pairs").cuda().half()
    x = torch.randn(
        rows // 8 if layer.upsample else rows, layer.C, device="cuda", dtype=torch.float16
    )
    pairs: dict = {}

    def forward(x: Tensor) -> Tensor:
        features = duplicate_children(x, layer.size) if layer.upsample else x
        source = spconv.SparseConvTensor(features, voxels, [side] * 3, 1, indice_dict=pairs)
        return module(source).features

    cotangent = torch.randn_like(forward(x))

    def step() -> object:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf), [leaf, *module.parameters()], cotangent)

    repeats = 3 if rows > 4_000_000 else 8
    with torch.no_grad():
        forward_ms = milliseconds(lambda: forward(x), repeats)
    return forward_ms, milliseconds(step, repeats) - forward_ms


def step_times(
    function: Callable[..., Tensor], inputs: list[Tensor], graph: bool, repeats: int
) -> tuple[float, float]:
    """Milliseconds of forward and of backward."""
    cotangent = torch.randn_like(function(*inputs).detach())

    def step() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, cotangent)

    with torch.no_grad():
        forward = (
            replayed(lambda: function(*inputs))
            if graph
            else milliseconds(lambda: function(*inputs), repeats)
        )
    both = replayed(step) if graph else milliseconds(step, repeats)
    return forward, both - forward


def peak_gb(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Most memory of a step above its inputs; output and gradients included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def floors(
    layer: Layer, pairs: float, rows_in: int, rows_out: int, rates: dict[str, float]
) -> tuple[float, float]:
    """Least milliseconds of forward and backward: FLOP that exist, or every row read and written once."""
    flop = 2 * pairs * layer.C * layer.O
    read, write = 2 * rows_in * layer.C, 2 * rows_out * layer.O
    forward = max(flop / rates["flop"], (read + write) / rates["byte"])
    backward = max(2 * flop / rates["flop"], (2 * read + write) / rates["byte"])
    return forward * 1e3, backward * 1e3


def measure(layer: Layer, coords: Tensor, rates: dict[str, float], peers: bool) -> dict:
    """One row of the table. bf16 rows, fp32 master weights; neighbours made beforehand for everybody."""
    neighbors = neighbor_map(coords)
    rows = len(coords) * layer.size**3
    rows_in = rows // 8 if layer.upsample else rows
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((rows_in, layer.C), (27, layer.C, layer.O), (layer.O,))
    x, weight, bias = (torch.randn(*shape, device="cuda", generator=generator) for shape in shapes)
    inputs = [x.bfloat16(), weight * (27 * layer.C) ** -0.5, bias]

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return sparse_conv(x, w, b, neighbors, size=layer.size, upsample=layer.upsample)

    ours(*(t.requires_grad_() for t in inputs)).sum().backward()  # chooses tiles
    inputs = [t.detach() for t in inputs]
    present = float((neighbors >= 0).double().sum())
    if (
        layer.size > 1
    ):  # of the 27 taps of a block's voxels, those in the block next to it on one, two or three axes
        share = torch.tensor(
            [1 / (3 * layer.size), 1 - 2 / (3 * layer.size), 1 / (3 * layer.size)], device="cuda"
        )
        columns = torch.stack([a * b * c for a, b, c in itertools.product(share, repeat=3)])
        present = float(((neighbors >= 0) * columns).double().sum()) * 27 * layer.size**3
    dense_flop = 2 * 27 * rows * layer.C * layer.O
    executed = dense_flop * (8 / 27 if layer.upsample else 1)
    needed = present * (8 / 27 if layer.upsample else 1)
    forward, backward = step_times(ours, inputs, True, 20)
    floor = floors(layer, needed, rows_in, rows, rates)
    moved = 2 * (rows_in * layer.C + rows * layer.O)
    row = {
        "layer": f"{layer.name} {layer.C}->{layer.O}",
        "rows": rows,
        "ours": (forward, backward),
        "floor": floor,
        "dense_tflops": dense_flop / forward / 1e9,
        "tflops": executed / forward / 1e9,
        "step_tflops": 3 * executed / (forward + backward) / 1e9,
        "gb_per_s": moved / forward / 1e6,
        "peak_gb": peak_gb(ours, inputs),
    }
    if peers:
        row |= measure_torch(layer, inputs, neighbors)
    return row


def measure_torch(layer: Layer, inputs: list[Tensor], neighbors: Tensor) -> dict:
    """Gathered products, and for full blocks cuDNN on each block with its surroundings; all in bf16."""
    low, result = [t.bfloat16() for t in inputs], {}
    rows = len(neighbors) * layer.size**3
    repeats = 3 if rows > 4_000_000 else 8

    def source(x: Tensor) -> Tensor:
        return duplicate_children(x, layer.size) if layer.upsample else x

    def halo(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return sparse_conv(source(x), w, b, neighbors, size=layer.size, backend="reference")

    if layer.size > 1:
        result["halo"] = step_times(halo, low, False, repeats)
    around = neighbors if layer.size == 1 else block_rows(neighbors, layer.size)

    def gather(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return gather_convolution(source(x), w, b, around)

    result["gather"] = step_times(gather, low, False, repeats)
    result["gather_gb"] = peak_gb(gather, low)
    return result


def table(rows: list[dict], rates: dict[str, float]) -> str:
    """Markdown: ours forward/backward, the floor, the peers, rates and memory."""

    def pair(values) -> str:
        return "-" if values is None else f"{values[0]:.3g}/{values[1]:.3g}"

    lines = [
        "| layer | rows | ours f/b ms | floor f/b | of it | gather f/b | halo f/b | spconv f/b | gain | "
        "TFLOP/s 27 taps, executed (of peak) | GB/s | GB, gather's |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "/".join(
            f"{100 * f / t:.0f}%" for f, t in zip(row["floor"], row["ours"], strict=True)
        )
        peers = [sum(row[name]) for name in ("gather", "halo", "spconv") if row.get(name)]
        gain = f"{min(peers) / sum(row['ours']):.2f}x" if peers else "-"
        lines.append(
            f"| {row['layer']} | {row['rows']} | {pair(row['ours'])} | {pair(row['floor'])} | {share} "
            f"| {pair(row.get('gather'))} | {pair(row.get('halo'))} | {pair(row.get('spconv'))} | {gain} "
            f"| {row['dense_tflops']:.0f}, {row['tflops']:.0f} ({100e12 * row['tflops'] / rates['flop']:.0f}%) "
            f"| {row['gb_per_s']:.0f} | {row['peak_gb']:.2f}, {row.get('gather_gb', float('nan')):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="conv.json goes here")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.conv needs a CUDA device")
    rates = ceilings()
    result: dict = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "ceilings": rates,
    }
    sys.stdout.write(", ".join(f"{k} {v}" for k, v in result.items()) + "\n")
    options.out.mkdir(parents=True, exist_ok=True)
    reference_conv._MAX_GATHERED = 1 << 30  # slices that fill a GPU

    def save() -> None:
        (options.out / "conv.json").write_text(json.dumps(result, indent=1))

    sets = {}
    for R, tokens in RESOLUTIONS.items():
        levels = {1: active_voxels(R, tokens)}
        for level in (2, 4, 8):
            levels[level] = parent_voxels(levels[level // 2]).coords_P4
        share = len(levels[1]) / len(levels[8]) / 512
        sys.stdout.write(
            f"R = {R}: {', '.join(f'R/{k} {len(v)}' for k, v in levels.items())}; {share:.0%} active\n"
        )
        sets[R] = levels
        result[str(R)] = []
        for layer in LAYERS:
            result[str(R)].append(measure(layer, levels[layer.level], rates, not options.no_peers))
            torch.cuda.empty_cache()
            save()
    errors = set()
    if not options.no_peers:  # last, whatever it does to the device
        for R, levels in sets.items():
            for layer, row in zip(LAYERS, result[str(R)], strict=True):
                try:
                    row["spconv"] = measure_spconv(layer, levels[layer.level])
                except (ImportError, RuntimeError, KeyError) as failure:
                    errors.add(f"spconv: {type(failure).__name__}: {str(failure)[:200]}\n")
                torch.cuda.empty_cache()
                save()
    for R in RESOLUTIONS:
        sys.stdout.write(f"\nR = {R}\n\n{table(result[str(R)], rates)}\n")
    sys.stdout.writelines(sorted(errors))


if __name__ == "__main__":
    main()
