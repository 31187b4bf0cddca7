"""Pooling to parent voxels against a loop over the parents."""

from __future__ import annotations

import pytest
import torch

from kernels import parent_voxels, pool_children
from tests.kernel_inputs import DEVICE, assert_no_worse, random_coords

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

SETS = {"sparse": ([40, 0, 25], 7), "full": ([64], 4), "none": ([0], 3)}


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("blocks", SETS)
def test_the_reference_is_the_mean_of_the_children(blocks, plus_one):
    family = parent_voxels(random_coords(*SETS[blocks]))
    x = torch.randn(
        len(family.parent_of_N), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    pooled = pool_children(x, family.children_P8, plus_one=plus_one)
    assert pooled.shape == (len(family.coords_P4), 3)
    for parent, row in enumerate(pooled):
        children = x[family.parent_of_N == parent]
        torch.testing.assert_close(
            row, children.sum(0) / (len(children) + plus_one), rtol=1e-14, atol=1e-14
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 33, 130])
@pytest.mark.parametrize("blocks", SETS)
def test_value_and_gradient(blocks, C, dtype):
    children = parent_voxels(random_coords(*SETS[blocks]).to(DEVICE)).children_P8
    x = (
        torch.randn(C, sum(SETS[blocks][0]), generator=torch.Generator().manual_seed(0))
        .to(DEVICE, dtype)
        .T
    )
    for plus_one in (False, True):
        assert_no_worse(
            lambda x, p=plus_one: pool_children(x, children, plus_one=p, backend="triton"),
            lambda x, p=plus_one: pool_children(x, children, plus_one=p, backend="reference"),
            [x],
        )


def test_rows_without_a_parent_have_no_gradient():
    children = torch.tensor([[3, -1, -1, -1, -1, 0, -1, -1]], dtype=torch.int32, device=DEVICE)
    x = torch.ones(5, 2, device=DEVICE, requires_grad=True)
    pool_children(x, children, backend="triton").sum().backward()
    assert x.grad[:, 0].tolist() == [0.5, 0, 0, 0.5, 0]


def test_as_a_custom_operator():
    children = parent_voxels(random_coords([9], 3).to(DEVICE)).children_P8
    x = torch.randn(9, 4, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.sparse3d.pool_children.default, (x, children, True))
    compiled = torch.compile(
        lambda x: pool_children(x, children, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), pool_children(x, children, backend="triton"))


def test_gradcheck():
    children = parent_voxels(random_coords([12, 5], 4)).children_P8
    x = torch.randn(17, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pool_children(x, children), [x])


@pytest.mark.parametrize(
    ("x", "children", "message"),
    [
        (
            torch.zeros(3),
            torch.zeros(1, 8).int(),
            r"x_NC must be floating \[N, C\], got torch.float32 \[3\]",
        ),
        (
            torch.zeros(3, 2),
            torch.zeros(1, 7).int(),
            r"children_P8 must be int32 \[P, 8\], got torch.int32 \[1, 7\]",
        ),
        (
            torch.zeros(3, 2),
            torch.zeros(1, 8),
            r"children_P8 must be int32 \[P, 8\], got torch.float32",
        ),
        (
            torch.zeros(3, 2),
            torch.zeros(1, 8, device="meta").int(),
            "children_P8 must be on x_NC's device cpu",
        ),
    ],
)
def test_bad_arguments_are_named(x, children, message):
    with pytest.raises(ValueError, match=message):
        pool_children(x, children)
