"""Measures the sparse convolutions of the SS-VAE against hardware limits and other libraries."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.conv_config import ConvConfig
from benchmarks.gpu import require_gpu
from benchmarks.gpu_timing import (
    gpu_and_versions,
    graph_milliseconds,
    milliseconds,
    milliseconds_pair,
    peak_rates,
)
from kernels import duplicate_children, neighbor_map, parent_voxels, sparse_conv, token_order
from kernels.conv import reference as reference_conv
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically

# Direct3D-S2 paper (arXiv 2505.17412), section 4: mean numbers of latent tokens.
RESOLUTIONS = {512: 10655, 1024: 45904}


@dataclass(frozen=True)
class Layer:
    """A convolution of the VAE."""

    name: str
    level: int
    """Its voxels, or its blocks where `size` > 1, are those of resolution / level."""

    C: int
    O: int
    size: int = 1
    """Voxels per side of its full blocks."""

    upsample: bool = False


# Direct3D-S2 paper (arXiv 2505.17412), section 3.
LAYERS = (
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
    """Signed distance of points [N, 3] in [-0.5, 0.5]^3 to a sphere, a torus and a bar: [N]."""
    sphere = (p - p.new_tensor([-0.1, -0.1, 0.05])).norm(dim=1) - 0.23
    q = p - p.new_tensor([0.12, 0.1, -0.05])
    torus = torch.stack([q[:, [0, 2]].norm(dim=1) - 0.24, q[:, 1]], 1).norm(dim=1) - 0.07
    bar = (p - p.new_tensor([0.05, 0.0, 0.25])).abs() - p.new_tensor([0.3, 0.06, 0.04])
    bar = bar.clamp(min=0).norm(dim=1) + bar.amax(1).clamp(max=0)
    return torch.stack([sphere, torus, bar]).amin(0)


def active_voxels(R: int, tokens: int) -> Tensor:
    """Return the voxels in the band of the shapes, in token order: int32 [N, 4].

    The shapes are scaled until about `tokens` cells of 8^3 voxels contain a voxel of the band.
    """
    band = min(max(R / 128, 2), 4) / R
    side = R // 8
    axis = torch.arange(side, device="cuda")
    cells = torch.cartesian_prod(axis, axis, axis)
    local = torch.cartesian_prod(*[torch.arange(8, device="cuda")] * 3)

    def voxels(scale: float) -> Tensor:
        def sdf(index: Tensor) -> Tensor:
            return scale * distance((index / (R - 1) - 0.5) / scale)

        near = cells[(sdf(cells * 8 + 3.5).abs() < band + 7 / R)] * 8
        points = torch.cat([(cell[:, None] + local).view(-1, 3) for cell in near.split(1 << 16)])
        return torch.cat([p[sdf(p).abs() < band] for p in points.split(1 << 24)])

    low, high = 0.3, 1.6
    for _ in range(12):
        scale = (low + high) / 2
        active = voxels(scale)
        cell_key = ((active // 8) * active.new_tensor([side * side, side, 1])).sum(1)
        count = len(torch.unique(cell_key))
        low, high = (scale, high) if count < tokens else (low, scale)
        if abs(count - tokens) < 0.005 * tokens:
            break
    coords = torch.cat([active.new_zeros(len(active), 1), active], 1).int()
    return coords[token_order(coords)]


def gather_convolution(x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """The usual way in torch: gather all 27 rows, in slices that fit, and multiply the weights."""
    return reference_conv.VoxelConvolution.apply(x, weight, rows) + bias


def block_rows(neighbors: Tensor, size: int) -> Tensor:
    """Return the neighbours of every voxel of full blocks: int32 [M * size^3, 27]."""
    axis = torch.arange(size, device=neighbors.device)
    local = torch.cartesian_prod(axis, axis, axis)
    columns = []
    for offset in itertools.product((-1, 0, 1), repeat=3):
        place = local + torch.tensor(offset, device=neighbors.device)
        x, y, z = (place.div(size, rounding_mode="floor") + 1).unbind(1)
        i, j, k = (place % size).unbind(1)
        block = neighbors[:, x * 9 + y * 3 + z]
        row = block * size**3 + ((i * size + j) * size + k).int()
        columns.append(torch.where(block < 0, -1, row).view(-1))
    return torch.stack(columns, 1)


def voxel_coords(coords: Tensor, size: int) -> Tensor:
    """Return the coordinates of the voxels of full blocks: int32 [M * size^3, 4]."""
    axis = torch.arange(size, device=coords.device, dtype=torch.int32)
    local = torch.nn.functional.pad(torch.cartesian_prod(axis, axis, axis), (1, 0))
    scale = torch.tensor([1, size, size, size], device=coords.device)
    return (coords[:, None] * scale + local).view(-1, 4).int()


@dataclass(frozen=True)
class PeerInputs:
    """Inputs of another implementation of a layer, which takes all voxels as separate rows."""

    layer: Layer
    neighbors: Tensor
    voxels: Tensor
    """int32 [N, 4], coordinates of the rows."""

    x: Tensor
    """Rows, those before duplication if the layer duplicates."""

    weight: Tensor
    """[27, C, O]."""

    bias: Tensor

    @classmethod
    def draw(cls, layer: Layer, coords: Tensor, dtype: torch.dtype) -> PeerInputs:
        """Return random inputs for a layer on the voxels, or blocks, `coords`."""
        voxels = coords if layer.size == 1 else voxel_coords(coords, layer.size)
        rows = len(voxels) // 8 if layer.upsample else len(voxels)
        generator = torch.Generator(device=coords.device).manual_seed(0)
        x, weight, bias = (
            torch.randn(*size, device=coords.device, generator=generator).to(dtype)
            for size in ((rows, layer.C), (27, layer.C, layer.O), (layer.O,))
        )
        return cls(layer, neighbor_map(coords), voxels, x, weight * (27 * layer.C) ** -0.5, bias)

    @property
    def side(self) -> int:
        """Side of the grid."""
        return int(self.voxels[:, 1:].max()) + 1

    def their_weight(self) -> Tensor:
        """Return the weight as [O, 3, 3, 3, C], which other libraries take."""
        C, O = self.layer.C, self.layer.O
        return self.weight.permute(2, 0, 1).reshape(O, 3, 3, 3, C).contiguous()

    def source(self, x: Tensor) -> Tensor:
        """Return a row for each voxel."""
        return duplicate_children(x, self.layer.size) if self.layer.upsample else x

    def check(self, forward: Callable[..., Tensor]) -> None:
        """Compare the output and the gradients of another implementation with ours.

        Args:
            forward: Takes the rows, `their_weight` and the bias.

        Raises:
            RuntimeError: If one differs by more than 2% of its norm.
        """

        def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            size, upsample = self.layer.size, self.layer.upsample
            return sparse_conv(x, w, b, self.neighbors, size=size, upsample=upsample)

        results = []
        for function, w in ((forward, self.their_weight()), (ours, self.weight)):
            leaves = [t.detach().requires_grad_() for t in (self.x, w, self.bias)]
            out = function(*leaves)
            dx, dw, db = torch.autograd.grad(out, leaves, torch.ones_like(out))
            if function is forward:
                dw = dw.reshape(self.layer.O, 27, self.layer.C).permute(1, 2, 0)
            results.append([t.float() for t in (out.detach(), dx, dw, db)])
        for name, a, b in zip(("output", "dx", "dweight", "dbias"), *results, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            if not error < 0.02:
                layer = f"{self.layer.name} {self.layer.C}->{self.layer.O}"
                raise RuntimeError(f"{name} of layer {layer} differs by {error:.3g} from ours")

    def time(self, forward: Callable[..., Tensor]) -> tuple[float, float]:
        """Return milliseconds of forward and backward, after `check`."""
        self.check(forward)
        repeats = 3 if len(self.voxels) > 4_000_000 else 8
        return step_times(forward, [self.x, self.their_weight(), self.bias], False, repeats)


def measure_spconv(package: str, layer: Layer, coords: Tensor) -> tuple[float, float]:
    """Return milliseconds of forward and backward of spconv's submanifold convolution.

    It runs in fp16, because spconv has no bf16. Its table of pairs is made beforehand.

    Args:
        package: "spconv", or "spconv_triton", which has the same interface.
        layer: The layer.
        coords: Its voxels or blocks.

    Raises:
        RuntimeError: If its results are not ours.
    """
    spconv = importlib.import_module(f"{package}.pytorch")
    inputs = PeerInputs.draw(layer, coords, torch.float16)
    side = inputs.side
    module = spconv.SubMConv3d(layer.C, layer.O, 3, bias=True, indice_key="pairs").cuda().half()
    pairs: dict = {}

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        rows = inputs.source(x)
        source = spconv.SparseConvTensor(rows, inputs.voxels, [side] * 3, 1, indice_dict=pairs)
        parameters = {"weight": w, "bias": b}
        return torch.func.functional_call(module, parameters, (source,)).features

    return inputs.time(forward)


def measure_flex_gemm(layer: Layer, coords: Tensor) -> tuple[float, float]:
    """Return milliseconds of forward and backward of FlexGEMM's submanifold convolution.

    It runs in bf16, with its masked implicit product. Its tables are made beforehand, and its tiles
    are chosen at the first call.

    Raises:
        RuntimeError: If its results are not ours.
    """
    spconv = importlib.import_module("flex_gemm.ops.spconv")
    spconv.set_algorithm(spconv.Algorithm.MASKED_IMPLICIT_GEMM)
    inputs = PeerInputs.draw(layer, coords, torch.bfloat16)
    shape = torch.Size([1, layer.C, *([inputs.side] * 3)])
    cache = None

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        nonlocal cache
        rows = inputs.source(x)
        out, cache = spconv.sparse_submanifold_conv3d(rows, inputs.voxels, shape, w, b, cache)
        return out

    return inputs.time(forward)


def step_times(
    function: Callable[..., Tensor], inputs: list[Tensor], graph: bool, repeats: int
) -> tuple[float, float]:
    """Return milliseconds of forward and of backward."""
    cotangent = torch.randn_like(function(*inputs).detach())

    def step() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, cotangent)

    with torch.no_grad():
        forward = (
            graph_milliseconds(lambda: function(*inputs))
            if graph
            else milliseconds(lambda: function(*inputs), repeats)
        )
    both = graph_milliseconds(step) if graph else milliseconds(step, repeats)
    return forward, both - forward


def peak_gb(function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Return the peak memory of a step in GiB, without its inputs."""
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
    """Return the least possible milliseconds of forward and backward.

    The bound is the larger of two times: the arithmetic of existing pairs, and reading and writing
    every row once.
    """
    flop = 2 * pairs * layer.C * layer.O
    read, write = 2 * rows_in * layer.C, 2 * rows_out * layer.O
    forward = max(flop / rates["flop"], (read + write) / rates["byte"])
    backward = max(2 * flop / rates["flop"], (2 * read + write) / rates["byte"])
    return forward * 1e3, backward * 1e3


