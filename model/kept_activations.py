"""Which activations of a DiT block are kept for the backward pass, and how the others come back.

Attention is never computed twice. At every level gradients are the same to the bit, because an
activation is computed again by the same kernels from the same inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from model.config import KEPT_LEVELS, DiTConfig, KeptActivations

# Share of the free memory that "auto" plans with. The rest is for fragmentation and for buffers
# that live only inside a layer.
USABLE = 0.92


def _key(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.numel()


class _Recipe:
    """The results of a function that are computed when they are first needed."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any], count: int):
        self.function = function
        self.arguments = arguments
        self.uses = [0] * count  # that are still to come, of each result
        self.values: list[Tensor | None] = [None] * count

    def take(self, i: int) -> Tensor:
        """Return result i. It is dropped after its last use."""
        value = self.values[i]
        if value is None:
            inputs = [x.restore() if isinstance(x, _Dropped) else x for x in self.arguments]
            results = self.function(*inputs)
            self.values = list(results if isinstance(results, tuple) else (results,))
            value = self.values[i]
            assert value is not None
        self.uses[i] -= 1
        self.values = [v if n > 0 else None for v, n in zip(self.values, self.uses, strict=True)]
        return value


class _Dropped:
    """Stands for a tensor that is not kept."""

    def __init__(self, recipe: _Recipe, i: int, x: Tensor):
        self.recipe = recipe
        self.i = i
        self.shape = x.shape
        self.stride = x.stride()
        recipe.uses[i] += 1

    def restore(self) -> Tensor:
        return self.recipe.take(self.i).as_strided(self.shape, self.stride)


class _Saved:
    """What autograd holds for a tensor: the tensor, or what stands for it if it was dropped."""

    def __init__(self, content: Tensor | _Dropped):
        self.content = content


class BlockActivations:
    """The activations of one DiT block.

    Inside `hooks`, tensors that were dropped are not saved by autograd. The backward pass computes
    them again, each once.

    Args:
        level: What is kept, one of `model.config.KEPT_LEVELS`.
        device_type: Where the block runs.
    """

    def __init__(self, level: KeptActivations, device_type: str):
        self.level = KEPT_LEVELS.index(level)
        self.device_type = device_type
        # Recipes by address. The tensors are held too, so that their addresses stay their own.
        self._recipes: dict[tuple[int, int], tuple[_Recipe, int, Tensor]] = {}
        # A function saves its own results before they can be dropped.
        self._saved: dict[tuple[int, int], list[_Saved]] = {}
        self._autocast = (
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_enabled(device_type),
        )

    def drops(self, level: KeptActivations) -> bool:
        """Return whether activations are dropped that `level` drops."""
        return self.level >= KEPT_LEVELS.index(level) and torch.is_grad_enabled()

    def drop(
        self,
        level: KeptActivations,
        results: Tensor | tuple[Tensor, ...],
        function: Callable[..., Any],
        *arguments: Any,
    ) -> None:
        """Do not keep tensors at `level` and those after it.

        Args:
            level: First level at which they are dropped.
            results: What the function returned, contiguous.
            function: Computes them again, under the same autocast and without gradients.
            arguments: Its arguments. Tensors among them may have been dropped themselves.
        """
        if not self.drops(level):
            return
        dtype, enabled = self._autocast

        def again(*inputs: Any) -> Any:
            with torch.no_grad(), torch.autocast(self.device_type, dtype, enabled):
                return function(*inputs)

        results = results if isinstance(results, tuple) else (results,)
        recipe = _Recipe(again, [self._source(x) for x in arguments], len(results))
        for i, x in enumerate(results):
            assert x.is_contiguous(), "only contiguous tensors can be dropped"
            if x.numel():  # the others have no address of their own
                self._recipes[_key(x)] = (recipe, i, x)
                for saved in self._saved.pop(_key(x), ()):
                    assert isinstance(saved.content, Tensor)
                    saved.content = _Dropped(recipe, i, saved.content)

    def _source(self, x: Any) -> Any:
        """Return what stands for an argument until the backward pass."""
        if not isinstance(x, Tensor):
            return x
        # A tensor with its graph would keep the graph alive, which keeps the recipe.
        return x if isinstance(x, torch.nn.Parameter) else self._find(x.detach())

    def _find(self, x: Tensor) -> Tensor | _Dropped:
        found = self._recipes.get(_key(x))
        return x if found is None else _Dropped(found[0], found[1], x)

    def _pack(self, x: Tensor) -> _Saved:
        saved = _Saved(self._find(x))
        if saved.content is x:
            self._saved.setdefault(_key(x), []).append(saved)
        return saved

    @staticmethod
    def _unpack(saved: _Saved) -> Tensor:
        content = saved.content
        return content.restore() if isinstance(content, _Dropped) else content

    def hooks(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the block runs."""
        if self.level == 0 or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        return self._hooks()

    @contextlib.contextmanager
    def _hooks(self) -> Any:
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._recipes.clear()
            self._saved.clear()


def bytes_per_token(config: DiTConfig, level: KeptActivations, itemsize: int) -> int:
    """Return the bytes that one block keeps for each token.

    Args:
        config: Sizes of the model.
        level: What is kept.
        itemsize: Bytes of a number inside the block. The residual stream has four.
    """
    C, F = config.channels, config.mlp_ratio * config.channels
    sparse = config.attention == "ssa"
    # Branches of SSA, its keys and values and what their compression keeps; or queries, keys,
    # values and result of full attention. Results of the cross-attention and of the MLP.
    kept = (3 * C + 6 * config.kv_channels if sparse else 4 * C) + 2 * C
    if level != "attention":
        # Projected results of both attentions, queries of the cross-attention, the MLP's first
        # product.
        kept += 3 * C + F
    if level == "all":
        # Three norms, queries and gated sum of SSA. The branch without a gate is in the stream.
        kept += 3 * C + 2 * C * sparse - C
    streams = 3 if level == "all" else 1
    return 4 * C * streams + itemsize * kept


def choose_level(
    config: DiTConfig, tokens: int, itemsize: int, free: int, reserved: int
) -> KeptActivations:
    """Return the first level whose activations fit the memory, or else the last.

    Args:
        config: Sizes of the model.
        tokens: Number of tokens of the batch.
        itemsize: Bytes of a number inside the blocks.
        free: Free bytes of the device.
        reserved: Bytes that the step needs beside the blocks' activations.
    """
    for level in KEPT_LEVELS:
        kept = tokens * config.blocks * bytes_per_token(config, level, itemsize)
        if kept + reserved <= USABLE * free:
            return level
    return KEPT_LEVELS[-1]


def free_memory(device: torch.device, parameters: int) -> int:
    """Return the bytes of a GPU that this process may still take.

    Under `torch.use_deterministic_algorithms` it depends on the GPU and the model alone, so that a
    resumed run keeps what the first one kept.

    Args:
        device: The GPU.
        parameters: Number of parameters that are trained.
    """
    if torch.are_deterministic_algorithms_enabled():
        # Weights, their average and two moments of the optimizer, in fp32.
        return torch.cuda.get_device_properties(device).total_memory - 16 * parameters
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
