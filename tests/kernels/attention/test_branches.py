"""Each public part of SSA against its fp64 reference."""

from __future__ import annotations

import pytest
import torch

from kernels import (
    BlockIndex,
    block_mean,
    compressed_attention,
    gated_sum,
    select_blocks,
    selection_attention,
    spatial_sparse_attention,
    token_order,
    window_attention,
)
from kernels.attention import reference
from kernels.attention.inverse_lists import ITEM
from tests.kernel_inputs import DEVICE, assert_no_worse, random_index, run

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "C"), [([30, 0, 40], 64), ([70], 130), ([0], 8)])
def test_block_mean(tokens, C, dtype):
    index = random_index(tokens, 8 if tokens == [70] else 16)
    x = draw(C, sum(tokens), dtype=dtype).T  # not contiguous
    for plus_one in (False, True):
        assert_no_worse(
            lambda x, p=plus_one: block_mean(x, index, plus_one=p, backend="triton"),
            lambda x, p=plus_one: reference.block_mean(x, index, p),
            [x],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "side", "H", "G"), [([30, 0, 20], 16, 4, 2), ([600], 9, 1, 1)]
)  # 600: split sums
def test_compressed(tokens, side, H, G, dtype):
    index = random_index(tokens, side)
    N, P = index.num_tokens, index.num_compressed
    x = [draw(N, H, 16, dtype=dtype), *(draw(P, G, 16, dtype=dtype, seed=seed) for seed in (1, 2))]
    assert_no_worse(
        lambda *x: compressed_attention(*x, index, backend="triton"),
        lambda *x: reference.compressed_attention(*x, index, 0.25),
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shifted", "window"), [(False, 8), (True, 8), (False, 6)])
def test_window(shifted, window, dtype):
    index = random_index([30, 0, 20], (12, 12, 8), window=window)
    x = [
        draw(50, 2, 16, dtype=dtype),
        draw(50, 2, 16, dtype=dtype, seed=1),
        draw(50, 2, 16, dtype=dtype, seed=2),
    ]
    assert_no_worse(
        lambda *x: window_attention(*x, index, shifted=shifted, backend="triton"),
        lambda *x: reference.window_attention(*x, index, shifted, 0.25),
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES[:1] if DEVICE == "cpu" else DTYPES, ids=str)
def test_windows_that_end_around_the_border_of_a_tile(dtype):
    sizes = [1, 31, 32, 33, 63, 64, 65]
    cell = torch.cartesian_prod(*[torch.arange(8)] * 3)
    offset = torch.tensor([8, 0, 0])
    xyz = torch.cat([cell[:size] + offset * i for i, size in enumerate(sizes)])
    coords = torch.cat([torch.zeros(len(xyz), 1, dtype=torch.int64), xyz], 1)
    index = BlockIndex.from_coords(coords[token_order(coords)].to(DEVICE), 1)
    assert torch.diff(index.window_starts).tolist() == sizes
    x = [draw(len(xyz), 1, 16, dtype=dtype, seed=seed) for seed in range(3)]
    assert_no_worse(
        lambda *x: window_attention(*x, index, backend="triton"),
        lambda *x: reference.window_attention(*x, index, False, 0.25),
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_takes_any_order_and_repeats(dtype):
    index = random_index([25, 0, 15], (16, 16, 8))
    x = [
        draw(40, 4, 16, dtype=dtype),
        draw(40, 2, 16, dtype=dtype, seed=1),
        draw(40, 2, 16, dtype=dtype, seed=2),
    ]
    first, last = (index.asset_blocks[index.asset_of + i][:, None] for i in (0, 1))
    draws = torch.rand(2, 40, 4, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    selected = (first + draws * (last - first)).int()
    selected[..., 2] = selected[..., 0]
    selected[:, ::3, 3] = -1
    selected[:, 1::3, 3] = 10_000  # there is no such block; it is skipped
    clean = torch.where((selected >= 0) & (selected < index.num_blocks), selected, -1)
    assert_no_worse(
        lambda *x: selection_attention(*x, selected, index, backend="triton"),
        lambda *x: reference.selection_attention(*x, clean, index, 0.25),
        x,
    )
    reversed_order = selection_attention(*x, selected.flip(2), index, backend="triton")
    assert torch.equal(reversed_order, selection_attention(*x, selected, index, backend="triton"))
    blocks_of_another_asset = torch.where(
        selected >= 0, index.num_blocks - 1 - selected * 0, selected
    )
    mixed = torch.cat([selected, blocks_of_another_asset], 2)[:, :25]
    alone = selection_attention(
        *x, torch.cat([mixed, mixed[:, :15] * 0 - 1], 1), index, backend="triton"
    )
    assert torch.equal(alone[:25], reversed_order[:25])


def test_the_list_of_a_block_that_all_queries_select_is_cut_into_items():
    index = random_index([210], (16, 8, 8))
    x = [draw(210, 1, 16, seed=seed) for seed in range(3)]
    selected = torch.zeros(1, 210, 1, dtype=torch.int32, device=DEVICE)
    assert index.num_tokens > 2 * ITEM
    assert_no_worse(
        lambda *x: selection_attention(*x, selected, index, backend="triton"),
        lambda *x: reference.selection_attention(*x, selected, index, 0.25),
        x,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_sum(dtype):
    branches = [draw(9, 6, 16, dtype=dtype, seed=s) for s in range(3)]
    gates = draw(9, 3, dtype=dtype) * 4
    assert_no_worse(
        lambda a, b, c, g: gated_sum((a, b, c), g, backend="triton"),
        lambda a, b, c, g: reference.gated_sum((a, b, c), g),
        [*branches, gates],
    )


def test_the_cpu_path_is_the_reference():
    index = random_index([30, 10], 16)
    # The kernels do not take this head size.
    q, k, v = draw(40, 4, 10), draw(40, 2, 10, seed=1), draw(40, 2, 10, seed=2)
    selected = select_blocks(q, k[: index.num_compressed], index, top_k=2, backend="reference")
    out = selection_attention(q, k, v, selected, index, backend="reference")
    assert torch.equal(out, reference.selection_attention(q, k, v, selected, index, 10**-0.5))
    with pytest.raises(ValueError, match="head size in"):
        selection_attention(q, k, v, selected, index, backend="triton")


@pytest.mark.parametrize(
    ("H", "G", "D", "message"),
    [(2, 1, 33, "head size in .*got 33"), (15, 1, 16, "heads per key/value head, got 15 / 1")],
)
def test_every_device_refuses_the_sizes_that_the_kernels_refuse(H, G, D, message):
    """The default backend refuses on the CPU what it refuses on a GPU."""
    index = random_index([9, 4], 16)
    N, P = index.num_tokens, index.num_compressed
    q, k, v, ck, cv = (
        draw(rows, heads, D) for rows, heads in ((N, H), (N, G), (N, G), (P, G), (P, G))
    )
    selected = torch.zeros(G, N, 1, dtype=torch.int32, device=DEVICE)
    gates = draw(N, 3)
    calls = {
        "ssa": lambda **options: spatial_sparse_attention(
            q, k, v, ck, cv, gates, index, top_k=1, **options
        ),
        "compressed": lambda **options: compressed_attention(q, ck, cv, index, **options),
        "window": lambda **options: window_attention(q, k, v, index, **options),
        "select": lambda **options: select_blocks(q, ck, index, top_k=1, **options),
        "selection": lambda **options: selection_attention(q, k, v, selected, index, **options),
    }
    if D == 33:
        calls["gated_sum"] = lambda **options: gated_sum((q, q, q), gates, **options)
    for name, call in calls.items():
        for options in ({}, {"backend": "auto"}, {"backend": "triton"}):
            with pytest.raises(ValueError, match=message):
                call(**options)
        assert len(call(backend="reference")) == (G if name == "select" else N)


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        (
            torch.zeros(2, 39, 2, dtype=torch.int32),
            r"selected_GNT must be \[2, 40, T\].*got \[2, 39, 2\]",
        ),
        (torch.zeros(2, 40, 0, dtype=torch.int32), r"with T >= 1, got \[2, 40, 0\]"),
        (torch.zeros(2, 40, 2), r"selected_GNT must be int32 or int64.*got torch.float32"),
    ],
)
def test_bad_selections_are_named(selected, message):
    index = random_index([40], 16)
    with pytest.raises(ValueError, match=message):
        selection_attention(
            draw(40, 4, 16), draw(40, 2, 16), draw(40, 2, 16), selected.to(DEVICE), index
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: block_mean(draw(39, 4), i), r"x_NC must be \[40, C\].*got \[39, 4\]"),
        (
            lambda i: compressed_attention(draw(40, 4, 16), draw(1, 2, 16), draw(1, 2, 16), i),
            "ck_PGD must be",
        ),
        (
            lambda i: window_attention(draw(40, 4), draw(40, 2, 16), draw(40, 2, 16), i),
            r"q_NHD must be \[40, H, D\]",
        ),
        (lambda i: gated_sum((draw(4, 2, 16),) * 2, draw(4, 3)), "branches_3_NHD must be three"),
        (
            lambda i: gated_sum((draw(4, 2, 16),) * 3, draw(4, 2)),
            r"gates_N3 must be \[4, 3\], got \[4, 2\]",
        ),
        (
            lambda i: gated_sum((draw(4, 2, 16),) * 3, draw(4, 3).half()),
            "gates_N3 must be torch.float32",
        ),
        (
            lambda i: gated_sum((draw(4, 2, 48),) * 3, draw(4, 3), backend="triton"),
            "head size in .*, got 48",
        ),
        (
            lambda i: gated_sum(
                (draw(4, 2, 16).double(),) * 3, draw(4, 3).double(), backend="triton"
            ),
            "branches_3_NHD must be one of .*got torch.float64",
        ),
        (
            lambda i: block_mean(draw(40, 4).double(), i, backend="triton"),
            "x_NC must be one of .*got torch.float64",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_index([40], 16))


@pytest.mark.parametrize("kind", ["compressed", "window", "selection"])
def test_backward_is_bit_identical(kind):
    index = random_index([26], (16, 8, 8))
    q, k, v = draw(26, 4, 16), draw(26, 2, 16, seed=1), draw(26, 2, 16, seed=2)
    selected = torch.zeros(2, 26, 1, dtype=torch.int32, device=DEVICE)
    P = index.num_compressed
    function = {
        "compressed": lambda q, k, v: compressed_attention(
            q, k[:P], v[:P], index, backend="triton"
        ),
        "window": lambda q, k, v: window_attention(q, k, v, index, shifted=True, backend="triton"),
        "selection": lambda q, k, v: selection_attention(
            q, k, v, selected, index, backend="triton"
        ),
    }[kind]
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(function, [q, k, v]), run(function, [q, k, v]), strict=True)
    )
