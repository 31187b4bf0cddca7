"""The public names of `kernels` and its sub-packages are lazy and always mean the function."""

from __future__ import annotations

import ast

import pytest

from tests.child_python import ROOT, run_python

RUNTIME = ROOT / "kernels" / "runtime"


@pytest.mark.parametrize("package", ["kernels", "kernels.attention", "kernels.conv"])
def test_importing_a_package_imports_neither_torch_nor_triton(package):
    loaded = run_python("-c", f"import sys, {package}; print(*sys.modules)").stdout.split()
    assert not {"torch", "triton", "numpy"} & set(loaded)


@pytest.mark.parametrize("modules_first", [False, True])
def test_a_public_name_is_the_function_also_after_the_module_of_that_name_is_imported(
    modules_first,
):
    modules = (
        "import kernels.attention.block_mean, kernels.conv.group_norm\n"
        "import kernels.conv.sdf_head, kernels.conv.sparse_conv\n"
    )
    code = f"""
import importlib, sys
{modules if modules_first else ""}
exported = {{}}
for package in map(importlib.import_module, ("kernels", "kernels.attention", "kernels.conv")):
    for name in package.__all__:
        value = exported[package, name] = getattr(package, name)
        if name not in ("reference", "reference_conv"):
            assert callable(value) and value.__name__ == name, name
        assert name in dir(package), name
{modules}
from kernels import reference, reference_conv, sparse_conv
assert reference.__name__ == "kernels.attention.reference"
assert reference_conv.__name__ == "kernels.conv.reference"
assert sparse_conv is sys.modules["kernels.conv.sparse_conv"].sparse_conv
for (package, name), value in exported.items():
    assert getattr(package, name) is value, name
"""
    run_python("-c", code)


def test_an_unknown_name_is_an_attribute_error():
    import kernels

    with pytest.raises(AttributeError, match="module 'kernels' has no attribute 'absent'"):
        kernels.absent  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'absent'"):
        from kernels import absent  # noqa: F401


@pytest.mark.parametrize("path", sorted(RUNTIME.glob("*.py")), ids=lambda path: path.stem)
def test_runtime_imports_no_other_part_of_kernels(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernels"):
            assert node.module.startswith("kernels.runtime."), node.module
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("kernels") for alias in node.names)
