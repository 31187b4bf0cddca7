"""Renders as image conditions of flow models: reading them, and choosing a view for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.conditioning.image_preprocessing import PreparedImage, prepare_image
from model.rectified_flow import sample_times
from pipeline.core.errors import RunError, UserError
from pipeline.core.hashing import seed_of
from pipeline.core.product import Product
from pipeline.storage.commit_marker import check_sizes
from pipeline.storage.layout import list_commits, product_paths
from train.data.bricks import UNREADABLE, BuildIndex
from train.data.config import FlowOptions
from train.data.source import OPEN_SHARDS
from train.data.symmetry import quarter_turn, turns_to_face
from train.data.thread_safe_cache import ThreadSafeCache

if TYPE_CHECKING:
    from pipeline.core.schema import View
    from pipeline.storage.render_shard import RenderShard

PREPARED_BYTES = 64 << 20  # of prepared images that are kept in memory
VIEW_ORDERS = 1 << 12  # orders of a shard's views that are kept in memory, of some hundred bytes


class ViewReader:
    """Reads the renders of a build. It may be used from several threads.

    Args:
        index: Assets of the build.
        cameras: Name of the renders' product without "renders-", such as "paper".
        ahead: Number of shards whose encoded images are kept in memory. A view is then read for all
            assets of a shard at once, as it lies in the view-major tar file. 0 reads every render
            on its own.

    Raises:
        UserError: If a shard has no renders of these cameras.
    """

    def __init__(self, index: BuildIndex, cameras: str, *, ahead: int = 0):
        self.index = index
        self.cameras = cameras
        commits = list_commits(index.root)
        for name in sorted(set(index.shards)):
            committed = commits.get(name, set())
            if str(Product.renders(cameras)) not in committed:
                names = sorted(item for item in committed if item.startswith("renders-"))
                others = " ".join(item.removeprefix("renders-") for item in names)
                options = cameras.replace("-ibl", " --light ibl")
                raise UserError(
                    f"{index.root} has no renders of cameras {cameras} in shard {name}"
                    + (f", but --cameras {others}" if others else "")
                    + f"; add them: python -m pipeline.build --out {index.root} --cameras {options}"
                )
        self._open: ThreadSafeCache[str, tuple[RenderShard, int]] = ThreadSafeCache(OPEN_SHARDS)
        self._images: ThreadSafeCache[tuple[str, int], dict[str, bytes]] | None = (
            ThreadSafeCache(ahead) if ahead else None
        )

    def views(self, asset: int) -> int:
        """Return the number of views of each asset in the asset's shard."""
        return self._shard(asset)[1]

    def read(self, asset: int, view: int) -> NDArray[np.uint8]:
        """Read the pixels of a render.

        Args:
            asset: Number of the asset in the index.
            view: Number of the view.

        Returns:
            RGBA, uint8 [height, width, 4].

        Raises:
            RunError: If the render cannot be read.
        """
        name, uid = self.index.shards[asset], self.index.uids[asset]
        if self._images is None:
            return self.read_view(asset, view).rgba
        from pipeline.core.image_codec import decode

        shard, _ = self._shard(asset)
        with self._readable(asset, view):
            return decode(self._images.get((name, view), lambda: shard.read_images(view))[uid])

    def read_view(self, asset: int, view: int) -> View:
        """Read a render with its camera.

        Raises:
            RunError: If the render cannot be read.
        """
        shard, _ = self._shard(asset)
        with self._readable(asset, view):
            return shard.read(self.index.uids[asset], view)

    def azimuth(self, asset: int, view: int) -> float:
        """Return the azimuth of a view's camera in degrees, see `pipeline.core.cameras.Camera`.

        Raises:
            RunError: If the render cannot be read.
        """
        shard, _ = self._shard(asset)
        with self._readable(asset, view):
            return shard.read_bytes(self.index.uids[asset], view)[1]["azimuth_degrees"]

    @contextmanager
    def _readable(self, asset: int, view: int) -> Iterator[None]:
        """Raise RunError if a render cannot be read in the block."""
        try:
            yield
        except UNREADABLE as error:
            shard, uid = self.index.shards[asset], self.index.uids[asset]
            raise RunError(
                f"view {view} of {uid} in shard {shard} cannot be read: {error!r}; "
                f"run python -m pipeline.verify {self.index.root}"
            ) from error

    def _shard(self, asset: int) -> tuple[RenderShard, int]:
        name = self.index.shards[asset]
        with self._readable(asset, 0):
            return self._open.get(name, lambda: self._open_shard(name))

    def _open_shard(self, name: str) -> tuple[RenderShard, int]:
        from pipeline.storage.render_shard import RenderShard  # not all users need its imports

        check_sizes(self.index.root, name, Product.renders(self.cameras))
        shard = RenderShard(self.index.root / product_paths(Product.renders(self.cameras), name)[0])
        return shard, len(shard.keys) // max(len(shard.uids), 1)


