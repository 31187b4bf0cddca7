"""Argument checks of the public attention functions."""

from __future__ import annotations

from torch import Tensor

from kernels.attention.block_index import BlockIndex
from kernels.runtime.checks import check_dtype, check_same_type, use_triton

HEAD_SIZES = (16, 32, 64, 128)
HEADS_PER_GROUP = (1, 2, 4, 8, 16, 32)


def check_head_size(name: str, D: int) -> None:
    """Raise ValueError unless D is a head size that the kernels are written for."""
    if D not in HEAD_SIZES:
        raise ValueError(f"{name} must have a head size in {HEAD_SIZES}, got {D}")


def check_heads(
    q_NHD: Tensor, keys: list[tuple[str, Tensor, int]], index: BlockIndex, backend: str
) -> bool:
    """Check that queries, keys and values fit each other and the index.

    Args:
        q_NHD: Queries.
        keys: As in `check_tensors`.
        index: Block index of the N tokens.
        backend: As for `use_triton`.

    Returns:
        Whether the Triton kernels run.

    Raises:
        ValueError: If a tensor does not fit.
    """
    on_triton = check_tensors(q_NHD, keys, index.num_tokens, backend)
    if q_NHD.device != index.device:
        raise ValueError(f"q_NHD must be on the index's device {index.device}, got {q_NHD.device}")
    return on_triton


def check_tensors(q_NHD: Tensor, keys: list[tuple[str, Tensor, int]], N: int, backend: str) -> bool:
    """Check that queries, keys and values fit each other.

    The head size and the heads per key/value head are restricted for backend "auto" on the CPU too,
    so that code that runs on the CPU also runs on a GPU. Only backend "reference" takes any size.

    Args:
        q_NHD: Queries.
        keys: (name, tensor, its number of rows) of each key and value tensor, [rows, G, D].
        N: Number of queries.
        backend: As for `use_triton`.

    Returns:
        Whether the Triton kernels run.

    Raises:
        ValueError: If a tensor does not fit.
    """
    on_triton = use_triton(backend, q_NHD)
    if q_NHD.ndim != 3 or q_NHD.shape[0] != N:
        raise ValueError(f"q_NHD must be [{N}, H, D], like the index, got {list(q_NHD.shape)}")
    _, H, D = q_NHD.shape
    first_name, first, _ = keys[0]
    G = first.shape[1] if first.ndim == 3 else 0
    for name, x, rows in keys:
        if x.ndim != 3 or x.shape[0] != rows or x.shape[2] != D or x.shape[1] != G:
            raise ValueError(
                f"{name} must be [{rows}, G, {D}] with one G for all keys and values, "
                f"got {list(x.shape)}"
            )
        check_same_type(name, x, "q_NHD", q_NHD)
    if G == 0 or H % G:
        raise ValueError(
            f"q_NHD must have a multiple of the {G} key/value heads of {first_name}, got {H} heads"
        )
    if on_triton:
        check_dtype("q_NHD", q_NHD)
    if backend != "reference":
        check_head_size("q_NHD", D)
        if H // G not in HEADS_PER_GROUP:
            raise ValueError(
                f"q_NHD must have 1, 2, 4, 8, 16 or 32 heads per key/value head, got {H} / {G}"
            )
    return on_triton


def check_gates(gates_N3: Tensor, rows: int, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless the gates are [rows, 3] with the dtype and device of `like`."""
    if gates_N3.shape != (rows, 3):
        raise ValueError(f"gates_N3 must be [{rows}, 3], got {list(gates_N3.shape)}")
    check_same_type("gates_N3", gates_N3, like_name, like)


def check_top_k(top_k: int) -> None:
    """Raise ValueError unless `top_k` is an int of at least 1."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k must be an int of at least 1, got {top_k!r}")


def check_scale(scale: float | None, D: int) -> float:
    """Return the scale, 1 / sqrt(D) for None. Raise ValueError unless it is positive and finite."""
    if scale is None:
        return D**-0.5
    if not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return float(scale)
