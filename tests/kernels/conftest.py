"""Makes Triton's interpreter several times faster: it patches triton.language anew in every nested call."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def _patch_once_per_launch() -> None:
    from triton.runtime import interpreter

    original_patch, original_call, done = (
        interpreter._patch_lang,
        interpreter.GridExecutor.__call__,
        set(),
    )

    def patch(fn):
        modules = frozenset(
            id(value) for value in fn.__globals__.values() if value is tl or value is tl.core
        )
        if modules in done:
            return None
        done.add(modules)
        return original_patch(fn)

    def call(self, *args, **kwargs):
        done.clear()
        return original_call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, call


if triton.knobs.runtime.interpret:
    _patch_once_per_launch()
torch.set_num_threads(1)
