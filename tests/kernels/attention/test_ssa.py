"""Spatial sparse attention against its fp64 reference: values and gradients of many inputs."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from kernels import BlockIndex, block_mean, select_blocks, spatial_sparse_attention
from kernels.attention import (
    block_index,
    branches,
    inverse_lists,
    reference,
    scaled_keys,
    segment,
    ssa,
)
from kernels.attention.softmax import LOG2E
from kernels.runtime import triton_ops
from tests.kernel_inputs import DEVICE, assert_close_as, assert_no_worse, random_index, run

GPU = DEVICE == "cuda"
# The interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
NAMES = ("q", "k", "v", "ck", "cv", "gates")
slow = [] if GPU else [pytest.mark.slow]


def make_inputs(
    index: BlockIndex, H: int, G: int, D: int, dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    N, P = index.num_tokens, index.num_compressed
    shapes = ((N, H, D), (N, G, D), (N, G, D), (P, G, D), (P, G, D), (N, 3))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def check(index: BlockIndex, inputs: list[torch.Tensor], top_k: int, shifted: bool = False) -> None:
    scale = inputs[0].shape[2] ** -0.5
    selected = select_blocks(
        inputs[0], inputs[3], index, top_k=top_k, scale=scale, backend="triton"
    )

    def kernel(*x):
        return spatial_sparse_attention(
            *x, index, top_k=top_k, shifted=shifted, scale=scale, backend="triton"
        )

    def exact(*x):
        options = {"top_k": top_k, "shifted": shifted, "scale": scale, "selected_GNT": selected}
        return reference.spatial_sparse_attention(x, index, **options)

    assert_no_worse(kernel, exact, inputs, NAMES)


BATCHES = [
    pytest.param([40, 25], 16, 2, id="two assets", marks=slow),
    pytest.param([0, 24, 0, 14, 0], (16, 16, 8), 1, id="empty first, middle, last"),
    pytest.param([1], 16, 3, id="one token"),
    pytest.param([20], 8, 1, id="one block"),
    pytest.param([30], 16, 100, id="more than there are blocks"),
    pytest.param([130], (16, 8, 8), 1, id="long lists and blocks of several tiles"),
    pytest.param([0, 0], 8, 4, id="nothing"),
]
# The interpreter takes seconds per case. Without a GPU the default suite keeps one dtype where a
# second one would test the same.
OTHER_DTYPES = [DTYPES[0], *(pytest.param(dtype, marks=slow) for dtype in DTYPES[1:])]


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "side", "top_k"), BATCHES)
def test_batches(tokens, side, top_k, dtype):
    index = random_index(tokens, side)
    check(index, make_inputs(index, 4, 2, 16, dtype), top_k)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_head_counts_of_the_paper(shifted, dtype):
    index = random_index([20, 14], (16, 16, 8))
    check(index, make_inputs(index, 32, 2, 32, dtype), 3, shifted)


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "G", "D"), [(1, 1, 16), (2, 3, 64), (8, 1, 32), (32, 1, 16), (4, 2, 128), (1, 4, 64)]
)
@pytest.mark.parametrize(
    "tokens", [[20], pytest.param([900, 0, 300], marks=slow)], ids=["small", "large"]
)
def test_heads_and_sizes(group, G, D, tokens, dtype):
    index = random_index(tokens, (16, 8, 8) if tokens == [20] else 32)
    check(index, make_inputs(index, group * G, G, D, dtype), 1, shifted=True)


@pytest.mark.parametrize(("select", "compress"), [(8, 8), (4, 2), (16, 4), (8, 1)])
def test_block_sizes(select, compress):
    index = random_index([26, 10], (select + 4, 8, 5), select_block=select, compress_block=compress)
    check(index, make_inputs(index, 2, 1, 16, torch.float32), 2)


@pytest.mark.parametrize("dtype", DTYPES[-1:], ids=str)
@pytest.mark.parametrize("top_k", [pytest.param(k, marks=slow) for k in (1, 8, 13)])
def test_full_blocks_of_512(top_k, dtype):
    index = random_index([1024, 700], (16, 8, 8) if top_k == 1 else (32, 16, 16))
    check(index, make_inputs(index, 2, 1, 16, dtype), top_k)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "few", [0, inverse_lists.FEW_ITEMS], ids=["one program an item", "several"]
)
def test_the_short_rest_of_a_block_takes_half_a_tile(few, dtype, monkeypatch):
    monkeypatch.setattr(inverse_lists, "FEW_ITEMS", few)
    index = random_index([300], (16, 8, 8))
    assert all(128 < n <= 192 for n in index.block_starts.diff().tolist())
    check(index, make_inputs(index, 2, 1, 16, dtype), 1)


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize("case", ["huge", "moderate", "negative", "zero", "constant keys"])
def test_adversarial_logits(case, dtype):
    index = random_index([26], (16, 8, 16))
    x = make_inputs(index, 2, 1, 16, dtype)
    if case == "huge":  # softmax is one-hot, and the bound of the bf16 path is exceeded
        x[0] *= 40
        x[1] *= 8
        x[3] *= 8
    elif case == "moderate":  # some rows are inside the bound, some outside
        x[0] *= torch.linspace(0, 12, len(x[0]), device=DEVICE).to(dtype)[:, None, None]
    elif case == "negative":  # every score is far below 0; padding must not take part
        x[0] = -x[0].abs() * 4
        x[1], x[3] = x[1].abs() * 4 + 4, x[3].abs() * 4 + 4
    elif case == "zero":
        x[0] *= 0
    else:
        x[1][:], x[3][:] = x[1][:1], x[3][:1]  # blocks of equal size have equal scores
    check(index, x, 2)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float16], ids=str)
@pytest.mark.parametrize(
    "large", ["first asset", "last key", "last compressed key", "keys of zero queries"]
)
def test_rows_much_larger_than_the_others(large, dtype):
    """bf16 takes a bound from the largest key. It must hold for every row and no other asset."""
    index = random_index([26, 40], (16, 8, 16))
    x = make_inputs(index, 2, 1, 16, dtype)
    if large == "first asset":
        x[0][:26] *= 1000
    elif large == "last key":
        x[1][-1] *= 100
    elif large == "last compressed key":
        x[3][-1] *= 100
    else:  # the square of a key overflows fp32
        x[0] *= 0
        x[1], x[3] = x[1] * 1e25, x[3] * 1e25
    check(index, x, 1)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float16], ids=str)
@pytest.mark.parametrize("log_sum", [65, -65, 150, -150])
def test_a_row_whose_log_sum_is_far_from_zero(log_sum, dtype):
    """bf16 folds log-sums into the gradient if fp32 holds the powers of all of them."""
    index = random_index([26, 40], (16, 8, 16))
    x = make_inputs(index, 2, 1, 16, dtype)
    for keys in (x[1], x[3]):
        keys.mul_(1 / 16).add_(1)
    x[0][5] = log_sum / (16**0.5 * LOG2E)
    check(index, x, 1)


@pytest.fixture
def fp16_takes_the_path_of_bf16(monkeypatch):
    """Run fp16 as bf16, which the interpreter lacks, with a limit that suits fp16's exponents."""
    if GPU:
        pytest.skip("bf16 itself is tested on a GPU")
    monkeypatch.setattr(scaled_keys, "FOLDED_DTYPES", {torch.float16})
    for module in (segment, branches):
        monkeypatch.setattr(module, "BOUND_LIMIT", tl.constexpr(10.0))


