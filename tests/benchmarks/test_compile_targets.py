"""The table of compiled kernels: what is counted, and that no kernel is left out."""

import pytest

from benchmarks.compile_targets import Target, check_complete, kernels_in_source, table_row
from pipeline.core.errors import RunError

TARGET = Target(name="1", example="a GPU", shared_limit=1000)


def launch(name, **values):
    return {"name": name, "registers": 10, "spilled": 0, "shared": 0, **values}


def test_a_row_counts_kernels_and_names_those_that_do_not_fit():
    launches = [
        launch("_a", shared=1000),
        launch("_a", registers=20, spilled=8),
        launch("_b", shared=1001),
        {"name": "_c", "failed": "reason"},
        launch("_c"),
    ]
    assert table_row("x", TARGET, launches) == (
        "| x (a GPU) | 2 of 3 | `_c` | 20 | 1, at most 8 (`_a`) | 1001 (`_b`) of 1000 "
        "| 1 of 4: `_b` |"
    )
    assert table_row("x", TARGET, launches[:1]) == (
        "| x (a GPU) | 1 of 1 | none | 10 | 0 | 1000 (`_a`) of 1000 | 0 |"
    )


SOURCE = """
@triton.jit
def _part(x): pass

@triton.jit(do_not_specialize=["x"])
def _first(x): _part(x)

@triton.jit
def _second_one(x): _part(x)

def _no_kernel(): pass

def launch(): _first[(1,)](_no_kernel)

KERNELS = (_second_one,)
"""


def test_a_kernel_that_no_step_launches_is_named(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE, encoding="utf-8")
    assert kernels_in_source(tmp_path) == {"_first", "_second_one"}
    check_complete([launch("_first"), launch("_second_one")], {"_first", "_second_one"})
    with pytest.raises(RunError, match="launches _second_one; add"):
        check_complete([launch("_first")], {"_first", "_second_one"})


def test_the_kernels_of_the_project_are_found():
    assert {"_segment_fwd", "_gather_gemm", "_weight_grad", "_votes"} <= kernels_in_source()
