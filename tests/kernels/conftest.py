"""Settings of the kernel tests: Triton's interpreter patches triton.language once per launch.

By default it does so in every nested call, which is several times slower.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def _patch_once_per_launch() -> None:
    from triton.runtime import interpreter

    original_patch = interpreter._patch_lang
    original_call = interpreter.GridExecutor.__call__
    patched = set()

    def patch(fn):
        modules = frozenset(
            id(value) for value in fn.__globals__.values() if value is tl or value is tl.core
        )
        if modules in patched:
            return None
        patched.add(modules)
        return original_patch(fn)

    def call(self, *args, **kwargs):
        patched.clear()
        return original_call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, call


if triton.knobs.runtime.interpret:
    _patch_once_per_launch()
torch.set_num_threads(1)