@pytest.mark.usefixtures("fp16_takes_the_path_of_bf16")
@pytest.mark.parametrize(
    "large", [None, 0, 1, 3], ids=["none", "a query", "a key", "a compressed key"]
)
def test_moderate_scores_need_no_maximum_and_no_log_sum(large):
    index = random_index([26, 0, 40], (16, 8, 16))
    x = make_inputs(index, 4, 2, 16, torch.float16)
    x[0] *= 0.5
    if large is not None:
        x[large][-1] *= 20
    flags = ssa.ssa_forward(x, index, 1, False, 0.25)[5]
    assert flags[0] == (large is not None)
    check(index, x, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_gates(dtype):
    index = random_index([20], (16, 8, 8))
    x = make_inputs(index, 2, 1, 16, dtype)
    x[5][::2] = torch.tensor([100.0, -1000.0, 30.0])
    x[5][1::4] = torch.tensor([-200.0, 9.0, -30.0])
    check(index, x, 1)


def test_inputs_need_not_be_contiguous():
    index = random_index([20], (16, 8, 8))
    x = make_inputs(index, 4, 2, 16, torch.float32)
    strided = [torch.stack([t, t + 1], -1)[..., 0] for t in x]
    strided[0] = x[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(t.is_contiguous() for t in strided)
    check(index, strided, 1)
    plain = spatial_sparse_attention(*x, index, top_k=1, backend="triton")
    assert torch.equal(spatial_sparse_attention(*strided, index, top_k=1, backend="triton"), plain)


def test_an_asset_does_not_see_its_neighbours():
    tokens = [17, 0, 22]
    index, alone = random_index(tokens, 16), random_index([17], 16)
    x = make_inputs(index, 4, 2, 16, torch.float32)
    P = alone.num_compressed
    one = [x[0][:17], x[1][:17], x[2][:17], x[3][:P], x[4][:P], x[5][:17]]
    batch = spatial_sparse_attention(*x, index, top_k=2, backend="triton")
    single = spatial_sparse_attention(*one, alone, top_k=2, backend="triton")
    assert torch.allclose(batch[:17], single, atol=2e-6)
    x[0][17:] += 1
    for i in (1, 2):
        x[i][17:] *= 3
    for i in (3, 4):
        x[i][P:] *= 3
    again = spatial_sparse_attention(*x, index, top_k=2, backend="triton")
    assert torch.equal(again[:17], batch[:17])


def test_ranges_of_queries_do_not_change_the_result(monkeypatch):
    monkeypatch.setattr(block_index, "_chunks", thirds)
    index = random_index([24, 12], (16, 8, 8))
    assert index.chunk_starts.tolist() == [0, 8, 16, 24, 28, 32, 36]
    x = make_inputs(index, 2, 1, 16, torch.float32)

    def kernel(*x):
        return spatial_sparse_attention(*x, index, top_k=1, backend="triton")

    whole = run(kernel, x)
    monkeypatch.setattr(ssa, "RANGE_BYTES", 12 * 2 * 68)
    assert len(ssa.split_queries(index, 2, 1, 16, 1, 4)) == 3
    for a, b in zip(run(kernel, x), whole, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_ranges_are_as_short_as_scores_and_ranks_want(monkeypatch):
    """With many key/value heads and few selected blocks, scores need more memory than outputs."""
    monkeypatch.setattr(block_index, "_chunks", thirds)
    index, G = random_index([60, 30], 64), 16
    part, scores = 1 * G * (16 * 2 + 4), G * index.max_blocks * 5  # bytes per query
    assert 2 * part < scores
    for count in (1, 2, 3, 6):
        monkeypatch.setattr(ssa, "RANGE_BYTES", -(-90 * scores // count))
        assert len(ssa.split_queries(index, G, G, 16, 1, 2)) == count


def thirds(tokens, blocks):
    starts, pairs, assets = [0], [0], []
    for asset, (N, M) in enumerate(zip(tokens, blocks, strict=True)):
        for _ in range(3):
            assets.append(asset)
            starts.append(starts[-1] + N // 3)
            pairs.append(pairs[-1] + M)
    return assets, starts, pairs


def test_two_backward_runs_are_bit_identical():
    index = random_index([20000, 9000] if GPU else [24, 12], 64 if GPU else (16, 8, 8))
    x = make_inputs(index, 8, 2, 32, DTYPES[-1])

    def kernel(*x):
        return spatial_sparse_attention(*x, index, top_k=1, backend="triton")

    first, second = run(kernel, x), run(kernel, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_reach_the_compression_parameters():
    index = random_index([24, 10], (16, 8, 8))
    x = make_inputs(index, 4, 2, 16, torch.float32)
    weight = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(9)).to(DEVICE)

    def compress(x_NGD, w, backend):
        y = torch.nn.functional.silu(x_NGD @ w).flatten(1)
        return block_mean(y, index, plus_one=True, backend=backend).unflatten(1, (2, 16))

    with torch.no_grad():
        ck = compress(x[1], weight[0], "triton")
    selected = select_blocks(x[0], ck, index, top_k=2, backend="triton")

    def kernel(q, k, v, gates, w):
        ck, cv = compress(k, w[0], "triton"), compress(v, w[1], "triton")
        return spatial_sparse_attention(q, k, v, ck, cv, gates, index, top_k=2, backend="triton")

    def exact(q, k, v, gates, w):
        ck, cv = compress(k, w[0], "reference"), compress(v, w[1], "reference")
        options = {"top_k": 2, "shifted": False, "scale": 0.25}
        return reference.spatial_sparse_attention(
            (q, k, v, ck, cv, gates), index, **options, selected_GNT=selected
        )

    assert_no_worse(
        kernel, exact, [x[0], x[1], x[2], x[5], weight], ("q", "k", "v", "gates", "weight")
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_torch_compile_sees_one_operator(backend):
    index = random_index([40], 16)
    x = make_inputs(index, 2, 1, 16, torch.float32)

    def step(q, k, v, ck, cv, gates):
        return (
            spatial_sparse_attention(q * 1, k, v, ck, cv, gates, index, top_k=2, backend="triton")
            + 1
        )

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for a, b in zip(run(compiled, x), run(step, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("top_k", [2, 100])
def test_the_operators_schema_and_fakes_hold(top_k):
    index = random_index([30, 8], 16)
    x = [t.requires_grad_() for t in make_inputs(index, 2, 1, 16, torch.float32)]
    arguments = (*x, index.tensors(), top_k, False, 0.25)
    # The lists are not initialised past their filled part, so two runs cannot be compared.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sparse3d.ssa.default, arguments, test_utils=tests)


def test_an_eager_call_is_the_operator():
    index = random_index([30, 8], 16)
    x = make_inputs(index, 2, 1, 16, torch.float32)

    def operator(*x):
        return torch.ops.sparse3d.ssa(*x, index.tensors(), 1, False, 0.25)[0]

    def eager(*x):
        return spatial_sparse_attention(*x, index, top_k=1, backend="triton")

    assert all(torch.equal(a, b) for a, b in zip(run(eager, x), run(operator, x), strict=True))


def test_long_offsets_and_shared_items_change_nothing(monkeypatch):
    index = random_index([30, 8], 16)
    x = make_inputs(index, 2, 1, 16, torch.float32)

    def kernel(*x):
        return spatial_sparse_attention(*x, index, top_k=2, backend="triton")

    plain = run(kernel, x)
    monkeypatch.setattr(triton_ops, "MAX_SHORT_OFFSET", 100)
    monkeypatch.setattr(inverse_lists, "FEW_ITEMS", 1)
    assert all(torch.equal(a, b) for a, b in zip(run(kernel, x), plain, strict=True))


def test_lists_stay_inside_their_storage():
    index = random_index([70, 30], 16)
    x = make_inputs(index, 2, 2, 16, torch.float32)
    *_, selected, entries, sums, items = torch.ops.sparse3d.ssa(*x, index.tensors(), 2, False, 0.25)
    pairs = index.pair_block.shape[0]
    assert [t.numel() for t in (entries, sums, items)] == list(
        inverse_lists.InverseListStorage.sizes(100, pairs, 2, 2)
    )
    counts = sums.view(3, pairs * 2)[0].diff(prepend=sums.new_zeros(1))
    assert counts.sum() == (selected >= 0).sum()
    assert sorted(entries[: counts.sum()].tolist()) == sorted(
        2 * [n * 2 + t for n in range(100) for t in range(2)]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q=a["q"][:-1]), r"q_NHD must be \[40, H, D\]"),
        (lambda a: a.update(k=a["k"][:, :, :8]), r"k_NGD must be \[40, G, 16\].*got \[40, 2, 8\]"),
        (lambda a: a.update(v=a["v"][:, :1]), r"v_NGD must be .*got \[40, 1, 16\]"),
        (lambda a: a.update(ck=a["ck"][1:]), r"ck_PGD must be"),
        (
            lambda a: a.update(cv=a["cv"].double()),
            r"cv_PGD must be torch.float32 .*got torch.float64",
        ),
        (lambda a: a.update(gates=a["gates"][:, :2]), r"gates_N3 must be \[40, 3\], got \[40, 2\]"),
        (
            lambda a: a.update(q=a["q"][:, :3]),
            r"q_NHD must have a multiple of the 2 key/value heads of k_NGD, got 3",
        ),
        (
            lambda a: a.update({n: a[n].double() for n in NAMES}),
            r"q_NHD must be one of .*got torch.float64",
        ),
        (
            lambda a: a.update({n: a[n].repeat(1, 1, 3) for n in NAMES[:5]}),
            r"head size in .*got 48",
        ),
        (lambda a: a.update(q=a["q"].repeat(1, 3, 1)), r"heads per key/value head, got 12 / 2"),
        (lambda a: a.update(top_k=0), r"top_k must be an int of at least 1, got 0"),
        (lambda a: a.update(top_k=2.0), r"top_k must be an int of at least 1, got 2.0"),
        (lambda a: a.update(scale=-1.0), r"scale must be positive and finite, got -1.0"),
        (lambda a: a.update(backend="cuda"), r'backend must be "auto".*got \'cuda\''),
    ],
)
def test_bad_arguments_are_named(change, message):
    index = random_index([40], 16)
    arguments = dict(zip(NAMES, make_inputs(index, 4, 2, 16, torch.float32), strict=True))
    arguments |= {"top_k": 2, "scale": None, "backend": "triton"}
    change(arguments)
    x = [arguments.pop(name) for name in NAMES]
    with pytest.raises(ValueError, match=message):
        spatial_sparse_attention(*x, index, **arguments)


def test_the_tolerance_can_fail():
    exact = torch.linspace(-1, 1, 50, dtype=torch.float64)
    rounded = exact.float()
    assert_close_as(rounded, exact, rounded)
    with pytest.raises(AssertionError, match="error"):
        assert_close_as(rounded + 1e-5, exact, rounded)
    with pytest.raises(AssertionError, match="error inf"):
        assert_close_as(rounded / 0, exact, rounded)
