"""Lazy public names of a package: the module of a name is imported when the name is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """Package in which an exported function keeps its name when a submodule has the same name."""

    _exported: Mapping[str, str]

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds each imported submodule to an attribute of its package.
        is_submodule = isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}"
        if not (is_submodule and name in self._exported):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._exported})


def export_lazily(package: str, exports: Mapping[str, str]) -> Callable[[str], Any]:
    """Make `package` export names without importing their modules.

    Args:
        package: Name of the package, `__name__` in its `__init__.py`.
        exports: Module that defines each public name. A name stands for the module itself where
            the entry ends in ":module".

    Returns:
        The `__getattr__` (PEP 562) that the package must define.
    """
    module = sys.modules[package]
    module.__dict__["_exported"] = exports
    module.__class__ = _LazyPackage

    def __getattr__(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        source, _, kind = exports[name].partition(":")
        value = importlib.import_module(source)
        if kind != "module":
            value = getattr(value, name)
        module.__dict__[name] = value
        return value

    return __getattr__
