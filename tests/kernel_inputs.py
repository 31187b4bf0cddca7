"""Random batches for kernel tests, and comparison with the reference.

The tolerance of a kernel is the error that the reference itself has in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import BlockIndex, token_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_coords(tokens: Sequence[int], side: int | tuple[int, int, int], seed: int = 0) -> Tensor:
    """Distinct random voxels, unsorted within each asset: int32 [N, 4] = (batch, x, y, z).

    Args:
        tokens: Number of voxels of each asset.
        side: Side of the grid in voxels, or its three sides.
        seed: Seed of the generator.
    """
    X, Y, Z = (side,) * 3 if isinstance(side, int) else side
    generator = torch.Generator().manual_seed(seed)
    assets = []
    for asset, n in enumerate(tokens):
        flat = torch.randperm(X * Y * Z, generator=generator)[:n]
        xyz = torch.stack([flat // (Y * Z), flat // Z % Y, flat % Z], 1)
        assets.append(torch.cat([torch.full((n, 1), asset), xyz], 1))
    return torch.cat(assets).int()


def random_index(
    tokens: Sequence[int], side: int | tuple[int, int, int], seed: int = 0, **sizes: int
) -> BlockIndex:
    """Block index of `random_coords` on DEVICE. `sizes` are those of `BlockIndex.from_coords`."""
    coords = random_coords(tokens, side, seed)
    blocks = {name: sizes[name] for name in ("select_block", "compress_block") if name in sizes}
    return BlockIndex.from_coords(
        coords[token_order(coords, **blocks)].to(DEVICE), len(tokens), **sizes
    )


def error(x: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, infinite if x is not finite where `exact` is."""
    difference = (x.detach().double().cpu() - exact.detach().double().cpu()).abs()
    difference = torch.nan_to_num(difference, nan=float("inf"), posinf=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


def assert_close_as(
    x: Tensor, exact: Tensor, rounded: Tensor, name: str = "value", size: float = 0.0
) -> None:
    """Assert that the error of x is at most twice the reference's own, or 4 ulp of max|exact|.

    Args:
        x: Result of the kernel.
        exact: The fp64 reference on the same inputs.
        rounded: The reference in the dtype of x.
        name: Name of the value in the message.
        size: Stands for max|exact| where `exact` cancels to nothing.
    """
    assert x.shape == exact.shape, (name, x.shape, exact.shape)
    assert x.dtype == rounded.dtype, (name, x.dtype, rounded.dtype)
    largest = exact.detach().abs().max().item() if exact.numel() else 0.0
    largest = size if largest < 1e-9 * size else largest
    allowed = max(2 * error(rounded, exact), 4 * torch.finfo(x.dtype).eps * largest)
    assert error(x, exact) <= allowed, f"{name}: error {error(x, exact):.3g} > {allowed:.3g}"


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Return the function's value on copies of the inputs, and the gradient of each input.

    The cotangent is random and fixed by the seed.
    """
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    cotangent = torch.randn(
        value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    cotangent = cotangent.to(torch.bfloat16)  # the same number in every dtype
    value.backward(cotangent.to(value))
    return [
        value.detach(),
        *(x.grad if x.grad is not None else torch.zeros_like(x) for x in inputs),
    ]


def assert_no_worse(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    names: Sequence[str] = (),
) -> None:
    """Assert `assert_close_as` for the value and all gradients of a kernel."""
    results = run(kernel, inputs)
    exact = run(reference, [x.double() for x in inputs])
    rounded = run(reference, inputs)
    labels = ["value", *(f"gradient of {name}" for name in names or range(len(inputs)))]
    size = max((e.abs().max().item() for e in exact if e.numel()), default=0.0)
    for label, x, e, r in zip(labels, results, exact, rounded, strict=True):
        assert_close_as(x, e, r, label, size)
