"""The SSA module against its definition, computed token by token in fp64."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import token_order
from model.attention import CrossAttention, FullAttention, SpatialSparseAttention, ragged_attention
from model.image_tokens import ImageTokens
from model.kv_compression import CompressionV2, TokenLayout
from model.sparse_tensor import Level
from tests.kernel_inputs import assert_close_as, random_coords

torch.set_num_threads(1)
C, HEADS, KV_HEADS, D = 128, 4, 2, 32
TOLERANCE = 1e-10


def make_level(tokens, side, seed=0, device="cpu"):
    coords = random_coords(tokens, side, seed)
    coords = coords[token_order(coords)].to(device)
    return Level.from_coords(coords, max(side) if isinstance(side, tuple) else side, len(tokens))


def make_ssa(seed=0, **options):
    defaults = {
        "compress_block": 4,
        "compression": "v1",
        "top_k": 2,
        "shifted": False,
        "plus_one": False,
    }
    torch.manual_seed(seed)
    module = SpatialSparseAttention(C, HEADS, KV_HEADS, **{**defaults, **options}).double()
    for parameter in module.parameters():  # no parameter stays at zero or one
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def run(module, x_NC, level, m=4):
    """Apply the module to features in the level's order."""
    layout = TokenLayout.of(level, m)
    if layout.order is None:
        return module(x_NC, layout)
    return module(x_NC[layout.order], layout)[layout.inverse]


