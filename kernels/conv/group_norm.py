"""GroupNorm with the statistics of each asset's rows, and SiLU."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv import reference as reference_conv
from kernels.runtime import eager_autograd
from kernels.runtime.checks import check_dtype, use_triton
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import on_device

# Rows are cut into chunks of CHUNK. What chunk k has of asset a is a part; its number k + a belongs to no other part,
# since from one part to the next neither k nor a decreases. Parts are added in order: the same bits every time.
CHUNK = tl.constexpr(1024)


@triton.jit
def _begin(starts_ptr, k, a):
    """First row of chunk k that belongs to asset a."""
    return tl.maximum(tl.load(starts_ptr + a), k * CHUNK)


@triton.jit
def _end(starts_ptr, k, a, N):
    return tl.minimum(tl.minimum(tl.load(starts_ptr + a + 1), (k + 1) * CHUNK), N)


@triton.jit
def _load(x_ptr, n, last, c, C):
    mask = (n < last)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + n.to(tl.int64)[:, None] * C + c[None, :], mask, other=0.0).to(tl.float32)
    return x, mask


@triton.jit(do_not_specialize=["N"])
def _parts(x_ptr, starts_ptr, ends_ptr, part_ptr, N, C, BN: tl.constexpr, BC: tl.constexpr):
    """Of each part and channel the mean and the sum of squared distances from it."""
    k, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    for a in range(tl.load(ends_ptr + 2 * k), tl.load(ends_ptr + 2 * k + 1) + 1):
        first, last = _begin(starts_ptr, k, a), _end(starts_ptr, k, a, N)
        mean, squares = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        for n in range(first, last, BN):
            x, mask = _load(x_ptr, n + tl.arange(0, BN), last, c, C)
            count = tl.minimum(last - n, BN).to(tl.float32)
            own = tl.sum(x, 0) / count
            distance = tl.where(mask, x - own[None, :], 0.0)
            before = (n - first).to(tl.float32)
            step = own - mean
            squares += tl.sum(distance * distance, 0) + step * step * (
                before * count / (before + count)
            )
            mean += step * (count / (before + count))
        part = part_ptr + (k + a).to(tl.int64) * (2 * C)
        tl.store(part + c, mean, c < C)
        tl.store(part + C + c, squares, c < C)


@triton.jit(do_not_specialize=["N"])
def _statistics(
    part_ptr, starts_ptr, mean_ptr, rstd_ptr, N, C, eps, groups,
    CG: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each asset and group, from its parts."""
    a, g = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts_ptr + a), tl.load(starts_ptr + a + 1)
    c = g * CG + tl.arange(0, BG)
    inside = tl.arange(0, BG) < CG
    total = tl.maximum((end - start).to(tl.float32) * CG, 1.0)
    mean = 0.0
    squares = 0.0
    for first in range(start // CHUNK, tl.where(end > start, (end - 1) // CHUNK + 1, 0), BP):
        k = first + tl.arange(0, BP)
        n = tl.maximum(tl.minimum(end, (k + 1) * CHUNK) - tl.maximum(start, k * CHUNK), 0).to(
            tl.float32
        )
        mask = (n > 0)[:, None] & inside[None, :]
        means = tl.load(
            part_ptr + (k + a).to(tl.int64)[:, None] * (2 * C) + c[None, :], mask, other=0.0
        )
        mean += tl.sum(tl.sum(means * n[:, None], 1), 0) / total
    for first in range(start // CHUNK, tl.where(end > start, (end - 1) // CHUNK + 1, 0), BP):
        k = first + tl.arange(0, BP)
        n = tl.maximum(tl.minimum(end, (k + 1) * CHUNK) - tl.maximum(start, k * CHUNK), 0).to(
            tl.float32
        )
        mask = (n > 0)[:, None] & inside[None, :]
        at = part_ptr + (k + a).to(tl.int64)[:, None] * (2 * C) + c[None, :]
        distance = tl.where(mask, tl.load(at, mask, other=0.0) - mean, 0.0)
        own = tl.load(at + C, mask, other=0.0)
        squares += tl.sum(tl.sum(own + distance * distance * n[:, None], 1), 0)
    tl.store(mean_ptr + a * groups + g, mean)
    tl.store(rstd_ptr + a * groups + g, 1.0 / tl.sqrt(squares / total + eps))


@triton.jit
def _normalised(x, c, a, C, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, CG):
    """x hat, 1 / standard deviation, and weight and bias of the channels."""
    at, ok = a * groups + c // CG, c < C
    rstd = tl.load(rstd_ptr + at, ok, other=0.0)
    hat = (x - tl.load(mean_ptr + at, ok, other=0.0)[None, :]) * rstd[None, :]
    weight = tl.load(weight_ptr + c, ok, other=0.0).to(tl.float32)
    return hat, rstd, weight, tl.load(bias_ptr + c, ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _apply(
    x_ptr, starts_ptr, ends_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, N, C, groups, CG,
    SILU: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    k, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    for a in range(tl.load(ends_ptr + 2 * k), tl.load(ends_ptr + 2 * k + 1) + 1):
        first, last = _begin(starts_ptr, k, a), _end(starts_ptr, k, a, N)
        for i in range(first, last, BN):
            n = i + tl.arange(0, BN)
            x, mask = _load(x_ptr, n, last, c, C)
            hat, _, weight, bias = _normalised(
                x, c, a, C, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, CG
            )
            y = hat * weight[None, :] + bias[None, :]
            if SILU:
                y = y * tl.sigmoid(y)
            tl.store(
                y_ptr + n.to(tl.int64)[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask
            )


@triton.jit
def _before_silu(dy, hat, weight, bias, SILU: tl.constexpr):
    """Gradient of what SiLU is applied to."""
    if SILU:
        z = hat * weight[None, :] + bias[None, :]
        s = tl.sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    return dy


@triton.jit(do_not_specialize=["N"])
def _grad_parts(
    dy_ptr, x_ptr, starts_ptr, ends_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, part_ptr, N, C, groups, CG,
    SILU: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of each part and channel the sums of dz and of dz * x hat."""
    k, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    for a in range(tl.load(ends_ptr + 2 * k), tl.load(ends_ptr + 2 * k + 1) + 1):
        first, last = _begin(starts_ptr, k, a), _end(starts_ptr, k, a, N)
        sums, products = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
        for i in range(first, last, BN):
            n = i + tl.arange(0, BN)
            x, _ = _load(x_ptr, n, last, c, C)
            dy, _ = _load(dy_ptr, n, last, c, C)
            hat, _, weight, bias = _normalised(
                x, c, a, C, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, CG
            )
            dz = _before_silu(dy, hat, weight, bias, SILU)  # zero past the end, as dy is
            sums += tl.sum(dz, 0)
            products += tl.sum(dz * hat, 0)
        part = part_ptr + (k + a).to(tl.int64) * (2 * C)
        tl.store(part + c, sums, c < C)
        tl.store(part + C + c, products, c < C)


@triton.jit
def _add_parts(part_ptr, starts_ptr, sum_ptr, W, BP: tl.constexpr, BC: tl.constexpr):
    """The parts of each asset, added in order: [A, W]."""
    a, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    start, end = tl.load(starts_ptr + a), tl.load(starts_ptr + a + 1)
    last = tl.where(end > start, (end - 1) // CHUNK + 1, 0)
    acc = tl.zeros([BC], tl.float32)
    for first in range(start // CHUNK, last, BP):
        k = first + tl.arange(0, BP)
        mask = (k < last)[:, None] & (c < W)[None, :]
        acc += tl.sum(
            tl.load(part_ptr + (k + a).to(tl.int64)[:, None] * W + c[None, :], mask, other=0.0), 0
        )
    tl.store(sum_ptr + a * W + c, acc, c < W)


@triton.jit(do_not_specialize=["N"])
def _grad_apply(
    dy_ptr, x_ptr, starts_ptr, ends_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, mean_dz_ptr, mean_dzx_ptr, dx_ptr,
    N, C, groups, CG, SILU: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    k, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    for a in range(tl.load(ends_ptr + 2 * k), tl.load(ends_ptr + 2 * k + 1) + 1):
        first, last = _begin(starts_ptr, k, a), _end(starts_ptr, k, a, N)
        at = a * groups + c // CG
        mean_dz = tl.load(mean_dz_ptr + at, c < C, other=0.0)[None, :]
        mean_dzx = tl.load(mean_dzx_ptr + at, c < C, other=0.0)[None, :]
        for i in range(first, last, BN):
            n = i + tl.arange(0, BN)
            x, mask = _load(x_ptr, n, last, c, C)
            dy, _ = _load(dy_ptr, n, last, c, C)
            hat, rstd, weight, bias = _normalised(
                x, c, a, C, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, groups, CG
            )
            dz = _before_silu(dy, hat, weight, bias, SILU) * weight[None, :]
            dx = (dz - mean_dz - hat * mean_dzx) * rstd[None, :]
            tl.store(
                dx_ptr + n.to(tl.int64)[:, None] * C + c[None, :],
                dx.to(dx_ptr.dtype.element_ty),
                mask,
            )


@functools.cache
def _tiles(C: int) -> dict[str, int]:
    BC = min(next_power_of_2(C), 128)
    return {"BN": max(1, 2048 // BC), "BC": BC}


def _chunks(x_NC: Tensor, starts: Tensor) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Grid over chunks and channels; first and last asset of each chunk, [chunks, 2]; room for the parts."""
    N, C = x_NC.shape
    chunks = cdiv(N, CHUNK.value)
    first = torch.arange(0, N, CHUNK.value, device=starts.device, dtype=torch.int32)
    rows = torch.stack([first, (first + (CHUNK.value - 1)).clamp_(max=N - 1)], 1)
    ends = torch.searchsorted(starts[1:].contiguous(), rows, right=True, out_int32=True)
    parts = x_NC.new_empty(chunks + len(starts) - 1, 2, C, dtype=torch.float32)
    return (chunks, cdiv(C, _tiles(C)["BC"])), ends, parts


def _forward(
    x: Tensor, starts: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, and mean and 1 / standard deviation of each asset and group."""
    x, (N, C), A = x.contiguous(), x.shape, len(starts) - 1
    y, CG = torch.empty_like(x), C // groups
    mean, rstd = (x.new_zeros(A, groups, dtype=torch.float32) for _ in range(2))
    if N == 0:
        return y, mean, rstd
    grid, ends, parts = _chunks(x, starts)
    weight, bias = weight.contiguous(), bias.contiguous()
    with on_device(x):
        _parts[grid](x, starts, ends, parts, N, C, **_tiles(C))
        BG = next_power_of_2(CG)
        _statistics[(A, groups)](
            parts, starts, mean, rstd, N, C, eps, groups, CG=CG, BP=max(1, 1024 // BG), BG=BG
        )  # fmt: skip
        _apply[grid](
            x, starts, ends, mean, rstd, weight, bias, y, N, C, groups, CG, SILU=silu, **_tiles(C)
        )
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
    """Gradients of x, weight and bias; the latter two in fp32."""
    dy, x, weight, bias = (t.contiguous() for t in (dy, x, weight, bias))
    (N, C), (A, groups) = x.shape, mean.shape
    dx, CG = torch.empty_like(x), C // groups
    if N == 0:
        return dx, *(x.new_zeros(C, dtype=torch.float32) for _ in range(2))
    grid, ends, parts = _chunks(x, starts)
    sums_A2C = x.new_empty(A, 2, C, dtype=torch.float32)
    with on_device(x):
        _grad_parts[grid](
            dy, x, starts, ends, mean, rstd, weight, bias, parts, N, C, groups, CG, SILU=silu, **_tiles(C)
        )  # fmt: skip
        _add_parts[(A, cdiv(2 * C, 16))](parts, starts, sums_A2C, 2 * C, BP=64, BC=16)
        counts_A11 = starts.diff().clamp(min=1)[:, None, None] * CG
        means_A2G = (sums_A2C * weight.float()).view(A, 2, groups, CG).sum(3) / counts_A11
        mean_dz, mean_dzx = (means_A2G[:, i].contiguous() for i in range(2))
        _grad_apply[grid](
            dy, x, starts, ends, mean, rstd, weight, bias, mean_dz, mean_dzx, dx, N, C, groups, CG, SILU=silu,
            **_tiles(C),
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
    """Normalises each asset's groups of C / groups channels over all its rows: [N, C] -> [N, C] in x's dtype.

    Asset a has rows asset_starts[a]:asset_starts[a + 1] (int32 on x's device, ascending from 0 to N; may be empty);
    its statistics are taken in fp32 at least, with the biased variance, as torch's GroupNorm. weight and bias in x's
    dtype or float32. silu applies SiLU to the result. Differentiable in x, weight and bias. ValueError for other
    shapes, dtypes or devices.
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
    if x_NC.ndim != 2 or not x_NC.is_floating_point():
        raise ValueError(f"x_NC must be floating [N, C], got {x_NC.dtype} {list(x_NC.shape)}")
    C = x_NC.shape[1]
    if not isinstance(groups, int) or groups < 1 or C % groups:
        raise ValueError(f"groups must divide the {C} channels, got {groups!r}")
    if starts_A1.ndim != 1 or len(starts_A1) < 2 or starts_A1.dtype != torch.int32:
        found = f"{starts_A1.dtype} {list(starts_A1.shape)}"
        raise ValueError(f"asset_starts_A1 must be int32 [A + 1] with A >= 1, got {found}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    for name, w in (("weight_C", weight_C), ("bias_C", bias_C)):
        if w.shape != (C,):
            raise ValueError(f"{name} must be [{C}], got {list(w.shape)}")
        if w.dtype not in (x_NC.dtype, torch.float32):
            raise ValueError(f"{name} must be {x_NC.dtype} as x_NC or torch.float32, got {w.dtype}")
    for name, t in (("asset_starts_A1", starts_A1), ("weight_C", weight_C), ("bias_C", bias_C)):
        if t.device != x_NC.device:
            raise ValueError(f"{name} must be on x_NC's device {x_NC.device}, got {t.device}")
