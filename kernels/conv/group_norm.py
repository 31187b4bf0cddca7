"""GroupNorm with statistics over the rows of each asset, optionally followed by SiLU.

The definition is `group_norm` in kernels.conv.reference.

Rows are cut into chunks of CHUNK rows. The rows that chunk k has of asset a are a part. Its number
k + a belongs to no other part, because from one part to the next neither k nor a decreases. Parts
are added in order, so that results are bit-identical from run to run.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv import reference as reference_conv
from kernels.runtime import eager_autograd
from kernels.runtime.checks import (
    check_device,
    check_dtype,
    check_float_rows,
    check_parameter_dtype,
    use_triton,
)
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import on_device

CHUNK = tl.constexpr(1024)


@triton.jit
def _part_rows(starts_ptr, k, a, N):
    """First row of the part of chunk k and asset a, and one past its last."""
    first = tl.maximum(tl.load(starts_ptr + a), k * CHUNK)
    last = tl.minimum(tl.minimum(tl.load(starts_ptr + a + 1), (k + 1) * CHUNK), N)
    return first, last


@triton.jit
def _load(x_ptr, n, last, c, C):
    """Rows n before `last` and channels c in fp32 [BLOCK_N, BLOCK_C], and their mask."""
    mask = (n < last)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + n.to(tl.int64)[:, None] * C + c[None, :], mask, other=0.0).to(tl.float32)
    return x, mask


@triton.jit(do_not_specialize=["N"])
def _parts(
    x_ptr, starts_ptr, ends_ptr, part_ptr, N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and sum of squared deviations of each part and channel."""
    k, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for a in range(tl.load(ends_ptr + 2 * k), tl.load(ends_ptr + 2 * k + 1) + 1):
        first, last = _part_rows(starts_ptr, k, a, N)  # pyright: ignore[reportGeneralTypeIssues]
        mean, squares = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        for n in range(first, last, BLOCK_N):
            # Statistics of BLOCK_N rows.
            x, mask = _load(x_ptr, n + tl.arange(0, BLOCK_N), last, c, C)
            count = tl.minimum(last - n, BLOCK_N).to(tl.float32)
            own = tl.sum(x, 0) / count
            deviation = tl.where(mask, x - own[None, :], 0.0)
            # Merge them with the statistics of the rows before.
            before = (n - first).to(tl.float32)
            step = own - mean
            squares += tl.sum(deviation * deviation, 0) + step * step * (
                before * count / (before + count)
            )
            mean += step * (count / (before + count))
        part = part_ptr + (k + a).to(tl.int64) * (2 * C)
        tl.store(part + c, mean, c < C)
        tl.store(part + C + c, squares, c < C)