def key_of(xyz, size, shift=0):
    return tuple(int(c + shift) // size for c in xyz)


def grouped(coords, size, shift=0):
    groups = defaultdict(list)
    for row, xyz in enumerate(coords):
        groups[key_of(xyz, size, shift)].append(row)
    return groups


def slow_group_norm(x, norm):
    """Normalise one asset, x [n, E], in groups of channels."""
    groups = x.unflatten(1, (norm.groups, -1))
    mean, variance = (
        groups.mean((0, 2), keepdim=True),
        groups.var((0, 2), unbiased=False, keepdim=True),
    )
    return F.silu(((groups - mean) / (variance + 1e-5).sqrt()).flatten(1) * norm.weight + norm.bias)


def slow_conv(x, keys, conv):
    """Sum over the existing neighbours of each block, tap (dx + 1) * 9 + (dy + 1) * 3 + dz + 1."""
    row = {key: i for i, key in enumerate(keys)}
    out = conv.bias.expand(len(keys), -1).clone()
    for i, key in enumerate(keys):
        for tap, step in enumerate(itertools.product((-1, 0, 1), repeat=3)):
            other = row.get(tuple(a + b for a, b in zip(key, step, strict=True)))
            if other is not None:
                out[i] = out[i] + x[other] @ conv.weight[tap]
    return out


def slow_compression(module, x, blocks):
    extra = int(module.plus_one)

    def pool(y):
        return torch.stack([y[rows].sum(0) / (len(rows) + extra) for rows in blocks.values()])

    if not isinstance(module, CompressionV2):
        return pool(F.silu(x @ module.linear.weight.T + module.linear.bias))
    keys = list(blocks)
    hidden = slow_conv(pool(slow_group_norm(x, module.norm1)), keys, module.conv1)
    return slow_conv(slow_group_norm(hidden, module.norm2), keys, module.conv2) + pool(x)


def slow_ssa(module, x_NC, coords, m=4, opened=None) -> Tensor:
    """Compute one asset with its tokens in any order. `opened` replaces the module's gates."""
    q = (x_NC @ module.query.weight.T).unflatten(1, (HEADS, D))
    k, v = ((x_NC @ layer.weight.T) for layer in (module.key, module.value))
    table = module.key_position.view(m, m, m, -1)
    place = torch.stack([table[tuple(int(c) % m for c in xyz)] for xyz in coords])
    blocks, big, windows = (
        grouped(coords, m),
        grouped(coords, 8),
        grouped(coords, 8, 4 if module.shifted else 0),
    )
    ck = slow_compression(module.compress_key, k + place, blocks).unflatten(1, (KV_HEADS, D))
    cv = slow_compression(module.compress_value, v, blocks).unflatten(1, (KV_HEADS, D))
    k, v = k.unflatten(1, (KV_HEADS, D)), v.unflatten(1, (KV_HEADS, D))
    gates = torch.sigmoid(x_NC @ module.gate.weight.T) if opened is None else opened
    big_keys, parent = list(big), [tuple(c * m // 8 for c in key) for key in blocks]
    rows = []
    for n, xyz in enumerate(coords):
        heads = [None] * HEADS
        for g in range(KV_HEADS):
            group = range(g * HEADS // KV_HEADS, (g + 1) * HEADS // KV_HEADS)
            probability = {h: torch.softmax(ck[:, g] @ q[n, h] / math.sqrt(D), 0) for h in group}
            score = [0.0] * len(big_keys)
            for i, b in enumerate(big_keys):
                children = [c for c, key in enumerate(parent) if key == b]
                score[i] = sum(float(p[c].detach()) for p in probability.values() for c in children)
            best = sorted(range(len(big_keys)), key=lambda b: -score[b])[: module.top_k]
            chosen = sorted(row for b in best for row in big[big_keys[b]])
            window = windows[key_of(xyz, 8, 4 if module.shifted else 0)]
            for h in group:
                branches = [probability[h] @ cv[:, g]]
                for keys in (chosen, window):
                    branches.append(
                        torch.softmax(k[keys, g] @ q[n, h] / math.sqrt(D), 0) @ v[keys, g]
                    )
                heads[h] = sum(
                    gate * branch for gate, branch in zip(gates[n], branches, strict=True)
                )
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ module.out.weight.T


CASES = [
    pytest.param({}, [25, 40], 20, id="v1"),
    pytest.param({"compression": "v2"}, [25, 40], 12, id="v2"),
    pytest.param({"compress_block": 8}, [30, 1, 20], 24, id="m_cmp 8"),
    pytest.param(
        {"compress_block": 8, "compression": "v2", "shifted": True},
        [30],
        24,
        id="m_cmp 8, v2, shifted",
    ),
    pytest.param({"shifted": True, "top_k": 3}, [50], 24, id="shifted, top-k 3"),
    pytest.param({"plus_one": True, "top_k": 50}, [40], 16, id="n + 1, more than there are blocks"),
    pytest.param({"plus_one": True, "compression": "v2"}, [40], 16, id="n + 1, v2"),
]


@pytest.mark.parametrize(("options", "tokens", "side"), CASES)
def test_the_module_equals_its_definition(options, tokens, side):
    module, level = make_ssa(**options), make_level(tokens, side)
    x = torch.randn(len(level), C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    m = options.get("compress_block", 4)
    out = run(module, x, level, m)
    for first, last in itertools.pairwise(level.asset_starts.tolist()):
        exact = slow_ssa(module, x[first:last], level.coords[first:last, 1:].tolist(), m)
        assert torch.allclose(out[first:last], exact, atol=TOLERANCE)


@pytest.mark.parametrize("compression", ["v1", "v2"])
def test_gradients_equal_those_of_the_definition(compression):
    level = make_level([18], 12)
    x = torch.randn(len(level), C, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (
        lambda module: run(module, x, level),
        lambda module: slow_ssa(module, x, level.coords[:, 1:].tolist()),
    ):
        module = make_ssa(compression=compression)
        parameters = [x, *module.parameters()]
        results.append(torch.autograd.grad(function(module).sin().sum(), parameters))
        names = ["x", *(name for name, _ in module.named_parameters())]
    for name, ours, exact in zip(names, *results, strict=True):
        # A constant added to every compressed key changes no softmax.
        assert exact.abs().max() > 1e-6 or name == "compress_key.conv2.bias", name
        assert torch.allclose(ours, exact, atol=1e-9), name


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_a_closed_gate_removes_its_branch(branch):
    module, level = make_ssa(), make_level([40], 20)
    x = torch.randn(len(level), C, dtype=torch.float64)
    x[:, 0] = 1.0  # a constant input for the gates
    module.gate.weight.data.zero_()
    module.gate.weight.data[branch, 0] = -1e4  # sigmoid(-10000) is 0, exactly
    opened = torch.full((len(level), 3), 0.5, dtype=torch.float64)
    opened[:, branch] = 0.0
    exact = slow_ssa(module, x, level.coords[:, 1:].tolist(), opened=opened)
    out = run(module, x, level)
    assert torch.allclose(out, exact, atol=TOLERANCE)
    gradients = torch.autograd.grad(
        out.square().sum(), [module.value.weight, module.compress_value.linear.weight]
    )
    # Compressed values reach the output through branch 0 alone.
    assert bool(gradients[1].any()) == (branch != 0)


@pytest.mark.parametrize("compression", ["v1", "v2"])
@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_exchanging_the_axes_changes_nothing(axes, compression):
    """Exchanged axes reorder the tokens. Weights that depend on directions are exchanged too."""
    module, level = make_ssa(compression=compression, shifted=True), make_level([30, 21], 16)
    x = torch.randn(len(level), C, dtype=torch.float64)
    out = run(module, x, level)
    coords = torch.cat([level.coords[:, :1], level.coords[:, 1:][:, list(axes)]], 1)
    order = token_order(coords)
    assert not torch.equal(order, torch.arange(len(order)))
    with torch.no_grad():
        table = module.key_position.view(4, 4, 4, -1)
        module.key_position.copy_(table.permute(*axes, 3).reshape(64, -1))
        for conv in (
            part for part in module.modules() if hasattr(part, "weight") and part.weight.ndim == 3
        ):
            conv.weight.copy_(
                conv.weight.unflatten(0, (3, 3, 3)).permute(*axes, 3, 4).flatten(0, 2)
            )
    again = run(module, x[order], Level.from_coords(coords[order], 16, 2))
    assert torch.allclose(again, out[order], atol=TOLERANCE)


def test_a_translation_by_whole_blocks_changes_nothing():
    module, level = make_ssa(shifted=True, compression="v2"), make_level([40], 16)
    x = torch.randn(len(level), C, dtype=torch.float64)
    moved = Level.from_coords(level.coords + torch.tensor([0, 8, 16, 0], dtype=torch.int32), 32, 1)
    assert torch.allclose(run(module, x, moved), run(module, x, level), atol=TOLERANCE)


@pytest.mark.parametrize(
    "options", [{}, {"compression": "v2", "shifted": True}, {"compress_block": 8}], ids=str
)
def test_a_batch_gives_the_result_of_each_asset_alone(options):
    module, m = make_ssa(**options), options.get("compress_block", 4)
    level = make_level([40, 1, 0, 25], 20)
    x = torch.randn(len(level), C, dtype=torch.float64)
    out = run(module, x, level, m)
    for first, last in itertools.pairwise(level.asset_starts.tolist()):
        coords = level.coords[first:last] * torch.tensor([0, 1, 1, 1], dtype=torch.int32)
        if last > first:
            alone = run(module, x[first:last], Level.from_coords(coords, 20, 1), m)
            assert torch.allclose(out[first:last], alone, atol=TOLERANCE)


def dense_attention(q, k, v, q_asset, k_asset):
    mask = (q_asset[:, None] == k_asset[None])[None]
    return F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask
    ).transpose(0, 1)


def ragged_inputs(queries, keys, dtype=torch.float64, device="cpu"):
    starts = [
        torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
        for counts in (queries, keys)
    ]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(counts), 2, 32, generator=generator, dtype=torch.float64).to(device, dtype)
        for counts in (queries, keys, keys)
    )
    return q, k, v, *starts, max(queries), max(keys)


def assets_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_ragged_attention_stays_in_each_asset():
    queries, keys = [5, 0, 9, 1], [3, 4, 1, 8]
    inputs = ragged_inputs(queries, keys)
    exact = dense_attention(*inputs[:3], assets_of(queries), assets_of(keys))
    assert torch.allclose(ragged_attention(*inputs), exact, atol=TOLERANCE)
    assert ragged_attention(*ragged_inputs([0, 0], [3, 2])).shape == (0, 2, 32)


def make_image_tokens(counts, channels=48, dtype=torch.float64, device="cpu"):
    coords = torch.zeros(sum(counts), 4, dtype=torch.int32)
    coords[:, 0] = assets_of(counts)
    feats = torch.randn(sum(counts), channels, dtype=dtype)
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    return ImageTokens(feats.to(device), coords.to(device), starts.to(device), max(counts))


def test_full_and_cross_attention_equal_dense_attention():
    torch.manual_seed(0)
    level, image = make_level([12, 20], 16), make_image_tokens([5, 7])
    layout, asset = TokenLayout.of(level, 4), level.coords[:, 0]
    x = torch.randn(len(level), C, dtype=torch.float64)
    full, cross = FullAttention(C, HEADS).double(), CrossAttention(C, 48, HEADS).double()
    q, k, v = (
        (x @ w.T + b).unflatten(1, (HEADS, D))
        for w, b in zip(full.qkv.weight.chunk(3), full.qkv.bias.chunk(3))
    )
    exact = full.out(dense_attention(q, k, v, asset, asset).flatten(1))
    assert torch.allclose(full(x, layout), exact, atol=TOLERANCE)
    q = cross.query(x).unflatten(1, (HEADS, D))
    weights = zip(cross.key_value.weight.chunk(2), cross.key_value.bias.chunk(2))
    k, v = ((image.feats_SC @ w.T + b).unflatten(1, (HEADS, D)) for w, b in weights)
    exact = cross.out(dense_attention(q, k, v, asset, image.coords[:, 0]).flatten(1))
    assert torch.allclose(cross(x, layout, image), exact, atol=TOLERANCE)
    with torch.no_grad():
        assert torch.allclose(cross(x, layout, image), exact, atol=TOLERANCE)


class _LargestResult(TorchDispatchMode):
    """Records the largest number of elements that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return result


def test_cross_attention_on_a_cpu_keeps_the_scores_of_all_pairs_only_for_training():
    level, image = make_level([300], 16), make_image_tokens([200], dtype=torch.float32)
    layout, cross = TokenLayout.of(level, 4), CrossAttention(C, 48, HEADS)
    x = torch.randn(len(level), C)
    with _LargestResult() as training:
        cross(x, layout, image)
    with torch.no_grad(), _LargestResult() as inference:
        cross(x, layout, image)
    assert training.elements >= HEADS * len(x) * 200  # what the counter must see
    assert inference.elements <= max(len(x) * C, 200 * 2 * C)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ragged_attention_on_the_gpu(dtype):
    queries, keys = [500, 0, 129, 1], [300, 17, 1, 1374]
    inputs = ragged_inputs(queries, keys, dtype, "cuda")
    on_cpu = [x.detach().cpu() if isinstance(x, Tensor) else x for x in inputs]
    results = []
    for arguments, kind in ((inputs, None), (on_cpu, torch.float64), (on_cpu, dtype)):
        leaves = [x.detach().to(kind or x.dtype).requires_grad_() for x in arguments[:3]]
        out = ragged_attention(*leaves, *arguments[3:])
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(
            torch.bfloat16
        )
        results.append([out, *torch.autograd.grad(out, leaves, cotangent.to(out))])
    for name, x, exact, rounded in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close_as(x.cpu(), exact, rounded, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_assets_of_one_size_are_one_batch_on_the_gpu(dtype):
    inputs = ragged_inputs([500] * 3, [300] * 3, dtype, "cuda")
    on_cpu = [x.cpu() if isinstance(x, Tensor) else x for x in inputs]
    exact = ragged_attention(*(x.double() for x in on_cpu[:3]), *on_cpu[3:])
    rounded = ragged_attention(*on_cpu)
    with torch.no_grad():
        assert_close_as(ragged_attention(*inputs).cpu(), exact, rounded, "out")


@pytest.mark.gpu
@pytest.mark.parametrize("compression", ["v1", "v2"])
def test_the_module_in_bf16(compression):
    """The error against fp64 is no larger than that of bf16 on the CPU.

    Every block is selected, so that rounding cannot change the selection.
    """
    level = make_level([400, 150], 24)
    module = SpatialSparseAttention(
        1024,
        32,
        2,
        compress_block=4,
        compression=compression,
        top_k=64,
        shifted=True,
        plus_one=False,
    )
    x = torch.randn(len(level), 1024)
    layout = TokenLayout.of(level, 4)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module(x, layout)
        exact = module.double()(x.double(), layout)
        with torch.autocast("cuda", torch.bfloat16):
            out = module.float().cuda()(x.cuda(), TokenLayout.of(level.to("cuda"), 4))
    assert_close_as(out.cpu(), exact, rounded)


def test_the_configuration_knows_what_the_kernels_support():
    """`model.config` repeats the kernels' limits, because it must not import torch."""
    from kernels.attention import checks
    from model import config

    assert config.HEAD_SIZES == checks.HEAD_SIZES
    assert config.QUERY_HEADS_PER_KV_HEAD == checks.HEADS_PER_GROUP
