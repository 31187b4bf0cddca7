"""Sparse convolution against the dense convolution of torch in fp64: values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import duplicate_children, neighbor_map, sparse_conv
from kernels.conv import reference as reference_conv
from kernels.conv.gather_gemm import TileSizes, plain_taps, power_of_2
from kernels.conv.sparse_conv import _upsample_weight, _upsample_weight_grad
from kernels.conv.sparse_conv_backward import GradTileSizes, weight_grad
from tests.kernel_inputs import DEVICE, assert_close_as, random_coords

CASES = [("reference", torch.float64), ("triton", torch.float32)]
HALF = [("triton", torch.float16)]
# The interpreter computes bf16 wrongly.
HALF += [("triton", torch.bfloat16)] if DEVICE == "cuda" else []
CASES += HALF if DEVICE == "cuda" else []
SETS = {  # blocks (voxels for size 1) per asset, side of their grid
    "sparse": ([14, 0, 6], 4),
    "full": ([8], 2),
    "alone": ([1], 2),
    "none": ([0, 0], 3),
}


@pytest.fixture(autouse=True)
def default_tiles(monkeypatch):
    """Take the default tile sizes: measure nothing and read no cache."""
    for module in ("gather_gemm", "sparse_conv_backward"):
        monkeypatch.setattr(
            f"kernels.conv.{module}.choose", lambda key, candidates, *rest: candidates[0]
        )


@pytest.fixture
def large_tiles(monkeypatch):
    """Use large tiles in the interpreter, where each step costs milliseconds whatever its size."""
    if DEVICE == "cpu":
        patch_tiles(monkeypatch, 128, 128, 128, 4)


def patch_tiles(
    monkeypatch, rows: int, outputs: int, channels: int, taps: int, by_tap: bool = False
) -> None:
    def forward(C, O, dtype, warpgroup):
        return [TileSizes(rows, power_of_2(O, 16, outputs), power_of_2(C, 16, channels), 4, 2)]

    def backward(C, O, dtype, warpgroup):
        return [
            GradTileSizes(
                taps, power_of_2(C, 16, channels), power_of_2(O, 16, outputs), rows, 4, 2, by_tap
            )
        ]

    monkeypatch.setattr("kernels.conv.gather_gemm.forward_tiles", forward)
    monkeypatch.setattr("kernels.conv.sparse_conv_backward.grad_tiles", backward)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(DEVICE, dtype)


def voxels(coords: Tensor, size: int) -> Tensor:
    """Coordinates of the rows of full blocks: int64 [M * size^3, 4]."""
    local = torch.tensor(list(itertools.product(range(size), repeat=3)), device=coords.device)
    local = F.pad(local, (1, 0))
    scale = torch.tensor([1, size, size, size], device=coords.device)
    return (coords.long()[:, None] * scale + local).view(-1, 4)


def dense_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, coords: Tensor, size: int, upsample: bool
) -> Tensor:
    """conv3d over the whole grid, read at the existing voxels."""
    if upsample:
        half = voxels(coords, size // 2)
        fine = half[:, None] * torch.tensor([1, 2, 2, 2], device=x.device)
        fine = fine + F.pad(
            torch.tensor(list(itertools.product((0, 1), repeat=3)), device=x.device), (1, 0)
        )
        source, x = fine.view(-1, 4), x.repeat_interleave(8, 0)
    else:
        source = voxels(coords, size)
    target = voxels(coords, size)
    if not len(target):
        return (
            x.new_empty(0, weight.shape[2])
            + x.sum()
            + weight.sum() * 0
            + (0 if bias is None else bias.sum() * 0)
        )
    shape = [*(target.amax(0) + 1).tolist(), x.shape[1]]
    grid = x.new_zeros(shape).index_put(tuple(source.T), x).permute(0, 4, 1, 2, 3)
    kernel = weight.unflatten(0, (3, 3, 3)).permute(4, 3, 0, 1, 2)
    out = F.conv3d(grid, kernel, bias, padding=1).permute(0, 2, 3, 4, 1)
    return out[tuple(target.T)]


def run(function, inputs: list[Tensor | None]) -> list[Tensor]:
    """Value and gradients for one cotangent."""
    inputs = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    value.backward(draw(*value.shape, seed=9).to(torch.bfloat16).to(value.dtype))
    return [value.detach(), *(x.grad for x in inputs if x is not None)]


def check(C, O, coords, size, upsample, backend, dtype, bias=True) -> None:
    neighbors = neighbor_map(coords)
    rows = len(coords) * (size // 2 if upsample else size) ** 3
    inputs = [
        draw(rows, C, dtype=dtype),
        draw(27, C, O, seed=1, dtype=dtype),
        draw(O, seed=2, dtype=dtype),
    ]
    inputs[2] = inputs[2] if bias else None

    def ours(x, w, b, backend=backend):
        return sparse_conv(x, w, b, neighbors, size=size, upsample=upsample, backend=backend)

    results = run(ours, inputs)
    exact = run(
        lambda *x: dense_conv(*x, coords, size, upsample),
        [x if x is None else x.double() for x in inputs],
    )
    rounded = (
        results if dtype == torch.float64 else run(lambda *x: ours(*x, backend="reference"), inputs)
    )
    for name, f, e, r in zip(("value", "dx", "dw", "db"), results, exact, rounded, strict=False):
        if dtype == torch.float64:
            torch.testing.assert_close(
                f, e, rtol=1e-11, atol=1e-11 * max(1, C, O), msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert_close_as(f, e, r, name)


def fp32_inputs(rows: int, C: int, O: int) -> list[Tensor]:
    """Random x, weight and bias in fp32."""
    return [draw(*shape, dtype=torch.float32) for shape in ((rows, C), (27, C, O), (O,))]


def coords_of(name: str) -> Tensor:
    blocks, side = SETS[name]
    return random_coords(blocks, side, seed=4).to(DEVICE)


def case_id(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=case_id)
@pytest.mark.parametrize(
    ("size", "upsample", "blocks"),
    [
        *(
            (size, upsample, blocks)
            for size, upsample in ((1, False), (2, False), (2, True))
            for blocks in SETS
        ),
        *((4, upsample, blocks) for upsample in (False, True) for blocks in ("alone", "none")),
    ],
    ids=case_id,
)
def test_value_and_gradients(size, upsample, blocks, backend, dtype):
    check(5, 7, coords_of(blocks), size, upsample, backend, dtype)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("size", "upsample"), [(8, False), (8, True)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=case_id)
def test_blocks_of_512(size, upsample, backend, dtype):
    check(2, 3, random_coords([2, 1], (2, 1, 1)).to(DEVICE), size, upsample, backend, dtype)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("C", "O"), [(1, 1), (1, 65), (33, 1), (64, 32), (130, 512), (512, 34)])
@pytest.mark.parametrize(("size", "upsample"), [(1, False), (2, True)], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=case_id)
def test_channels(C, O, size, upsample, backend, dtype):
    if (backend, DEVICE) == ("triton", "cpu") and C * O > 4096:
        pytest.skip("minutes in the interpreter; runs on the GPU")
    check(C, O, random_coords([7, 5], 2).to(DEVICE), size, upsample, backend, dtype, bias=False)


@pytest.mark.parametrize(
    ("size", "upsample"), [(1, False), (2, False), (2, True), (4, True)], ids=str
)
def test_gradcheck(size, upsample):
    coords = random_coords([3, 2], 2)
    neighbors = neighbor_map(coords)
    x = draw(5 * (size // 2 if upsample else size) ** 3, 2)
    inputs = [t.cpu().requires_grad_() for t in (x, draw(27, 2, 3), draw(3))]
    assert torch.autograd.gradcheck(
        lambda x, w, b: sparse_conv(x, w, b, neighbors, size=size, upsample=upsample),
        inputs,
        fast_mode=True,
    )


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=case_id)
@pytest.mark.parametrize(("size", "upsample"), [(1, False), (2, True)], ids=str)
def test_half_precision(size, upsample, backend, dtype):
    check(33, 20, random_coords([7, 5], 2).to(DEVICE), size, upsample, backend, dtype)


@pytest.mark.parametrize(
    ("size", "upsample", "taps", "by_tap"),
    [(1, False, 2, False), (1, False, 4, True), (2, False, 2, True), (2, True, 4, True)],
    ids=str,
)
def test_many_tiles(size, upsample, taps, by_tap, monkeypatch):
    """Rows, channels, outputs and taps end inside a tile. The gradient has several parts."""
    patch_tiles(monkeypatch, 16, 16, 16, taps, by_tap)
    monkeypatch.setattr("kernels.conv.sparse_conv_backward._PROGRAMS", 1000)
    blocks = [3, 7 if size == 1 else 1]
    check(18, 17, random_coords(blocks, 3).to(DEVICE), size, upsample, "triton", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("C", "O"), [(32, 32), (64, 32), (64, 64), (100, 128)])
@pytest.mark.parametrize(("size", "upsample"), [(1, False), (4, False), (4, True)], ids=str)
def test_every_tile_size(C, O, size, upsample, monkeypatch):
    """All candidates give the fp64 result, to the tolerance of bf16."""
    coords = random_coords([90, 35], 6).to(DEVICE)
    for candidate in range(6):

        def choose(key, candidates, launch, like, kernels, candidate=candidate):
            return candidates[min(candidate, len(candidates) - 1)]

        for module in ("gather_gemm", "sparse_conv_backward"):
            monkeypatch.setattr(f"kernels.conv.{module}.choose", choose)
        check(C, O, coords, size, upsample, "triton", torch.bfloat16)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("size", "upsample"), [(1, False), (2, True)], ids=str)
def test_offsets_of_64_bits(size, upsample):
    coords = random_coords([7, 5], 2).to(DEVICE)
    neighbors = neighbor_map(coords)
    inputs = fp32_inputs(12, 4, 6)
    narrow, wide = (
        run(
            lambda x, w, b, f=f: torch.ops.sparse3d.sparse_conv(
                x, w, b, neighbors, size, upsample, f
            ),
            inputs,
        )
        for f in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_backward_is_bit_identical():
    coords = random_coords([20, 6], 3).to(DEVICE)
    neighbors = neighbor_map(coords)
    inputs = fp32_inputs(26, 9, 6)
    first, second = (
        run(lambda *x: sparse_conv(*x, neighbors, backend="triton"), inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_of_the_weight_gradient_add_up_in_order():
    neighbors = neighbor_map(random_coords([150], 7).to(DEVICE))
    x, dy = draw(150, 5, dtype=torch.float32), draw(150, 3, seed=1, dtype=torch.float32)
    whole = weight_grad(x, dy, neighbors, plain_taps(1), splits=1)
    parts = weight_grad(x, dy, neighbors, plain_taps(1), splits=3)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(parts, whole)  # the rows were really cut into parts


@pytest.mark.parametrize("upsample", [False, True])
def test_only_the_needed_gradients(upsample):
    neighbors = neighbor_map(random_coords([3], 2).to(DEVICE))
    inputs = fp32_inputs(3, 4, 2)
    size = 2 if upsample else 1
    everything = run(
        lambda *x: sparse_conv(*x, neighbors, size=size, upsample=upsample, backend="triton"),
        inputs,
    )
    for i in range(3):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        value = sparse_conv(*leaves, neighbors, size=size, upsample=upsample, backend="triton")
        value.backward(draw(*value.shape, seed=9).to(torch.bfloat16).to(value.dtype))
        assert torch.equal(leaves[i].grad, everything[1 + i])


def test_summed_taps():
    weight = draw(27, 3, 2, dtype=torch.float32).requires_grad_()
    summed = reference_conv.sum_upsample_taps(weight)
    torch.testing.assert_close(_upsample_weight(weight), summed, rtol=1e-6, atol=1e-6)
    cotangent = draw(8, 8, 3, 2, seed=1, dtype=torch.float32)
    summed.backward(cotangent)
    torch.testing.assert_close(_upsample_weight_grad(cotangent), weight.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"] if DEVICE == "cuda" else ["reference"])
def test_master_weights_and_autocast(backend):
    coords = random_coords([9], 3).to(DEVICE)
    neighbors = neighbor_map(coords)
    x, w, b = fp32_inputs(9, 4, 6)
    w.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = sparse_conv(x, w, b, neighbors, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert torch.equal(y, sparse_conv(x.bfloat16(), w, b, neighbors, backend=backend))


def test_as_a_custom_operator():
    neighbors = neighbor_map(random_coords([3, 2], 2).to(DEVICE))
    for size, upsample, rows in ((1, False, 5), (2, True, 5)):
        x, w, b = (
            draw(*shape, dtype=torch.float32).requires_grad_()
            for shape in ((rows, 2), (27, 2, 3), (3,))
        )
        arguments = (x, w, b, neighbors, size, upsample, False)
        torch.library.opcheck(torch.ops.sparse3d.sparse_conv.default, arguments)
        compiled = torch.compile(
            lambda x, w, b, s=size, u=upsample: sparse_conv(
                x, w, b, neighbors, size=s, upsample=u, backend="triton"
            ),
            fullgraph=True,
            backend="aot_eager",
        )
        assert torch.equal(compiled(x, w, b), torch.ops.sparse3d.sparse_conv(*arguments))


def test_rows_gathered_in_slices(monkeypatch):
    monkeypatch.setattr("kernels.conv.reference._MAX_GATHERED", 27 * 5 * 4)
    check(5, 7, coords_of("sparse"), 1, False, "reference", torch.float64)


def test_duplicate_children():
    coords = random_coords([3, 2], 2).to(DEVICE)
    for size in (2, 4, 8):
        half = voxels(coords, size // 2)
        expected = voxels(coords, size) // torch.tensor([1, 2, 2, 2], device=DEVICE)
        assert torch.equal(duplicate_children(half.double(), size).long(), expected)


def valid_arguments() -> dict:
    return dict(
        x=torch.zeros(16, 3),
        w=torch.zeros(27, 3, 2),
        b=torch.zeros(2),
        n=torch.zeros(2, 27).int(),
        size=2,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(15, 3)},
            r"x_NC must be floating \[16, C\], got torch.float32 \[15, 3\]",
        ),
        ({"x": torch.zeros(16, 3).int()}, r"x_NC must be floating \[16, C\], got torch.int32"),
        ({"w": torch.zeros(26, 3, 2)}, r"weight_27CO must be \[27, 3, O\], got \[26, 3, 2\]"),
        (
            {"w": torch.zeros(27, 3, 2).half()},
            "weight_27CO must be torch.float32 as x_NC .*got torch.float16",
        ),
        ({"b": torch.zeros(3)}, r"bias_O must be \[2\], got \[3\]"),
        ({"n": torch.zeros(2, 27)}, r"neighbors_M27 must be int32 \[M, 27\], got torch.float32"),
        (
            {"n": torch.zeros(2, 27, device="meta").int()},
            "neighbors_M27 must be on x_NC's device cpu, got meta",
        ),
        ({"size": 3}, r"size must be one of \(1, 2, 4, 8\), got 3"),
        ({"size": 1, "upsample": True}, r"size must be one of \(2, 4, 8\), got 1"),
        ({"backend": "cuda"}, "backend must be .*got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = valid_arguments() | change
    x, w, b, n = (arguments.pop(name) for name in "xwbn")
    with pytest.raises(ValueError, match=message):
        sparse_conv(x, w, b, n, **arguments)


def test_bad_duplication_is_named():
    with pytest.raises(ValueError, match=r"size must be one of \(2, 4, 8\), got 1"):
        duplicate_children(torch.zeros(8, 2), 1)
    with pytest.raises(ValueError, match=r"x_NC must be \[M \* 8, C\], got \[7, 2\]"):
        duplicate_children(torch.zeros(7, 2), 4)
