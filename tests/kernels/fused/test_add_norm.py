"""Residual, gate, LayerNorm and modulation against the unfused definition, with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import add_norm, norm
from kernels.fused import reference
from tests.kernel_inputs import DEVICE, assert_close_as, run

HALF = (
    torch.bfloat16 if DEVICE == "cuda" else torch.float16
)  # the interpreter computes bf16 wrongly
KINDS = ("plain", "weights", "modulation")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assets(counts: list[int]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int()
    return of.to(DEVICE), starts.to(DEVICE)


def inputs_of(counts, C, kind, gated, dtype):
    """Return the residual stream, branch, gate, shift and scale; those that a case lacks are left
    out."""
    N, A = sum(counts), len(counts)
    vector = (A, C) if kind == "modulation" else (C,)
    x = draw(C, N).T * 3 + 2  # not contiguous
    inputs = [x, draw(N, C, seed=1, dtype=dtype)]
    if gated:
        inputs.append(draw(A, 3 * C, seed=2, dtype=dtype)[:, C : 2 * C])
    if kind != "plain":
        parameters = dtype if kind == "modulation" else torch.float32
        inputs += [draw(*vector, seed=seed, dtype=parameters) for seed in (3, 4)]
    return inputs


def split(inputs, gated):
    """Return x, branch, gate, shift and scale, None for those that are left out."""
    x, branch, *rest = inputs
    gate = rest.pop(0) if gated else None
    shift, scale = rest or (None, None)
    return x, branch, gate, shift, scale


def both(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Join the two results, so that one cotangent reaches both."""
    return torch.cat([outputs[0], outputs[1].to(outputs[0].dtype)])


def compare(kernel, definition, inputs, names):
    """Compare value and gradients with the definition in fp64 and in the kernel's dtypes."""
    results, rounded = run(kernel, inputs), run(definition, inputs)
    exact = run(definition, [x.double() for x in inputs])
    for name, x, e, r in zip(("value", *names), results, exact, rounded, strict=True):
        assert_close_as(x, e, r, name)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("counts", "C"),
    [([40, 0, 31, 3], 64), ([32, 32], 128), ([1], 96), ([0, 5], 16)],
    ids=str,
)
def test_value_and_gradients(counts, C, kind, gated, dtype):
    """Assets that end inside, between and right at the chunks of 32 rows."""
    of, starts = assets(counts)
    inputs = inputs_of(counts, C, kind, gated, dtype)

    def kernel(*x):
        return both(add_norm(*split(x, gated), of, starts, dtype=dtype, backend="triton"))

    def definition(*x):
        kept = torch.float64 if x[0].dtype == torch.float64 else dtype
        return both(add_norm(*split(x, gated), of, starts, dtype=kept, backend="reference"))

    names = ["x", "branch", *["gate"] * gated, *["shift", "scale"] * (kind != "plain")]
    compare(kernel, definition, inputs, names)


def test_a_stream_in_half_precision():
    of, starts = assets([40, 31])
    inputs = [x.to(HALF) for x in inputs_of([40, 31], 48, "plain", False, HALF)]

    def kernel(*x):
        return both(add_norm(*x, None, None, None, of, starts, backend="triton"))

    def definition(*x):
        return both(add_norm(*x, None, None, None, of, starts, backend="reference"))

    compare(kernel, definition, inputs, ["x", "branch"])


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_branch(kind):
    of, starts = assets([40, 0, 31])
    x, _, *rest = inputs_of([40, 0, 31], 48, kind, False, torch.float32)

    def kernel(x, *vectors):
        shift, scale = vectors or (None, None)
        return norm(x, shift, scale, of, starts, eps=1e-5, backend="triton")

    def definition(x, *vectors):
        shift, scale = vectors or (None, None)
        return reference.norm(x, shift, scale, of.long(), 1e-5, x.dtype)

    compare(kernel, definition, [x, *rest], ["x", "shift", "scale"][: 1 + len(rest)])


def test_the_definition_is_the_formula():
    of, starts = assets([3, 2])
    x, branch, gate, shift, scale = (
        draw(n, 8, seed=n, dtype=torch.float64) for n in (5, 5, 2, 2, 2)
    )
    total, y = add_norm(x, branch, gate, shift, scale, of, starts, eps=0.1, backend="reference")
    for n, asset in enumerate(of.tolist()):
        row = x[n] + gate[asset] * branch[n]
        normal = (row - row.mean()) / (row.var(unbiased=False) + 0.1).sqrt()
        assert torch.allclose(total[n], row)
        assert torch.allclose(y[n], normal * (1 + scale[asset]) + shift[asset])
    weighted = norm(x, shift[0], scale[0], of, starts, backend="reference")
    assert torch.allclose(weighted, F.layer_norm(x, (8,), scale[0], shift[0], 1e-6))


def test_a_second_pass_gives_the_same_bits():
    """The backward pass may compute the norm again from the sum."""
    of, starts = assets([40, 31])
    x, branch, gate, shift, scale = split(inputs_of([40, 31], 64, "modulation", True, HALF), True)
    vectors = (shift, scale, of, starts)
    total, y = add_norm(x, branch, gate, *vectors, dtype=HALF, backend="triton")
    assert torch.equal(norm(total, *vectors, dtype=HALF, backend="triton"), y)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_results_may_be_unused(used):
    of, starts = assets([5, 3])
    inputs = inputs_of([5, 3], 32, "modulation", True, torch.float32)

    def kernel(*x):
        return add_norm(*x, of, starts, backend="triton")[used]

    def definition(*x):
        return add_norm(*x, of, starts, backend="reference")[used]

    compare(kernel, definition, inputs, ["x", "branch", "gate", "shift", "scale"])


@pytest.mark.gpu
def test_gradients_are_bit_identical_from_run_to_run():
    of, starts = assets([70_000, 3, 20_000])
    inputs = inputs_of([70_000, 3, 20_000], 1024, "modulation", True, torch.bfloat16)
    first, second = (
        run(lambda *x: both(add_norm(*x, of, starts, dtype=torch.bfloat16)), inputs)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_arguments_are_named():
    of, starts = assets([5, 3])
    x, branch, gate, shift, scale = inputs_of([5, 3], 32, "modulation", True, torch.float32)
    cases = [
        ((x[:, 0], branch, gate, shift, scale, of, starts), "x_NC must be floating"),
        ((x, branch[:4], gate, shift, scale, of, starts), r"branch_NC must be \[8, 32\]"),
        ((x, branch, gate[:1], shift, scale, of, starts), r"gate_AC must be \[2, 32\]"),
        ((x, branch, gate, None, scale, of, starts), "shift and scale must be given together"),
        ((x, branch, gate, shift, scale[:1], of, starts), r"both be \[2, 32\] or both \[32\]"),
        ((x, branch, gate, shift.half(), scale, of, starts), "shift must be torch.float32"),
        ((x, branch, gate, shift, scale, of.long(), starts), r"asset_of_N must be int32 \[8\]"),
        ((x, branch, gate, shift, scale, of, starts[:1]), "asset_starts_A1 must be int32"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            add_norm(*arguments)
    with pytest.raises(ValueError, match="eps must be finite"):
        norm(x, shift, scale, of, starts, eps=-1.0)
