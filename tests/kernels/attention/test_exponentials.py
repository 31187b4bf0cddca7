"""Exponentials that a polynomial emulates, against fp64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernels.attention.softmax import exponentials, round_scores
from tests.kernel_inputs import DEVICE


@triton.jit
def _exponentials(
    x_ptr, y_ptr, R: tl.constexpr, C: tl.constexpr, EMULATED: tl.constexpr, BOUNDED: tl.constexpr
):
    i = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(y_ptr + i, exponentials(tl.load(x_ptr + i), EMULATED, BOUNDED))


def run(x_RC, emulated, bounded):
    y_RC = torch.empty_like(x_RC)
    _exponentials[(1,)](x_RC, y_RC, *x_RC.shape, emulated, bounded)
    return y_RC


def scores(R, C, low=-125.0, high=127.99):
    generator = torch.Generator().manual_seed(0)
    x_RC = torch.rand(R, C, generator=generator, dtype=torch.float64) * (high - low) + low
    x_RC.view(-1)[:4] = torch.tensor([low, 0.0, 0.5, -0.5], dtype=torch.float64)
    return x_RC.to(DEVICE, torch.float32)


@pytest.mark.parametrize(("emulated", "bounded"), [(1, True), (1, False), (4, True)])
def test_the_relative_error_is_below_8e_5(emulated, bounded):
    x_RC = scores(64, 64)
    exact = torch.exp2(x_RC.double())
    error = ((run(x_RC, emulated, bounded).double() - exact) / exact).abs()
    assert error.max() <= 8e-5
    assert error.max() > 6e-5  # the polynomial is the one that is emulated


@pytest.mark.parametrize("shape", [(128, 32), (64, 64), (32, 8)], ids=str)
@pytest.mark.parametrize("emulated", [0, 2, 4, 8])
def test_one_of_so_many_numbers_is_emulated(shape, emulated):
    x_RC = scores(*shape, low=-50.3, high=50.3)
    y_RC = run(x_RC, emulated, True)
    polynomial, plain = run(x_RC, 1, True), run(x_RC, 0, True)
    is_plain = y_RC == plain
    assert torch.equal(torch.where(is_plain, y_RC, polynomial), y_RC)
    assert (polynomial != plain).float().mean() > 0.99
    share = 1 - is_plain.float().mean().item()
    assert share == pytest.approx(1 / emulated if emulated else 0.0, abs=0.01)


def test_small_scores_that_are_not_bounded_give_nearly_nothing():
    x_RC = scores(16, 16, low=-1e4, high=-126.0)
    x_RC[0, :4] = -torch.inf
    y_RC = run(x_RC, 1, False)
    assert (y_RC >= 0).all()
    assert (y_RC <= 2.0**-124.9).all()


@triton.jit
def _round(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, round_scores(tl.load(x_ptr + i), y_ptr.dtype.element_ty))


@pytest.mark.gpu
def test_scores_are_rounded_as_torch_rounds_them():
    bits = torch.randint(0, 1 << 32, (1 << 14,), generator=torch.Generator().manual_seed(0))
    x = (bits - (1 << 31)).int().view(torch.float32).to(DEVICE)
    y = torch.empty_like(x, dtype=torch.bfloat16)
    _round[(1,)](x, y, 1 << 14)
    expected = x.bfloat16()
    same = (y.view(torch.int16) == expected.view(torch.int16)) | (y.isnan() & x.isnan())
    assert same.all()
