"""The reference definitions against loops over tokens, and their gradients against differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kernels import block_mean, spatial_sparse_attention, token_order
from kernels.attention import reference
from tests.kernel_inputs import random_coords, random_index

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the definitions are tested on the CPU"
)


def inputs(index, H=4, G=2, D=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N, P = index.num_tokens, index.num_compressed
    shapes = ((N, H, D), (N, G, D), (N, G, D), (P, G, D), (P, G, D), (N, 3))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def softmax_over(q, keys, values, scale):
    weights = [math.exp(scale * float(q @ k)) for k in keys]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("backend", ["reference", "auto"])  # "auto": block by block on a CPU
@pytest.mark.parametrize("shifted", [False, True])
def test_spatial_sparse_attention_is_what_the_paper_says(shifted, backend):
    tokens, top_k = [25, 0, 12], 2
    index = random_index(tokens, 16)
    coords = random_coords(tokens, 16)
    coords = coords[token_order(coords)].tolist()
    q, k, v, ck, cv, gates = inputs(index)
    out = spatial_sparse_attention(
        *(q, k, v, ck, cv, gates, index), top_k=top_k, shifted=shifted, scale=0.3, backend=backend
    )
    block = [(b, x // 8, y // 8, z // 8) for b, x, y, z in coords]
    cell = [(b, x // 4, y // 4, z // 4) for b, x, y, z in coords]
    s = 4 if shifted else 0
    window = [(b, (x + s) // 8, (y + s) // 8, (z + s) // 8) for b, x, y, z in coords]
    cells = sorted(set(cell), key=cell.index)
    for n in range(len(coords)):
        same_asset = [c for c in range(len(cells)) if cells[c][0] == coords[n][0]]
        for h in range(4):
            g = h // 2
            compressed = softmax_over(
                q[n, h], [ck[c, g] for c in same_asset], [cv[c, g] for c in same_asset], 0.3
            )
            score = {}
            for head in (2 * g, 2 * g + 1):
                weights = [math.exp(0.3 * float(q[n, head] @ ck[c, g])) for c in same_asset]
                for c, w in zip(same_asset, weights, strict=True):
                    owner = (cells[c][0], *(i // 2 for i in cells[c][1:]))
                    score[owner] = score.get(owner, 0.0) + w / sum(weights)
            best = sorted(score, key=score.get, reverse=True)[:top_k]
            chosen = [m for m in range(len(coords)) if block[m] in best]
            near = [m for m in range(len(coords)) if window[m] == window[n]]
            selected = softmax_over(
                q[n, h], [k[m, g] for m in chosen], [v[m, g] for m in chosen], 0.3
            )
            windowed = softmax_over(q[n, h], [k[m, g] for m in near], [v[m, g] for m in near], 0.3)
            weight = torch.sigmoid(gates[n])
            expected = weight[0] * compressed + weight[1] * selected + weight[2] * windowed
            assert torch.allclose(out[n, h], expected, atol=1e-12)


def test_slices_do_not_change_the_result(monkeypatch):
    index = random_index([60, 30], 16)
    x = inputs(index)
    whole = spatial_sparse_attention(*x, index, top_k=3)
    monkeypatch.setattr(reference, "_MAX_SCORES", 400)
    assert torch.allclose(spatial_sparse_attention(*x, index, top_k=3), whole, atol=1e-13)


@pytest.mark.parametrize("plus_one", [False, True])
def test_block_mean_of_positions(plus_one):
    index = random_index([30], 8)
    x = torch.arange(30.0)[:, None]
    starts = index.compressed_starts.tolist()
    expected = [sum(range(a, b)) / (b - a + plus_one) for a, b in itertools.pairwise(starts)]
    assert torch.allclose(block_mean(x, index, plus_one=plus_one)[:, 0], torch.tensor(expected))


def test_gradients_of_ssa_with_compression_pass_gradcheck():
    index = random_index([14, 0, 6], 12, select_block=4, compress_block=2)
    q, k, v, _, _, gates = inputs(index, H=2, G=1, D=4)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    selected = reference.select_blocks(
        q, reference.block_mean(k[:, 0], index)[:, None], index, 2, 0.5
    )

    def whole(q, k, v, gates, weight):
        ck, cv = (
            block_mean(torch.nn.functional.silu(x[:, 0] @ w), index)[:, None]
            for x, w in ((k, weight[0]), (v, weight[1]))
        )
        options = {"top_k": 2, "shifted": True, "scale": 0.5}
        return reference.spatial_sparse_attention(
            (q, k, v, ck, cv, gates), index, **options, selected_GNT=selected
        )

    x = [t.clone().requires_grad_() for t in (q, k, v, gates, weight)]
    assert torch.autograd.gradcheck(whole, x, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_top_blocks_against_sorting(top_k):
    index = random_index([40, 0, 25], 24)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(
        0, 4, (2, 65, index.max_blocks), generator=generator
    ).double()  # many ties
    selected = reference.top_blocks(scores, index, top_k)
    assert selected.shape == (2, 65, min(top_k, index.max_blocks))
    for g in range(2):
        for n in range(65):
            asset = int(index.asset_of[n])
            first, last = (int(index.asset_blocks[asset + i]) for i in (0, 1))
            ranked = sorted(range(first, last), key=lambda b: (-float(scores[g, n, b - first]), b))[
                :top_k
            ]
            expected = sorted(ranked) + [-1] * (selected.shape[2] - len(ranked))
            assert selected[g, n].tolist() == expected
