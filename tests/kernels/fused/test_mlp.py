"""The MLP with its fused backward against the unfused definition."""

from __future__ import annotations

import pytest
import torch

from kernels import mlp
from kernels.fused import reference
from tests.kernel_inputs import DEVICE, assert_no_worse, run

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")


def inputs_of(N, C, F, dtype, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, C), (F, C), (F,), (C, F), (C,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    for i, width in ((1, C), (3, F)):  # as Xavier's initial weights
        tensors[i] *= width**-0.5
    tensors[0] *= spread
    return [x.to(DEVICE, dtype) for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("N", "C", "F"), [(130, 16, 64), (64, 24, 96), (1, 8, 1100)])
def test_value_and_gradients(N, C, F, dtype):
    assert_no_worse(
        lambda *x: mlp(*x, backend="triton")[0], reference.mlp, inputs_of(N, C, F, dtype), NAMES
    )


def test_large_inputs_neither_overflow_nor_lose_their_gradient():
    inputs = inputs_of(70, 16, 32, torch.float32, spread=100.0)
    results = run(lambda *x: mlp(*x, backend="triton")[0], inputs)
    exact = run(reference.mlp, [x.double() for x in inputs])
    for name, x, e in zip(("value", *NAMES), results, exact, strict=True):
        assert (x - e).abs().max() < 1e-5 * e.abs().max(), name


def test_the_first_product_is_returned_without_a_gradient():
    x, weight1, bias1, *rest = (x.requires_grad_() for x in inputs_of(9, 8, 16, torch.float32))
    out, pre = mlp(x, weight1, bias1, *rest, backend="triton")
    assert out.requires_grad
    assert not pre.requires_grad
    assert torch.equal(pre, torch.addmm(bias1, x, weight1.T))
    assert mlp(x, weight1, bias1, *rest, backend="reference")[1] is None


def test_no_rows():
    x, *weights = inputs_of(0, 8, 16, torch.float32)
    x.requires_grad_()
    out, _ = mlp(x, *weights, backend="triton")
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 8)


def test_bad_arguments_are_named():
    x, weight1, bias1, weight2, bias2 = inputs_of(9, 8, 16, torch.float32)
    for arguments, message in [
        ((x, weight1[:, :4], bias1, weight2, bias2), r"weight1_FC must be \[16, 8\]"),
        ((x, weight1, bias1[:3], weight2, bias2), r"bias1_F must be \[16\]"),
        ((x, weight1, bias1, weight2.T, bias2), r"weight2_CF must be \[8, 16\]"),
        ((x, weight1, bias1, weight2, bias2.half()), "bias2_C must be torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            mlp(*arguments)
