"""Spatial sparse attention on a real GPU: graphs, synchronisation, devices and large inputs."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import BlockIndex, select_blocks, spatial_sparse_attention, token_order
from kernels.attention import reference
from tests.kernel_inputs import DEVICE, random_index, run
from tests.kernels.attention.test_ssa import check, make_inputs


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_step():
    index = random_index([3000, 500], 32)
    x = make_inputs(index, 32, 2, 32, torch.bfloat16)
    static = [t.clone().requires_grad_() for t in x]
    cotangent = torch.randn_like(x[0])

    def step(inputs):
        return torch.autograd.grad(
            spatial_sparse_attention(*inputs, index, top_k=3), inputs, cotangent
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    fresh = make_inputs(index, 32, 2, 32, torch.bfloat16, seed=5)
    with torch.no_grad():
        for a, b in zip(static, fresh, strict=True):
            a.copy_(b)
    graph.replay()
    expected = step([t.requires_grad_() for t in fresh])
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_forward_and_backward_do_not_wait_for_the_host():
    index = random_index([3000], 32)
    x = [t.requires_grad_() for t in make_inputs(index, 32, 2, 32, torch.bfloat16)]
    spatial_sparse_attention(*x, index).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        spatial_sparse_attention(*x, index, shifted=True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [3, 1000])
def test_any_device_index(top_k):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    index = random_index([300], 24)
    x = make_inputs(index, 4, 2, 32, torch.bfloat16)
    other = BlockIndex(*(t.to("cuda:1") for t in index.tensors()[:-1]), index.host)
    assert torch.cuda.current_device() == 0

    def step(inputs, where):
        def kernel(*x):
            return spatial_sparse_attention(*x, where, top_k=top_k, shifted=True)

        def operator(*x):
            return torch.ops.sparse3d.ssa(*x, where.tensors(), top_k, True, 32**-0.5)[0]

        def branches(q, k, v, ck, cv, gates):
            selected = select_blocks(q, ck, where, top_k=top_k)
            outs = (
                kernels.compressed_attention(q, ck, cv, where),
                kernels.selection_attention(q, k, v, selected, where),
            )
            return kernels.gated_sum((*outs, kernels.window_attention(q, k, v, where)), gates)

        return [t.cpu() for function in (kernel, operator, branches) for t in run(function, inputs)]

    moved = step([t.to("cuda:1") for t in x], other)
    assert all(torch.equal(a, b) for a, b in zip(moved, step(x, index), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top_k", [1, 8, 40])
def test_surface_like_sets_of_thousands(top_k, dtype):
    from benchmarks.token_sets import surface_coords

    coords = surface_coords(5000, 48)
    index = BlockIndex.from_coords(coords.to(DEVICE), 1)
    check(index, make_inputs(index, 32, 2, 32, dtype), top_k, shifted=True)


@pytest.mark.gpu
def test_a_million_tokens():
    x, y = torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij")
    sheets = [
        64 + 100 * i + (30 * torch.sin(x / 40 + i) * torch.cos(y / 50)).long() for i in range(4)
    ]
    coords = torch.cat([torch.stack([x * 0, x, y, z], -1).view(-1, 4) for z in sheets]).int()
    coords = coords[token_order(coords)]
    index = BlockIndex.from_coords(coords.to(DEVICE), 1)
    assert index.num_tokens > 1_000_000
    x = make_inputs(index, 32, 2, 32, torch.bfloat16)
    out, *grads = run(lambda *x: spatial_sparse_attention(*x, index, top_k=4), x)
    assert all(torch.isfinite(t).all() for t in (out, *grads))
    rows = torch.arange(0, index.num_tokens, 9973)
    selected = select_blocks(x[0], x[3], index, top_k=4)[:, rows].long()
    for i, n in enumerate(rows.tolist()[:40]):  # single queries, in fp64
        expected = one_query(x, index, n, selected[:, i])
        error = (out[n].double() - expected).abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * max(1.0, expected.abs().max().item())


def one_query(x, index, n, selected_GT):
    q, k, v, ck, cv, gates = (
        t.detach().double() if i in (3, 4) else t.detach() for i, t in enumerate(x)
    )
    row, gate, outs = q[n].double(), gates[n].double().sigmoid(), []
    window = index.window_of[n]
    for g in range(2):
        heads = row[16 * g : 16 * g + 16]
        blocks = selected_GT[g].tolist()
        selected = torch.cat(
            [
                torch.arange(index.block_starts[b], index.block_starts[b + 1], device=DEVICE)
                for b in blocks
            ]
        )
        near = torch.arange(
            index.window_starts[window], index.window_starts[window + 1], device=DEVICE
        )
        y = gate[0] * reference.attend(heads[None], ck[:, g : g + 1], cv[:, g : g + 1], 32**-0.5)[0]
        for weight, rows in ((gate[1], selected), (gate[2], near)):
            keys, values = k[rows, g : g + 1].double(), v[rows, g : g + 1].double()
            y = y + weight * reference.attend(heads[None], keys, values, 32**-0.5)[0]
        outs.append(y)
    return torch.cat(outs)
