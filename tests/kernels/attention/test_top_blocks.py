"""Block scores against the reference, and the exact top-k of given scores."""

from __future__ import annotations

import pytest
import torch

from kernels import select_blocks
from kernels.attention import reference
from kernels.attention.block_score import block_score
from kernels.attention.inverse_lists import chunk_ranges, new_ranks
from kernels.attention.top_blocks import choose_groups, rank_dtype, top_blocks
from tests.kernel_inputs import DEVICE, assert_close_as, random_index


def by_kernel(
    scores_GNM: torch.Tensor, index, top_k: int, groups: int | None = None
) -> torch.Tensor:
    G, N, _ = scores_GNM.shape
    selected = torch.full(
        (G, N, min(top_k, index.max_blocks)), 7777, dtype=torch.int32, device=DEVICE
    )
    top_blocks(scores_GNM, index, selected, groups=groups)
    return selected


@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "tiny", "one large", "infinite"])
@pytest.mark.parametrize(("top_k", "groups"), [(1, 0), (2, 0), (7, 0), (50, 0), (1, 4), (7, 8)])
def test_equals_sorting(kind, top_k, groups):
    index = random_index([40, 0, 25, 1], 24)
    generator = torch.Generator().manual_seed(top_k)
    shape = (2, 66, index.max_blocks)
    scores = {
        "random": torch.rand(shape, generator=generator),
        "ties": torch.randint(0, 3, shape, generator=generator).float(),
        "zeros": torch.zeros(shape),
        "tiny": torch.rand(shape, generator=generator) * 1e-44,  # subnormal
        "one large": torch.zeros(shape).index_fill_(2, torch.tensor([3]), 16.0),
        "infinite": torch.rand(shape, generator=generator).index_fill_(
            2, torch.tensor([2]), float("inf")
        ),
    }[kind].to(DEVICE)
    selected = by_kernel(scores, index, top_k, groups)
    assert torch.equal(selected, reference.top_blocks(scores, index, top_k))


@pytest.mark.parametrize(
    ("values", "top_k", "groups"), [(2, 8, 8), (5, 8, 16), (1000, 5, 16), (30, 30, 32)]
)
def test_groups_change_no_choice(values, top_k, groups):
    """With few different values, most groups have the same largest score."""
    index = random_index([70, 30], 64)
    assert index.max_blocks > 2 * groups
    generator = torch.Generator().manual_seed(values)
    shape = (2, 100, index.max_blocks)
    scores = torch.randint(0, values, shape, generator=generator).float().to(DEVICE)
    (all_queries,) = chunk_ranges(index, 1, 1 << 30)
    ranks = [new_ranks(index, all_queries, 2, top_k) for _ in range(2)]
    for x, n in zip(ranks, (0, groups), strict=True):
        selected = torch.empty(2, 100, top_k, dtype=torch.int32, device=DEVICE)
        top_blocks(scores, index, selected, x, groups=n)
        assert torch.equal(selected, reference.top_blocks(scores, index, top_k))
    assert ranks[0].any()
    assert torch.equal(*ranks)


@pytest.mark.parametrize(
    ("columns", "top_k", "groups"),
    [
        (256, 8, 0),
        (257, 8, 128),
        (493, 8, 128),
        (493, 32, 0),
        (914, 8, 256),
        (4760, 8, 512),
        (16384, 32, 512),
        (4760, 300, 0),
        (914, 64, 0),
    ],
)
def test_long_rows_are_narrowed_by_groups(columns, top_k, groups):
    assert choose_groups(columns, top_k) == groups


@pytest.mark.timeout(60)  # a wrong bisection would never end
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000], ids=hex)
def test_not_a_number_is_above_all(bits, groups):
    """A NaN of GPU arithmetic has all bits set, one of CPU arithmetic a single bit."""
    index = random_index([40, 0, 25, 1], 24)
    scores = torch.rand(2, 66, index.max_blocks, generator=torch.Generator().manual_seed(0))
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    scores[:, ::3, 2], scores[:, ::5], scores[:, 7, 1] = nan, nan, torch.inf
    scores = scores.to(DEVICE)
    selected = by_kernel(scores, index, 3, groups)
    assert torch.equal(selected, reference.top_blocks(scores, index, 3))


