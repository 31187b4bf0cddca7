"""Renders as image conditions: the options of a flow that they guide, and which view a sample sees."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.conditioning.image_preprocessing import PreparedImage, prepare_image
from model.rectified_flow import sample_times
from pipeline.core.errors import RunError, UserError
from pipeline.core.hashing import seed_of
from pipeline.core.product import Product
from train.data.bricks import OPEN_SHARDS, UNREADABLE, BuildIndex
from train.data.config import FlowOptions

if TYPE_CHECKING:
    from pipeline.core.schema import View
    from pipeline.storage.render_shard import RenderShard

PREPARED_BYTES = 64 << 20  # of images kept ready

Key = TypeVar("Key")
Value = TypeVar("Value")


class ThreadSafeCache(Generic[Key, Value]):
    """The last `most` values asked for, each made by one thread while others wait for it."""

    def __init__(self, most: int):
        self.most = most
        self._lock = threading.Lock()
        self._held: OrderedDict[Key, tuple[threading.Lock, list[Value]]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        with self._lock:
            making, made = self._held.setdefault(key, (threading.Lock(), []))
            self._held.move_to_end(key)
            while len(self._held) > self.most:
                self._held.popitem(last=False)
        with making:
            if not made:
                made.append(make())
        return made[0]


class ViewReader:
    """Renders of a build index; safe to use from several threads.

    UserError, with what to run, if a shard has none. `ahead` > 0: a view is read as it lies in the view-major tar, that
    of all the shard's assets in one go, and the encoded images of so many shards are kept; only what is asked for is
    decoded. 0: every render is read on its own.
    """

    def __init__(self, index: BuildIndex, cameras: str, *, ahead: int = 0):
        self.index, self.cameras = index, cameras
        for name in sorted(set(index.shards)):
            if not (index.root / "shards" / name / f"{Product.renders(cameras)}.json").exists():
                raise UserError(
                    f"{index.root} has no renders of cameras {cameras} in shard {name}; add them: "
                    f"python -m pipeline.build --out {index.root} --cameras {cameras}"
                )
        self._lock = threading.Lock()
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)
        self._images: ThreadSafeCache[tuple[str, int], dict[str, bytes]] | None = (
            ThreadSafeCache(ahead) if ahead else None
        )

    def views(self, asset: int) -> int:
        """How many views the asset's shard has of each of its assets."""
        return self._shard(asset)[1]

    def read(self, asset: int, view: int) -> NDArray[np.uint8]:
        """RGBA [h, w, 4]. RunError, with what to run, if it cannot be read."""
        name, uid = self.index.shards[asset], self.index.uids[asset]
        if self._images is None:
            return self.read_view(asset, view).rgba
        from pipeline.core.image_codec import decode

        shard, _ = self._shard(asset)
        try:
            return decode(self._images.get((name, view), lambda: shard.read_images(view))[uid])
        except UNREADABLE as error:
            raise self._unreadable(asset, view, error) from error

    def read_view(self, asset: int, view: int) -> View:
        """One render with its camera. RunError, with what to run, if it cannot be read."""
        shard, _ = self._shard(asset)
        try:
            return shard.read(self.index.uids[asset], view)
        except UNREADABLE as error:
            raise self._unreadable(asset, view, error) from error

    def _unreadable(self, asset: int, view: int, error: Exception) -> RunError:
        root, name, uid = (
            self.index.root,
            self.index.shards[asset],
            self.index.uids[asset],
        )
        return RunError(
            f"view {view} of {uid} in shard {name}: {error!r}; run python -m pipeline.verify {root}"
        )

    def _shard(self, asset: int) -> tuple[RenderShard, int]:
        try:
            with self._lock:
                return self._open(self.index.shards[asset])
        except UNREADABLE as error:
            raise self._unreadable(asset, 0, error) from error

    def _open_shard(self, name: str) -> tuple[RenderShard, int]:
        from pipeline.storage.render_shard import (
            RenderShard,  # here: importing the stream does not take pyarrow and Pillow
        )

        shard = RenderShard(self.index.root / "renders" / self.cameras / f"{name}.tar")
        return shard, len(shard.keys) // max(len(shard.uids), 1)


class RenderConditions:
    """What a flow's sample is given besides its latents: a view of its asset, a time, whether the image is dropped.

    All of a shard's assets see the same view in an epoch, another one in each, so that training reads a view-major
    shard in order. The last `held_out` views are left alone, or with `held_out_only` are all there is.
    """

    def __init__(
        self,
        index: BuildIndex,
        flow: FlowOptions,
        *,
        cameras: str,
        image_size: int,
        held_out: int,
        training: bool = True,
        held_out_only: bool = False,
        ahead: int = 0,
    ):
        self.index, self.flow, self.image_size = index, flow, image_size
        self.held_out, self.training, self.held_out_only = held_out, training, held_out_only
        self.views = ViewReader(index, cameras, ahead=ahead)
        # Images that are not augmented come out the same every time: small ones of a small build are kept.
        self._plain: ThreadSafeCache[tuple[int, int], PreparedImage] = ThreadSafeCache(
            max(1, PREPARED_BYTES // (4 * image_size**2))
        )

    def view_of(self, asset: int, epoch: int) -> int:
        """Which view the asset's `epoch`-th sample sees: all that are allowed, then all again in another order."""
        count, held = self.views.views(asset), self.held_out
        if held >= count:
            raise UserError(f"held_out_views must be below the {count} views there are, got {held}")
        allowed = (
            np.arange(count - held, count)
            if self.held_out_only and held
            else np.arange(count - held)
        )
        turn, place = divmod(epoch, len(allowed))
        order = np.random.default_rng(
            seed_of("view", self.flow.loop.seed, self.index.shards[asset], turn)
        )
        return int(order.permutation(allowed)[place])

    def image(self, asset: int, epoch: int, key: Sequence[str | int]) -> PreparedImage:
        """The sample's image, augmented in training; random numbers from `key` alone."""
        view = self.view_of(asset, epoch)
        if not (self.training and self.flow.augment):
            return self._plain.get((asset, view), lambda: self._prepared(asset, view))
        pixels = self.views.read(asset, view)
        rng = np.random.default_rng(seed_of("augmentation", *key))
        return prepare_image(
            pixels,
            self.image_size,
            augmentation=self.flow.augmentation,
            rng=rng,
            whole_if_opaque=True,
        )

    def _prepared(self, asset: int, view: int) -> PreparedImage:
        return prepare_image(self.views.read(asset, view), self.image_size, whole_if_opaque=True)


def sample_time(
    flow: FlowOptions, key: Sequence[str | int], *, training: bool
) -> tuple[Tensor, bool]:
    """t [1] of a sample and whether its image is dropped, which happens in training alone."""
    generator = torch.Generator().manual_seed(seed_of("time", *key) >> 1)
    time = sample_times(flow.times, 1, generator)
    return time, training and torch.rand((), generator=generator).item() < flow.dropout
