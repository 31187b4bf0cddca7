"""Residual, gate, LayerNorm and modulation in one pass over the rows of a ragged batch.

The definition is `norm` of `gated_add` in kernels.fused.reference. No [N, C] copy of a vector per
asset is made.

The backward sums the gradients of these vectors without atomics. Rows are cut into chunks of CHUNK
rows. The rows that chunk k has of asset a are a part. Its number k + a belongs to no other part,
because from one part to the next neither k nor a decreases. Parts are added in order, so that
gradients are bit-identical from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import reference
from kernels.runtime import eager_autograd
from kernels.runtime.checks import check_device, check_dtype, check_float_rows, use_triton
from kernels.runtime.integer_math import cdiv, next_power_of_2
from kernels.runtime.triton_ops import on_device

CHUNK = tl.constexpr(32)
# What follows the normalisation.
_PLAIN, _WEIGHTS, _MODULATION = 0, 1, 2


@triton.jit
def _load(x_ptr, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load C numbers in fp32, padded with zeros: [BLOCK_C]."""
    x = tl.load(x_ptr + c) if C == BLOCK_C else tl.load(x_ptr + c, c < C, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(x_ptr, x, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store what `_load` loads, in the dtype of the target."""
    x = x.to(x_ptr.dtype.element_ty)
    if C == BLOCK_C:
        tl.store(x_ptr + c, x)
    else:
        tl.store(x_ptr + c, x, c < C)


@triton.jit
def _load_scale(scale_ptr, asset, stride, c, C: tl.constexpr, BLOCK_C: tl.constexpr,
                KIND: tl.constexpr):  # fmt: skip
    """Factors that follow the normalisation: [BLOCK_C]."""
    if KIND == 2:
        scale = 1.0 + _load(scale_ptr + asset * stride, c, C, BLOCK_C)
    elif KIND == 1:
        scale = _load(scale_ptr, c, C, BLOCK_C)
    else:
        scale = tl.full([BLOCK_C], 1.0, tl.float32)
    return scale


@triton.jit
def _add_norm_fwd(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, asset_ptr, sum_ptr, y_ptr, mean_ptr,
    rstd_ptr, gate_stride, stride, eps, C: tl.constexpr, BLOCK_C: tl.constexpr,
    BRANCH: tl.constexpr, GATE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    # One program: one row.
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    asset = tl.load(asset_ptr + n).to(tl.int64)
    x = _load(x_ptr + n * C, c, C, BLOCK_C)

    # The sum is rounded as it is stored, so that a second pass over it gives the same bits.
    if BRANCH:
        branch = _load(branch_ptr + n * C, c, C, BLOCK_C)
        if GATE:
            branch *= _load(gate_ptr + asset * gate_stride, c, C, BLOCK_C)
        x = (x + branch).to(sum_ptr.dtype.element_ty)
        _store(sum_ptr + n * C, x, c, C, BLOCK_C)
        x = x.to(tl.float32)

    # Normalise, scale and shift.
    mean = tl.sum(x, 0) / C
    deviation = x - mean
    if C != BLOCK_C:
        deviation = tl.where(c < C, deviation, 0.0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 0) / C + eps)
    y = deviation * rstd
    if KIND > 0:
        y *= _load_scale(scale_ptr, asset, stride, c, C, BLOCK_C, KIND)
        y += _load(shift_ptr + (asset * stride if KIND == 2 else 0), c, C, BLOCK_C)
    _store(y_ptr + n * C, y, c, C, BLOCK_C)
    tl.store(mean_ptr + n, mean)
    tl.store(rstd_ptr + n, rstd)


@triton.jit(do_not_specialize=["N"])
def _add_norm_bwd(
    dsum_ptr, dy_ptr, sum_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, asset_ptr,
    starts_ptr, dx_ptr, dbranch_ptr, part_ptr, N, parts, gate_stride, stride, C: tl.constexpr,
    BLOCK_C: tl.constexpr, DSUM: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    # One program: one chunk of rows, asset by asset. parts [3, parts, C] receives the sums of the
    # gradients of shift, scale and gate.
    k = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    chunk_end = tl.minimum((k + 1) * CHUNK, N)
    last_asset = tl.load(asset_ptr + chunk_end - 1)
    for a in range(tl.load(asset_ptr + k * CHUNK), last_asset + 1):
        asset = a + k * 0  # in 64 bits
        start = tl.maximum(tl.load(starts_ptr + asset).to(tl.int64), k * CHUNK)
        end = tl.minimum(tl.load(starts_ptr + asset + 1).to(tl.int64), chunk_end)
        scale = _load_scale(scale_ptr, asset, stride, c, C, BLOCK_C, KIND)
        gate = scale
        if GATE:
            gate = _load(gate_ptr + asset * gate_stride, c, C, BLOCK_C)
        dshift, dscale = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
        dgate = dshift
        for n in tl.range(start, end, num_stages=3):
            # Gradient of the normalised row, then of the row.
            rstd = tl.load(rstd_ptr + n)
            x = _load(sum_ptr + n * C, c, C, BLOCK_C)
            normal = (x - tl.load(mean_ptr + n)) * rstd
            if C != BLOCK_C:
                normal = tl.where(c < C, normal, 0.0)
            dy = _load(dy_ptr + n * C, c, C, BLOCK_C)
            if KIND > 0:
                dshift += dy
                dscale += dy * normal
            dnormal = dy * scale
            mean_gradient = tl.sum(dnormal, 0) / C
            slope = tl.sum(dnormal * normal, 0) / C
            dx = (dnormal - mean_gradient - normal * slope) * rstd
            if DSUM:
                dx += _load(dsum_ptr + n * C, c, C, BLOCK_C)
            _store(dx_ptr + n * C, dx, c, C, BLOCK_C)
            if BRANCH:
                dbranch = dx
                if GATE:
                    dgate += dx * _load(branch_ptr + n * C, c, C, BLOCK_C)
                    dbranch = dx * gate
                _store(dbranch_ptr + n * C, dbranch, c, C, BLOCK_C)
        part = part_ptr + (k + asset) * C
        if KIND > 0:
            _store(part, dshift, c, C, BLOCK_C)
            _store(part + parts * C, dscale, c, C, BLOCK_C)
        if GATE:
            _store(part + parts * C * 2, dgate, c, C, BLOCK_C)


@triton.jit(do_not_specialize=["parts", "first_sum"])
def _add_parts(
    part_ptr, starts_ptr, sum_ptr, parts, first_sum, C: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program: the sum over the parts of one asset, of BLOCK_C channels of one of the gradients.
    a, i = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start, end = tl.load(starts_ptr + a), tl.load(starts_ptr + a + 1)
    last = tl.where(end > start, (end - 1) // CHUNK + 1, 0)
    part_ptr += (first_sum + i) * parts * C
    acc = tl.zeros([BLOCK_C], tl.float32)
    for first in range(start // CHUNK, last, BLOCK_P):
        k = first + tl.arange(0, BLOCK_P)
        mask = (k < last)[:, None] & (c < C)[None, :]
        part = tl.load(part_ptr + (k + a)[:, None] * C + c[None, :], mask, other=0.0)
        acc += tl.sum(part, 0)  # [BLOCK_P, BLOCK_C] before the sum
    to = (i * tl.num_programs(0) + a) * C + c
    tl.store(sum_ptr + to, acc.to(sum_ptr.dtype.element_ty), c < C)


def _kind(scale: Tensor | None) -> int:
    return _PLAIN if scale is None else _WEIGHTS if scale.ndim == 1 else _MODULATION


def _rows(vector: Tensor | None) -> Tensor | None:
    """Return the vectors of the assets with contiguous channels. Their rows may lie apart."""
    if vector is None or vector.stride(-1) == 1:
        return vector
    return vector.contiguous()


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None or vector.ndim == 1 else vector.stride(0)


def _forward(x, branch, gate, shift, scale, asset_of, eps, dtype) -> tuple[Tensor, ...]:
    """Return the sum (empty without a branch), its norm, and mean and 1 / deviation of each row."""
    x = x.contiguous()
    N, C = x.shape
    sum_NC = x.new_empty(0) if branch is None else torch.empty_like(x)
    y = x.new_empty(N, C, dtype=dtype)
    mean, rstd = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    branch = x if branch is None else branch.contiguous()
    gate, shift, scale = map(_rows, (gate, shift, scale))
    if N:
        with on_device(x):
            _add_norm_fwd[(N,)](
                x, branch, x if gate is None else gate, x if shift is None else shift,
                x if scale is None else scale, asset_of, sum_NC, y, mean, rstd, _stride(gate),
                _stride(scale), eps, C, next_power_of_2(C), BRANCH=len(sum_NC) > 0,
                GATE=gate is not None, KIND=_kind(scale), num_warps=4,
            )  # fmt: skip
    return sum_NC, y, mean, rstd


def _backward(
    dsum, dy, x, branch, gate, scale, mean, rstd, asset_of, starts, has_branch, branch_dtype
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, branch, gate, shift and scale. `x` is the sum."""
    N, C = x.shape
    A = len(starts) - 1
    kind = _kind(scale)
    gate, scale = map(_rows, (gate, scale))
    dx = torch.empty_like(x)
    dbranch = x.new_empty(N, C, dtype=branch_dtype) if has_branch else None
    parts = cdiv(N, CHUNK.value) + A
    part = x.new_empty(3, parts, C, dtype=torch.float32)
    dsum = None if dsum is None else dsum.contiguous()
    # One launch sums all parts where shift, scale and gate have one dtype.
    together = scale is not None and gate is not None and scale.dtype == gate.dtype
    sums = None if scale is None else scale.new_empty(3 if together else 2, A, C)
    dgate = gate.new_empty(1, A, C) if gate is not None and not together else None
    with on_device(x):
        if N:
            _add_norm_bwd[(cdiv(N, CHUNK.value),)](
                x if dsum is None else dsum, dy.contiguous(), x, x if branch is None else branch,
                x if gate is None else gate, x if scale is None else scale, mean, rstd, asset_of,
                starts, dx, dx if dbranch is None else dbranch, part, N, parts, _stride(gate),
                _stride(scale), C, next_power_of_2(C), DSUM=dsum is not None, BRANCH=has_branch,
                GATE=gate is not None, KIND=kind, num_warps=4,
            )  # fmt: skip
        for first, total in ((0, sums), (2, dgate)):
            if total is not None:
                _add_parts[(A, cdiv(C, 64), len(total))](
                    part, starts, total, parts, first, C, BLOCK_P=64, BLOCK_C=64, num_warps=4
                )
    dshift = dscale = None
    if sums is not None:
        dshift, dscale, *rest = sums.unbind()
        if kind == _WEIGHTS:
            dshift, dscale = dshift.sum(0), dscale.sum(0)
        dgate = rest[0][None] if rest else dgate
    return dx, dbranch, None if dgate is None else dgate[0], dshift, dscale


@torch.library.custom_op("sparse3d::add_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    asset_of: Tensor,
    starts: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, branch, gate, shift, scale, asset_of, eps, dtype)


@_add_norm.register_fake
def _(x, branch, gate, shift, scale, asset_of, starts, eps, dtype):
    N, C = x.shape
    total = x.new_empty(0) if branch is None else x.new_empty(N, C)
    statistics = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
    return total, x.new_empty(N, C, dtype=dtype), *statistics


@torch.library.custom_op("sparse3d::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dsum: Tensor | None,
    dy: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    asset_of: Tensor,
    starts: Tensor,
    has_branch: bool,
    branch_dtype: torch.dtype,
) -> list[Tensor]:
    grads = _backward(
        dsum, dy, x, branch, gate, scale, mean, rstd, asset_of, starts, has_branch, branch_dtype
    )
    dx, dbranch, *vectors = grads
    # Results of an operator must not share memory, as the sums over the parts do.
    vectors = [grad if grad is None else grad.clone() for grad in vectors]
    return [grad for grad in (dx, dbranch, *vectors) if grad is not None]


@_add_norm_backward.register_fake
def _(dsum, dy, x, branch, gate, scale, mean, rstd, asset_of, starts, has_branch, branch_dtype):
    grads = [x.new_empty(x.shape)]
    if has_branch:
        grads.append(x.new_empty(x.shape, dtype=branch_dtype))
    if gate is not None:
        grads.append(gate.new_empty(gate.shape))
    if scale is not None:
        grads += [scale.new_empty(scale.shape) for _ in range(2)]
    return grads


def _kept(x, branch, gate, total) -> tuple[Tensor, Tensor | None]:
    """Return what the backward pass needs of the sum and of the branch."""
    return x if branch is None else total, None if gate is None else branch


def _setup(ctx, inputs, output):
    x, branch, gate, _, scale, asset_of, starts, _, _ = inputs
    total, _, mean, rstd = output
    ctx.has_branch = branch is not None
    ctx.branch_dtype = x.dtype if branch is None else branch.dtype
    sum_NC, kept_branch = _kept(x, branch, gate, total)
    ctx.save_for_backward(sum_NC, kept_branch, gate, scale, mean, rstd, asset_of, starts)
    ctx.set_materialize_grads(False)


def _op_backward(ctx, dsum, dy, *_):
    saved = ctx.saved_tensors
    x, _, gate, scale, *_ = saved
    if dy is None and dsum is None:
        return (None,) * 9
    if not ctx.has_branch:
        dsum = None
    dy = torch.zeros_like(x) if dy is None else dy
    found = iter(_add_norm_backward(dsum, dy, *saved, ctx.has_branch, ctx.branch_dtype))
    exists = (True, ctx.has_branch, gate is not None, scale is not None, scale is not None)
    return *(next(found) if given else None for given in exists), None, None, None, None


_add_norm.register_autograd(_op_backward, setup_context=_setup)


def _eager_forward(x, branch, gate, shift, scale, asset_of, starts, eps, dtype):
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    total, y, mean, rstd = _forward(x, branch, gate, shift, scale, asset_of, eps, dtype)
    results = y if branch is None else (total, y)
    saved = (*_kept(x, branch, gate, total), gate, scale, mean, rstd, asset_of, starts)
    return results, saved, (branch is not None, x.dtype if branch is None else branch.dtype)


def _eager_backward(_, *args):
    *grads, saved, (has_branch, branch_dtype) = args
    dsum, dy = grads if has_branch else (None, *grads)
    dy = torch.zeros_like(saved[0]) if dy is None else dy
    return _backward(dsum, dy, *saved, has_branch, branch_dtype)


def _check(x_NC, branch_NC, gate, shift, scale, asset_of_N, starts_A1, eps) -> None:
    check_float_rows("x_NC", x_NC)
    N, C = x_NC.shape
    if starts_A1.ndim != 1 or len(starts_A1) < 2 or starts_A1.dtype != torch.int32:
        raise ValueError(
            "asset_starts_A1 must be int32 [A + 1] with A >= 1, "
            f"got {starts_A1.dtype} {list(starts_A1.shape)}"
        )
    if asset_of_N.shape != (N,) or asset_of_N.dtype != torch.int32:
        raise ValueError(
            f"asset_of_N must be int32 [{N}], got {asset_of_N.dtype} {list(asset_of_N.shape)}"
        )
    if branch_NC is not None and branch_NC.shape != x_NC.shape:
        raise ValueError(
            f"branch_NC must be {list(x_NC.shape)} as x_NC, got {list(branch_NC.shape)}"
        )
    per_asset = (len(starts_A1) - 1, C)
    if gate is not None and gate.shape != per_asset:
        raise ValueError(f"gate_AC must be {list(per_asset)}, got {list(gate.shape)}")
    if (shift is None) != (scale is None):
        raise ValueError("shift and scale must be given together, got one of them")
    if scale is not None:
        if scale.shape not in (per_asset, (C,)) or shift.shape != scale.shape:
            raise ValueError(
                f"shift and scale must both be {list(per_asset)} or both [{C}], "
                f"got {list(shift.shape)} and {list(scale.shape)}"
            )
        if shift.dtype != scale.dtype:
            raise ValueError(f"shift must be {scale.dtype} as scale, got {shift.dtype}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    named = {
        "branch_NC": branch_NC,
        "gate_AC": gate,
        "shift": shift,
        "scale": scale,
        "asset_of_N": asset_of_N,
        "asset_starts_A1": starts_A1,
    }
    for name, tensor in named.items():
        if tensor is not None:
            check_device(name, tensor, "x_NC", x_NC)


def _run(x, branch, gate, shift, scale, asset_of, starts, eps, dtype):
    for name, tensor in (("x_NC", x), ("branch_NC", branch), ("gate_AC", gate), ("scale", scale)):
        if tensor is not None:
            check_dtype(name, tensor)
    inputs = (x, branch, gate, shift, scale, asset_of, starts, eps, dtype)
    if eager_autograd.needs_dispatcher(x, branch, gate, shift, scale):
        total, y, _, _ = _add_norm(*inputs)
        return y if branch is None else (total, y)
    return eager_autograd.apply(
        _eager_forward, _eager_backward, *inputs, differentiable=1 if branch is None else 2
    )


def norm(
    x_NC: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    asset_of_N: Tensor,
    asset_starts_A1: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm of each row, then scale and shift. Differentiable.

    Args:
        x_NC: [N, C], fp32, bf16 or fp16, rows sorted by asset. Statistics are fp32.
        shift: [A, C], one row per asset; or [C]; or None together with `scale`.
        scale: [A, C], to which one is added, as in adaptive LayerNorm; or [C], the weights of a
            LayerNorm; or None.
        asset_of_N: int32 [N], asset of each row, ascending.
        asset_starts_A1: int32 [A + 1], first row of each asset, and N.
        eps: Added to the variance.
        dtype: Dtype of the result. None is that of `x_NC`.
        backend: "auto" takes Triton for CUDA tensors and the torch reference for others. "triton"
            works on CPU tensors only in Triton's interpreter. "reference" takes the torch
            definition with any float dtype.

    Returns:
        [N, C] in `dtype`.

    Raises:
        ValueError: If a shape, dtype, device or option does not fit.
    """
    _check(x_NC, None, None, shift, scale, asset_of_N, asset_starts_A1, eps)
    dtype = dtype or x_NC.dtype
    if not use_triton(backend, x_NC):
        return reference.norm(x_NC, shift, scale, asset_of_N, eps, dtype)
    return _run(x_NC, None, None, shift, scale, asset_of_N, asset_starts_A1, eps, dtype)


def add_norm(
    x_NC: Tensor,
    branch_NC: Tensor,
    gate_AC: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    asset_of_N: Tensor,
    asset_starts_A1: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and `norm` of that sum, in one pass. Differentiable.

    Gradients of gate, shift and scale are sums in a fixed order.

    Args:
        x_NC: [N, C], the residual stream, rows sorted by asset.
        branch_NC: [N, C], what is added to it, in any of the kernels' dtypes.
        gate_AC: [A, C], a factor of the branch for each asset. None stands for one.
        shift: As in `norm`.
        scale: As in `norm`.
        asset_of_N: As in `norm`.
        asset_starts_A1: As in `norm`.
        eps: As in `norm`.
        dtype: Dtype of the normalised rows. None is that of `x_NC`.
        backend: As in `norm`.

    Returns:
        The sum [N, C] in the dtype of `x_NC`, and its norm [N, C] in `dtype`.

    Raises:
        ValueError: If a shape, dtype, device or option does not fit.
    """
    _check(x_NC, branch_NC, gate_AC, shift, scale, asset_of_N, asset_starts_A1, eps)
    dtype = dtype or x_NC.dtype
    if not use_triton(backend, x_NC):
        sum_NC = reference.gated_add(x_NC, branch_NC, gate_AC, asset_of_N)
        return sum_NC, reference.norm(sum_NC, shift, scale, asset_of_N, eps, dtype)
    return _run(x_NC, branch_NC, gate_AC, shift, scale, asset_of_N, asset_starts_A1, eps, dtype)