@pytest.mark.parametrize("top_k", [8, 300])
def test_many_blocks(top_k):
    index = random_index([700 if DEVICE == "cpu" else 20000], 128)
    assert index.max_blocks > 300
    scores = torch.rand(1, 24, index.max_blocks, generator=torch.Generator().manual_seed(0)).to(
        DEVICE
    )
    selected = torch.empty(1, index.num_tokens, top_k, dtype=torch.int32, device=DEVICE)
    top_blocks(scores, index, selected)
    whole = torch.zeros(1, index.num_tokens, index.max_blocks, device=DEVICE)
    whole[:, :24] = scores
    assert torch.equal(selected[:, :24], reference.top_blocks(whole, index, top_k)[:, :24])


@pytest.mark.parametrize(
    ("top_k", "dtype"), [(255, torch.uint8), (256, torch.int16), (1 << 15, torch.int32)]
)
def test_ranks_fit(top_k, dtype):
    assert rank_dtype(top_k) == dtype
    assert torch.iinfo(dtype).max >= top_k


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []),
    ids=str,
)
@pytest.mark.parametrize(
    ("select", "compress", "tokens"),
    [(8, 4, 50), (8, 1, 50), pytest.param(16, 1, 150, id="a block of several tiles")],
)
def test_scores(select, compress, tokens, dtype):
    index = random_index([tokens, 20], 16, select_block=select, compress_block=compress)
    N = index.num_tokens
    generator = torch.Generator().manual_seed(0)
    q, ck = (
        torch.randn(n, h, 16, generator=generator).to(DEVICE, dtype)
        for n, h in ((N, 4), (index.num_compressed, 2))
    )
    logits = reference._scores(q.double(), ck.double(), 0.25)
    same = index.asset_of[:, None] == index.compressed_asset
    lse = logits.masked_fill(~same, -torch.inf).logsumexp(2).T.contiguous() * 1.4426950408889634
    scores = block_score(q, ck, lse.float(), index, 0.25)
    exact = reference.block_scores(q.double(), ck.double(), index, 0.25)
    rounded = reference.block_scores(q, ck, index, 0.25).float()
    exists = exact >= 0
    zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
    assert_close_as(
        torch.where(exists, scores, zero.float()),
        torch.where(exists, exact, zero),
        torch.where(exists, rounded, zero.float()),
    )
    # Scores are summed to at least 16 bits in every dtype. Near ties must not depend on a sum in
    # half precision.
    assert (scores - exact)[exists].abs().max() <= 2**-13 * exact.max()
    ranges = [
        block_score(q, ck, lse.float(), index, 0.25, a, b) for a, b in ((0, 13), (13, 58), (58, N))
    ]
    parts = torch.where(exists, torch.cat(ranges, 1), zero.float())
    assert torch.allclose(parts, torch.where(exists, scores, zero.float()), rtol=1e-5)


def test_more_blocks_than_an_asset_has_leave_nothing_unwritten():
    index = random_index([40, 40], 64)
    most = index.max_blocks
    assert 32 < most < 64 < index.num_blocks  # the kernel's columns are a power of two
    q, ck = (
        torch.randn(80, 2, 16, device=DEVICE),
        torch.randn(index.num_compressed, 1, 16, device=DEVICE),
    )
    selected = select_blocks(q, ck, index, top_k=80, backend="triton")
    assert torch.equal(
        selected[..., :most], select_blocks(q, ck, index, top_k=80, backend="reference")
    )
    assert (selected[..., most:] == -1).all()


def test_selection_finds_the_planted_block():
    index = random_index([80], 16)
    q = torch.zeros(80, 2, 16, device=DEVICE)
    q[:, :, 0] = 8.0
    ck = torch.zeros(index.num_compressed, 1, 16, device=DEVICE)
    ck[index.compressed_block == 5, :, 0] = 1.0
    assert (select_blocks(q, ck, index, top_k=1, backend="triton") == 5).all()