@triton.jit
def _part_counts(start, end, first, BLOCK_P: tl.constexpr):
    """Chunks first..first + BLOCK_P, and how many rows start..end each of them has."""
    k = first + tl.arange(0, BLOCK_P)
    n = tl.maximum(tl.minimum(end, (k + 1) * CHUNK) - tl.maximum(start, k * CHUNK), 0)
    return k, n.to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _statistics(
    part_ptr, starts_ptr, mean_ptr, rstd_ptr, N, C, eps, groups, CG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each asset and group, from the asset's parts."""
    # One program: one asset and the CG channels of one group.
    a, g = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts_ptr + a), tl.load(starts_ptr + a + 1)
    c = g * CG + tl.arange(0, BLOCK_G)
    inside = tl.arange(0, BLOCK_G) < CG
    total = tl.maximum((end - start).to(tl.float32) * CG, 1.0)
    first_chunk, last_chunk = start // CHUNK, tl.where(end > start, (end - 1) // CHUNK + 1, 0)

    # Mean over the parts, weighted by their rows.
    mean = 0.0
    for first in range(first_chunk, last_chunk, BLOCK_P):
        k, n = _part_counts(start, end, first, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
        mask = (n > 0)[:, None] & inside[None, :]
        at = part_ptr + (k + a).to(tl.int64)[:, None] * (2 * C) + c[None, :]
        means = tl.load(at, mask, other=0.0)  # [BLOCK_P, BLOCK_G]
        mean += tl.sum(tl.sum(means * n[:, None], 1), 0) / total

    # Squared deviations: within the parts, and of the parts' means.
    squares = 0.0
    for first in range(first_chunk, last_chunk, BLOCK_P):
        k, n = _part_counts(start, end, first, BLOCK_P)  # pyright: ignore[reportGeneralTypeIssues]
        mask = (n > 0)[:, None] & inside[None, :]
        at = part_ptr + (k + a).to(tl.int64)[:, None] * (2 * C) + c[None, :]
        deviation = tl.where(mask, tl.load(at, mask, other=0.0) - mean, 0.0)
        own = tl.load(at + C, mask, other=0.0)  # [BLOCK_P, BLOCK_G]
        squares += tl.sum(tl.sum(own + deviation * deviation * n[:, None], 1), 0)
    tl.store(mean_ptr + a * groups + g, mean)
    tl.store(rstd_ptr + a * groups + g, 1.0 / tl.sqrt(squares / total + eps))


@triton.jit
def _normalised(x, c, a, C, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, CG):
    """Normalised x [BLOCK_N, BLOCK_C]; 1 / standard deviation, weight and bias [BLOCK_C]."""
    at, ok = a * groups + c // CG, c < C
    rstd = tl.load(rstd_ptr + at, ok, other=0.0)
    hat = (x - tl.load(mean_ptr + at, ok, other=0.0)[None, :]) * rstd[None, :]
    weight = tl.load(weight_ptr + c, ok, other=0.0).to(tl.float32)
    return hat, rstd, weight, tl.load(bias_ptr + c, ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _apply(
    x_ptr, starts_ptr, ends_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, N, C, groups, CG,
    SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise the rows of chunk k, part by part."""
    k, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for a in range(tl.load(ends_ptr + 2 * k), tl.load(ends_ptr + 2 * k + 1) + 1):
        first, last = _part_rows(starts_ptr, k, a, N)  # pyright: ignore[reportGeneralTypeIssues]
        for i in range(first, last, BLOCK_N):
            n = i + tl.arange(0, BLOCK_N)
            x, mask = _load(x_ptr, n, last, c, C)
            hat, _, weight, bias = _normalised(
                x, c, a, C, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, CG
            )
            y = hat * weight[None, :] + bias[None, :]
            if SILU:
                y = y * tl.sigmoid(y)
            y = y.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + n.to(tl.int64)[:, None] * C + c[None, :], y, mask)


@triton.jit
def _before_silu(dy, hat, weight, bias, SILU: tl.constexpr):
    """Return the gradient with respect to the input of SiLU."""
    if SILU:
        z = hat * weight[None, :] + bias[None, :]
        s = tl.sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    return dy


@triton.jit
def _normalised_gradient(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, i, last, c, a, C, groups, CG,
    SILU: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient before SiLU and normalised x of rows i..i + BLOCK_N.

    Returns the numbers of the rows, then their mask, gradient and normalised x [BLOCK_N, BLOCK_C],
    then 1 / standard deviation and weight [BLOCK_C].
    """
    n = i + tl.arange(0, BLOCK_N)
    x, mask = _load(x_ptr, n, last, c, C)  # pyright: ignore[reportGeneralTypeIssues]
    dy, _ = _load(dy_ptr, n, last, c, C)
    hat, rstd, weight, bias = _normalised(  # pyright: ignore[reportGeneralTypeIssues]
        x, c, a, C, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, CG
    )
    dz = _before_silu(dy, hat, weight, bias, SILU)  # zero past the end, as dy is
    return n, mask, dz, hat, rstd, weight


@triton.jit(do_not_specialize=["N"])
def _grad_parts(
    dy_ptr, x_ptr, starts_ptr, ends_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, part_ptr, N, C,
    groups, CG, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz times normalised x, of each part and channel."""
    k, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for a in range(tl.load(ends_ptr + 2 * k), tl.load(ends_ptr + 2 * k + 1) + 1):
        first, last = _part_rows(starts_ptr, k, a, N)  # pyright: ignore[reportGeneralTypeIssues]
        sums, products = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        for i in range(first, last, BLOCK_N):
            _, _, dz, hat, _, _ = _normalised_gradient(
                dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, i, last, c, a, C, groups,
                CG, SILU, BLOCK_N,
            )  # fmt: skip
            sums += tl.sum(dz, 0)
            products += tl.sum(dz * hat, 0)
        part = part_ptr + (k + a).to(tl.int64) * (2 * C)
        tl.store(part + c, sums, c < C)
        tl.store(part + C + c, products, c < C)


@triton.jit
def _add_parts(part_ptr, starts_ptr, sum_ptr, W, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum of the parts of each asset, added in order: [A, W]."""
    a, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(starts_ptr + a), tl.load(starts_ptr + a + 1)
    last = tl.where(end > start, (end - 1) // CHUNK + 1, 0)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start // CHUNK, last, BLOCK_P):
        k = first + tl.arange(0, BLOCK_P)
        mask = (k < last)[:, None] & (c < W)[None, :]
        at = part_ptr + (k + a).to(tl.int64)[:, None] * W + c[None, :]
        acc += tl.sum(tl.load(at, mask, other=0.0), 0)  # [BLOCK_P, BLOCK_C] before the sum
    tl.store(sum_ptr + a * W + c, acc, c < W)


@triton.jit(do_not_specialize=["N"])
def _grad_apply(
    dy_ptr, x_ptr, starts_ptr, ends_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, mean_dz_ptr,
    mean_dzx_ptr, dx_ptr, N, C, groups, CG, SILU: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of x of the rows of chunk k, part by part."""
    k, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for a in range(tl.load(ends_ptr + 2 * k), tl.load(ends_ptr + 2 * k + 1) + 1):
        first, last = _part_rows(starts_ptr, k, a, N)  # pyright: ignore[reportGeneralTypeIssues]
        at = a * groups + c // CG
        mean_dz = tl.load(mean_dz_ptr + at, c < C, other=0.0)[None, :]
        mean_dzx = tl.load(mean_dzx_ptr + at, c < C, other=0.0)[None, :]
        for i in range(first, last, BLOCK_N):
            n, mask, dz, hat, rstd, weight = _normalised_gradient(  # pyright: ignore[reportGeneralTypeIssues]
                dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, i, last, c, a, C, groups,
                CG, SILU, BLOCK_N,
            )  # fmt: skip
            dz = dz * weight[None, :]
            dx = (dz - mean_dz - hat * mean_dzx) * rstd[None, :]
            dx = dx.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + n.to(tl.int64)[:, None] * C + c[None, :], dx, mask)


@functools.cache
def _tile_sizes(C: int) -> dict[str, int]:
    BLOCK_C = min(next_power_of_2(C), 128)
    return {"BLOCK_N": max(1, 2048 // BLOCK_C), "BLOCK_C": BLOCK_C}


def _chunks(x_NC: Tensor, starts: Tensor) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Grid of programs; first and last asset of each chunk [chunks, 2]; storage of the parts."""
    N, C = x_NC.shape
    chunks = cdiv(N, CHUNK.value)
    first = torch.arange(0, N, CHUNK.value, device=starts.device, dtype=torch.int32)
    rows = torch.stack([first, (first + (CHUNK.value - 1)).clamp_(max=N - 1)], 1)
    ends = torch.searchsorted(starts[1:].contiguous(), rows, right=True, out_int32=True)
    parts = x_NC.new_empty(chunks + len(starts) - 1, 2, C, dtype=torch.float32)
    return (chunks, cdiv(C, _tile_sizes(C)["BLOCK_C"])), ends, parts


def _forward(
    x: Tensor, starts: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and mean and 1 / standard deviation of each asset and group."""
    x = x.contiguous()
    N, C = x.shape
    A = len(starts) - 1
    CG = C // groups
    y = torch.empty_like(x)
    mean, rstd = (x.new_zeros(A, groups, dtype=torch.float32) for _ in range(2))
    if N == 0:
        return y, mean, rstd
    grid, ends, parts = _chunks(x, starts)
    weight, bias = weight.contiguous(), bias.contiguous()
    sizes = _tile_sizes(C)
    with on_device(x):
        _parts[grid](x, starts, ends, parts, N, C, **sizes)
        BLOCK_G = next_power_of_2(CG)
        BLOCK_P = max(1, 1024 // BLOCK_G)
        _statistics[(A, groups)](
            parts, starts, mean, rstd, N, C, eps, groups, CG=CG, BLOCK_P=BLOCK_P, BLOCK_G=BLOCK_G
        )  # fmt: skip
        _apply[grid](
            x, starts, ends, mean, rstd, weight, bias, y, N, C, groups, CG, SILU=silu, **sizes
        )  # fmt: skip
    return y, mean, rstd


_norm = torch.library.custom_op("sparse3d::group_norm", _forward, mutates_args=())


@_norm.register_fake
def _(x, starts, groups, weight, bias, eps, silu):
    statistics = (x.new_empty(starts.shape[0] - 1, groups, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), *statistics


def _backward(
    dy: Tensor,
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight (fp32) and bias (fp32)."""
    dy, x, weight, bias = (t.contiguous() for t in (dy, x, weight, bias))
    N, C = x.shape
    A, groups = mean.shape
    CG = C // groups
    dx = torch.empty_like(x)
    if N == 0:
        return dx, *(x.new_zeros(C, dtype=torch.float32) for _ in range(2))
    grid, ends, parts = _chunks(x, starts)
    sums_A2C = x.new_empty(A, 2, C, dtype=torch.float32)
    sizes = _tile_sizes(C)
    inputs = (dy, x, starts, ends, mean, rstd, weight, bias)
    with on_device(x):
        # Sums over each asset, then their means over each group's channels.
        _grad_parts[grid](*inputs, parts, N, C, groups, CG, SILU=silu, **sizes)
        _add_parts[(A, cdiv(2 * C, 16))](parts, starts, sums_A2C, 2 * C, BLOCK_P=64, BLOCK_C=16)
        counts_A11 = starts.diff().clamp(min=1)[:, None, None] * CG
        means_A2G = (sums_A2C * weight.float()).view(A, 2, groups, CG).sum(3) / counts_A11
        mean_dz, mean_dzx = (means_A2G[:, i].contiguous() for i in range(2))
        _grad_apply[grid](
            *inputs, mean_dz, mean_dzx, dx, N, C, groups, CG, SILU=silu, **sizes
        )  # fmt: skip
    dbias, dweight = sums_A2C.sum(0)
    return dx, dweight.clone(), dbias.clone()


_norm_grad = torch.library.custom_op("sparse3d::group_norm_backward", _backward, mutates_args=())


@_norm_grad.register_fake
def _(dy, x, starts, weight, bias, mean, rstd, silu):
    grads = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), *grads


def _setup(ctx, inputs, output):
    x, starts, _, weight, bias, _, ctx.silu = inputs
    ctx.save_for_backward(x, starts, weight, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 7
    x, starts, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _norm_grad(dy, x, starts, weight, bias, mean, rstd, ctx.silu)
    return dx, None, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


_norm.register_autograd(_norm_backward, setup_context=_setup)


def _eager_forward(x, starts, groups, weight, bias, eps, silu):
    y, mean, rstd = _forward(x, starts, groups, weight, bias, eps, silu)
    return y, (x, starts, weight, bias, mean, rstd), silu


def _eager_backward(_, dy, saved, silu):
    dx, dweight, dbias = _backward(dy, *saved, silu)
    return dx, None, None, dweight.to(saved[2].dtype), dbias.to(saved[3].dtype)


def group_norm(
    x_NC: Tensor,
    asset_starts_A1: Tensor,
    groups: int,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    eps: float = 1e-5,
    silu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """GroupNorm over all rows of each asset. Differentiable in x, weight and bias.

    Statistics are fp32 with the biased variance, as in torch's GroupNorm.

    Args:
        x_NC: [N, C], fp32, bf16 or fp16.
        asset_starts_A1: int32 [A + 1], ascending from 0 to N. Asset a has rows
            asset_starts[a]:asset_starts[a + 1] and may be empty.
        groups: Number of groups of C / groups channels.
        weight_C: [C] in the dtype of `x_NC` or float32.
        bias_C: [C] in the dtype of `x_NC` or float32.
        eps: Added to the variance.
        silu: Apply SiLU to the result.
        backend: As in `sparse_conv`.

    Returns:
        [N, C] in the dtype of `x_NC`.

    Raises:
        ValueError: If the groups do not divide the channels, or another argument does not fit.
    """
    _check(x_NC, asset_starts_A1, groups, weight_C, bias_C, eps)
    if not use_triton(backend, x_NC):
        return reference_conv.group_norm(x_NC, asset_starts_A1, groups, weight_C, bias_C, eps, silu)
    check_dtype("x_NC", x_NC)
    inputs = (x_NC, asset_starts_A1, groups, weight_C, bias_C, eps, silu)
    if eager_autograd.needs_dispatcher(x_NC, weight_C, bias_C):
        return _norm(*inputs)[0]
    return eager_autograd.apply(_eager_forward, _eager_backward, *inputs)


def _check(
    x_NC: Tensor, starts_A1: Tensor, groups: int, weight_C: Tensor, bias_C: Tensor, eps: float
) -> None:
    check_float_rows("x_NC", x_NC)
    C = x_NC.shape[1]
    if not isinstance(groups, int) or groups < 1 or C % groups:
        raise ValueError(f"groups must divide the {C} channels, got {groups!r}")
    if starts_A1.ndim != 1 or len(starts_A1) < 2 or starts_A1.dtype != torch.int32:
        raise ValueError(
            "asset_starts_A1 must be int32 [A + 1] with A >= 1, "
            f"got {starts_A1.dtype} {list(starts_A1.shape)}"
        )
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    for name, parameter in (("weight_C", weight_C), ("bias_C", bias_C)):
        if parameter.shape != (C,):
            raise ValueError(f"{name} must be [{C}], got {list(parameter.shape)}")
        check_parameter_dtype(name, parameter, "x_NC", x_NC)
    for name, t in (("asset_starts_A1", starts_A1), ("weight_C", weight_C), ("bias_C", bias_C)):
        check_device(name, t, "x_NC", x_NC)
