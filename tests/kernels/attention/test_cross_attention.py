"""Cross-attention of ragged batches against its definition, with moderate and with large scores."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels import cross_attention
from kernels.attention import reference
from tests.kernel_inputs import DEVICE, assert_no_worse, run

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def segments_of(queries: list[int], keys: list[int]) -> list[Tensor]:
    """Return the asset of each query, the first query of each asset, and the same of the keys."""
    tensors = []
    for counts in (queries, keys):
        tensors.append(torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))
        tensors.append(torch.tensor([0, *itertools.accumulate(counts)]))
    return [x.int().to(DEVICE) for x in tensors]


def inputs_of(queries, keys, H, G, D, dtype, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    rows = (sum(queries), H), (sum(keys), G), (sum(keys), G)
    q, k, v = (torch.randn(n, heads, D, generator=generator) for n, heads in rows)
    return [x.to(DEVICE, dtype) for x in (q * spread, k, v)]


def check(inputs, segments):
    scale = inputs[0].shape[2] ** -0.5
    assert_no_worse(
        lambda *x: cross_attention(*x, *segments, backend="triton"),
        lambda *x: reference.cross_attention(*x, segments[1], segments[3], scale),
        inputs,
        "qkv",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "H", "G"),
    [([70, 0, 5], [40, 3, 70], 2, 2), ([1], [1], 1, 1), ([33, 31], [5, 64], 4, 2)],
    ids=str,
)
def test_value_and_gradients(queries, keys, H, G, dtype):
    check(inputs_of(queries, keys, H, G, 16, dtype), segments_of(queries, keys))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_large_scores(dtype, spread):
    """The gradient of large scores must not be folded: 2^-lse would overflow."""
    check(inputs_of([40, 20], [30, 9], 2, 2, 16, dtype, spread), segments_of([40, 20], [30, 9]))


def test_one_row_with_large_scores_leaves_the_others_as_exact():
    queries, keys = [40, 20], [30, 9]
    q, k, v = inputs_of(queries, keys, 2, 2, 16, DTYPES[-1])
    q[3] *= 1000.0
    check([q, k, v], segments_of(queries, keys))


@pytest.mark.gpu
def test_gradients_are_bit_identical_from_run_to_run():
    queries, keys = [5000, 3000], [700, 611]
    inputs = inputs_of(queries, keys, 32, 32, 32, torch.bfloat16)
    segments = segments_of(queries, keys)
    first, second = (run(lambda *x: cross_attention(*x, *segments), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(inputs, segments)


def test_bad_arguments_are_named():
    q, k, v = inputs_of([5], [3], 2, 2, 16, torch.float32)
    query_asset, query_starts, key_asset, key_starts = segments_of([5], [3])
    for arguments, message in [
        ((q, k[:2], v, query_asset, query_starts, key_asset, key_starts), r"k_SGD must be \[3, G"),
        ((q[:4], k, v, query_asset, query_starts, key_asset, key_starts), r"q_NHD must be \[5, H"),
        ((q, k, v, query_asset.long(), query_starts, key_asset, key_starts), "query_asset_N must"),
        ((q, k, v, query_asset, query_starts, key_asset, key_starts[:1]), r"key_starts_A1 must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            cross_attention(*arguments)