def measure(layer: Layer, coords: Tensor, rates: dict[str, float], with_torch: bool) -> dict:
    """Return one row of the table.

    Rows are bf16 and master weights fp32. Neighbour tables are made beforehand for every peer.
    """
    neighbors = neighbor_map(coords)
    rows = len(coords) * layer.size**3
    rows_in = rows // 8 if layer.upsample else rows
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((rows_in, layer.C), (27, layer.C, layer.O), (layer.O,))
    x, weight, bias = (torch.randn(*shape, device="cuda", generator=generator) for shape in shapes)
    inputs = [x.bfloat16(), weight * (27 * layer.C) ** -0.5, bias]

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return sparse_conv(x, w, b, neighbors, size=layer.size, upsample=layer.upsample)

    ours(*(t.requires_grad_() for t in inputs)).sum().backward()  # chooses the tile sizes
    inputs = [t.detach() for t in inputs]
    present = float((neighbors >= 0).double().sum())
    if layer.size > 1:
        # Shares of a block's taps that lie, on one axis, in the block before, itself and after.
        outside = 1 / (3 * layer.size)
        share = torch.tensor([outside, 1 - 2 * outside, outside], device="cuda")
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
    if with_torch:
        row |= measure_torch(layer, inputs, neighbors)
    return row