class RenderConditions:
    """Chooses the views of each sample and prepares their images for the image encoder.

    In an epoch all assets of a shard get the same view, so that a view-major shard is read in
    order. The view differs from epoch to epoch. Further views of a sample are those of the next
    epochs.

    Args:
        index: Assets of the build.
        flow: Options of the flow model.
        cameras: Camera set of the renders.
        image_size: Pixels per side of the prepared images.
        most_views: Largest number of views of a sample.
        held_out: Number of views at the end of each asset that are not trained on.
        training: Whether images are augmented.
        held_out_only: Whether only the held-out views are chosen.
        ahead: Number of shards whose images are kept in memory, see `ViewReader`.
        facing: Whether each asset is turned towards the camera, see `symmetry`.
        mirrored: Whether half of the samples are mirrored in training.
    """

    def __init__(
        self,
        index: BuildIndex,
        flow: FlowOptions,
        *,
        cameras: str,
        image_size: int,
        most_views: int = 1,
        held_out: int,
        training: bool = True,
        held_out_only: bool = False,
        ahead: int = 0,
        facing: bool = False,
        mirrored: bool = False,
    ):
        self.index = index
        self.views = ViewReader(index, cameras, ahead=ahead)
        self.facing = facing
        self.mirrored = mirrored and training
        self._turns: dict[tuple[int, int], int] = {}  # quarter turns of an asset and a view
        self._view_order = lru_cache(VIEW_ORDERS)(self._shuffled_views)
        self.held_out = held_out
        self.held_out_only = held_out_only
        self.flow = flow
        self.training = training
        self.image_size = image_size
        self.most_views = most_views
        # Images that are not augmented are the same every time, so those of a small build are kept.
        self._plain: ThreadSafeCache[tuple[int, int], PreparedImage] = ThreadSafeCache(
            max(1, PREPARED_BYTES // (4 * image_size**2))
        )

    def view_of(self, asset: int, epoch: int, number: int = 0) -> int:
        """Return a view of an asset in an epoch.

        All allowed views come in a random order, then all again in another order.

        Args:
            asset: Number of the asset in the index.
            epoch: The epoch.
            number: 0 for the first view of the epoch, 1 for the next one, and so on.

        Raises:
            UserError: If all views are held out, or a sample may have more views than are allowed.
        """
        count = self.views.views(asset)
        if self.held_out >= count:
            raise UserError(
                f"held_out_views must be below the {count} views there are, got {self.held_out}"
            )
        first, count = 0, count - self.held_out
        if self.held_out_only and self.held_out:
            first, count = count, self.held_out
        if self.most_views > count:
            raise UserError(
                f"the model's option views must be at most {count}, the number of views of "
                f"each asset to train on, got {self.most_views}"
            )
        turn, place = divmod(epoch, count)
        order = self._view_order(self.index.shards[asset], first, first + count, turn)
        return int(order[(place + number) % count])

    def _shuffled_views(self, shard: str, first: int, end: int, turn: int) -> NDArray[np.int64]:
        """Return the views from `first` to `end` in the order of a shard's epochs."""
        seed = seed_of("view", self.flow.loop.seed, shard, turn)
        return np.random.default_rng(seed).permutation(np.arange(first, end))

    def images(self, asset: int, epoch: int, key: Sequence[str | int]) -> list[PreparedImage]:
        """Return the prepared images of a sample's views, from 1 to `most_views`.

        Each number of views has the same probability. The first view is the one that decides about
        the symmetry.

        Args:
            asset: Number of the asset in the index.
            epoch: Epoch of the sample, which decides about the views.
            key: Names and numbers from which the number of views and the augmentation are seeded.
        """
        count = 1 + seed_of("views", *key) % self.most_views
        return [self.image(asset, epoch, key, number) for number in range(count)]

    def image(
        self, asset: int, epoch: int, key: Sequence[str | int], number: int = 0
    ) -> PreparedImage:
        """Return the prepared image of one view of a sample.

        Args:
            asset: Number of the asset in the index.
            epoch: Epoch of the sample, which decides about the view.
            key: Names and numbers from which the augmentation is seeded.
            number: Number of the view in the sample, from 0.
        """
        view = self.view_of(asset, epoch, number)
        of_view = (number,) if number else ()
        if self.training and self.flow.augment:
            image = prepare_image(
                self.views.read(asset, view),
                self.image_size,
                augmentation=self.flow.augmentation,
                rng=np.random.default_rng(seed_of("augmentation", *key, *of_view)),
                whole_if_opaque=True,
            )
        else:
            image = self._plain.get((asset, view), lambda: self._prepared(asset, view))
        if self._is_mirrored(key):
            image = PreparedImage(image.rgb[:, ::-1], image.mask[:, ::-1])
        return image

    def symmetry(self, asset: int, epoch: int, key: Sequence[str | int]) -> int:
        """Return the symmetry of SYMMETRIES that the shape of a sample is transformed by.

        With `facing` the asset and its cameras are turned about the up axis by a multiple of 90
        degrees, so that the azimuth of the sample's camera lies between -45 and 45 degrees. If the
        image of the sample is mirrored, the shape is mirrored, too.

        Args:
            asset: Number of the asset in the index.
            epoch: Epoch of the sample.
            key: As for `image`.
        """
        view, turns = self.view_of(asset, epoch), 0
        if self.facing:
            if (asset, view) not in self._turns:
                azimuth = self.views.azimuth(asset, view)
                self._turns[asset, view] = turns_to_face(azimuth)
            turns = self._turns[asset, view]
        return quarter_turn(turns, mirrored=self._is_mirrored(key))

    def _is_mirrored(self, key: Sequence[str | int]) -> bool:
        return self.mirrored and seed_of("mirror", *key) % 2 == 1

    def _prepared(self, asset: int, view: int) -> PreparedImage:
        return prepare_image(self.views.read(asset, view), self.image_size, whole_if_opaque=True)


def sample_time(
    flow: FlowOptions, key: Sequence[str | int], *, training: bool
) -> tuple[Tensor, bool]:
    """Draw the time of a sample, and whether it is trained without its image.

    Args:
        flow: Options of the flow model.
        key: Names and numbers from which both are seeded.
        training: Whether images may be dropped.

    Returns:
        The time t, float32 [1], and whether the image is dropped.
    """
    generator = torch.Generator().manual_seed(seed_of("time", *key) >> 1)
    time = sample_times(flow.times, 1, generator)
    return time, training and torch.rand((), generator=generator).item() < flow.dropout
