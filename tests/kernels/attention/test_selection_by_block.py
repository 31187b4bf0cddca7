"""Selection block by block against the reference, and where it is taken."""

import pytest
import torch

from kernels import spatial_sparse_attention
from kernels.attention import reference, ssa
from kernels.attention.selection_by_block import selection_by_block
from tests.kernel_inputs import random_index


@pytest.mark.parametrize("tokens", [[300], [40, 0, 90], [0]])
@pytest.mark.parametrize(("H", "G", "top_k"), [(4, 2, 3), (2, 2, 1), (4, 1, 100)])
def test_it_is_the_reference(tokens, H, G, top_k):
    index = random_index(tokens, 24)
    N, P, D = index.num_tokens, index.num_compressed, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v, ck = (
        3 * torch.randn(n, heads, D, generator=generator, dtype=torch.float64)
        for n, heads in ((N, H), (N, G), (N, G), (P, G))
    )
    selected = reference.select_blocks(q, ck, index, top_k, 0.3)
    expected = reference.selection_attention(q, k, v, selected, index, 0.3)
    found = selection_by_block(q, k, v, selected, index, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_scores_far_apart_neither_overflow_nor_vanish():
    index = random_index([120], 24)
    q = torch.full((120, 1, 16), 30.0)
    k = torch.linspace(-30, 30, 120)[:, None, None].expand(120, 1, 16).contiguous()
    v = torch.arange(120.0)[:, None, None].expand(120, 1, 16).contiguous()
    selected = torch.arange(index.num_blocks, dtype=torch.int32).expand(1, 120, -1)
    found = selection_by_block(q, k, v, selected, index, 1.0)
    # The key of the last token has by far the largest score.
    torch.testing.assert_close(found, torch.full_like(found, 119.0))


@pytest.mark.parametrize(
    ("options", "taken"),
    [({}, True), ({"backend": "reference"}, False), ({"grad": True}, False)],
)
def test_it_is_taken_where_no_gradient_is_needed(options, taken, monkeypatch):
    index = random_index([60], 24)
    calls = []
    monkeypatch.setattr(
        ssa, "selection_by_block", lambda *args: calls.append(1) or selection_by_block(*args)
    )
    N, P = index.num_tokens, index.num_compressed
    shapes = ((N, 2, 16), (N, 1, 16), (N, 1, 16), (P, 1, 16), (P, 1, 16), (N, 3))
    inputs = [torch.randn(shape) for shape in shapes]
    inputs[0].requires_grad_(options.pop("grad", False))
    out = spatial_sparse_attention(*inputs, index, top_k=2, **options)
    assert out.requires_grad == inputs[0].requires_grad
    assert bool(calls) == taken
    with torch.no_grad():
        spatial_sparse_attention(*inputs, index, top_k=2)
    assert len(calls) == taken + 1