def measure_torch(layer: Layer, inputs: list[Tensor], neighbors: Tensor) -> dict:
    """Time gathered products, and for full blocks cuDNN on each block with its surroundings.

    All tensors are bf16.
    """
    low = [t.bfloat16() for t in inputs]
    result = {}
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


PEER_COLUMNS = ("gather", "halo", "spconv", "spconv_triton", "flex_gemm")


def table(rows: list[dict], rates: dict[str, float]) -> str:
    """Return a Markdown table of times, bounds, peers, rates and memory."""
    lines = [
        "| layer | rows | ours f/b ms | floor f/b | of it | gather f/b | halo f/b | spconv f/b "
        "| spconv-triton f/b | FlexGEMM f/b | gain | TFLOP/s 27 taps, executed (of peak) | GB/s "
        "| GB, gather's |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "/".join(
            f"{100 * f / t:.0f}%" for f, t in zip(row["floor"], row["ours"], strict=True)
        )
        peers = [sum(row[name]) for name in PEER_COLUMNS if row.get(name)]
        gain = f"{min(peers) / sum(row['ours']):.2f}x" if peers else "-"
        of_peak = 100e12 * row["tflops"] / rates["flop"]
        gather_gb = row.get("gather_gb", float("nan"))
        columns = [
            row["layer"],
            row["rows"],
            milliseconds_pair(row["ours"]),
            milliseconds_pair(row["floor"]),
            share,
            *(milliseconds_pair(row.get(peer)) for peer in PEER_COLUMNS),
            gain,
            f"{row['dense_tflops']:.0f}, {row['tflops']:.0f} ({of_peak:.0f}%)",
            f"{row['gb_per_s']:.0f}",
            f"{row['peak_gb']:.2f}, {gather_gb:.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)


def time_convolutions(cfg: ConvConfig) -> None:
    """Print tables and write conv.json.

    Raises:
        UserError: If there is no GPU, or a resolution or layer is unknown.
    """
    require_gpu()
    unknown = [R for R in cfg.resolutions if R not in RESOLUTIONS]
    if unknown:
        raise UserError(f"resolutions must be of {list(RESOLUTIONS)}, got {unknown}")
    unknown = [number for number in cfg.layers if not 0 <= number < len(LAYERS)]
    if unknown:
        raise UserError(f"layers must be from 0 to {len(LAYERS) - 1}, got {unknown}")
    rates = peak_rates()
    result: dict = {**gpu_and_versions(), "ceilings": rates}
    sys.stdout.write(", ".join(f"{k} {v}" for k, v in result.items()) + "\n")
    cfg.out.mkdir(parents=True, exist_ok=True)
    reference_conv._MAX_GATHERED = 1 << 30  # slices that occupy a GPU

    def save() -> None:
        write_atomically(cfg.out / "conv.json", json.dumps(result, indent=1) + "\n")

    layers = [LAYERS[number] for number in cfg.layers]
    sets = {}
    for R in cfg.resolutions:
        levels = {1: active_voxels(R, RESOLUTIONS[R])}
        for level in (2, 4, 8):
            levels[level] = parent_voxels(levels[level // 2]).coords_P4
        share = len(levels[1]) / len(levels[8]) / 512
        sizes = ", ".join(f"R/{level} {len(coords)}" for level, coords in levels.items())
        sys.stdout.write(f"R = {R}: {sizes}; {share:.0%} active\n")
        sets[R] = levels
        result[str(R)] = []
        for layer in layers:
            row = measure(layer, levels[layer.level], rates, "torch" in cfg.peers)
            result[str(R)].append(row)
            torch.cuda.empty_cache()
            save()
    errors = set()
    # These come last, because a failure may leave the device unusable.
    others = {
        "flex_gemm": measure_flex_gemm,
        "spconv_triton": partial(measure_spconv, "spconv_triton"),
        "spconv": partial(measure_spconv, "spconv"),
    }
    for name, measure_peer in others.items():
        if name not in cfg.peers:
            continue
        for R, levels in sets.items():
            for layer, row in zip(layers, result[str(R)], strict=True):
                try:
                    row[name] = measure_peer(layer, levels[layer.level])
                except (ImportError, RuntimeError, KeyError) as failure:
                    errors.add(f"{name}: {type(failure).__name__}: {str(failure)[:200]}\n")
                torch.cuda.empty_cache()
                save()
    for R in cfg.resolutions:
        sys.stdout.write(f"\nR = {R}\n\n{table(result[str(R)], rates)}\n")
    sys.stdout.writelines(sorted(errors))
