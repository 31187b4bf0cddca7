"""Image tokens of a batch of assets, to which the DiT attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The image tokens of all assets of a batch, concatenated.

    An asset has one image, or several views that the DiT attends to together.

    Attributes:
        feats_SC: [S, C] features.
        coords: int32 [S, 4]. (asset, column, row, 2 v) for a patch of view v, (asset, 0, 0,
            2 v + 1) for the class token and the registers of view v. The only image is view 0.
        starts: int32 [B + 1]. Asset b has the rows starts[b]:starts[b + 1].
        max_tokens: Number of tokens of the asset that has most.
    """

    feats_SC: Tensor
    coords: Tensor
    starts: Tensor
    max_tokens: int

    @property
    def batch_size(self) -> int:
        """Number B of assets."""
        return len(self.starts) - 1

    @cached_property
    def asset_of(self) -> Tensor:
        """Asset of each token, int32 [S]."""
        return self.coords[:, 0].contiguous()

    def unconditional(self) -> ImageTokens:
        """Return tokens with zero features at the same coordinates."""
        return replace(self, feats_SC=torch.zeros_like(self.feats_SC))

    def followed_by(self, other: ImageTokens) -> ImageTokens:
        """Return the tokens of these assets and then those of other assets, as one batch."""
        moved = other.coords.clone()
        moved[:, 0] += self.batch_size
        return ImageTokens(
            torch.cat([self.feats_SC, other.feats_SC]),
            torch.cat([self.coords, moved]),
            torch.cat([self.starts, other.starts[1:] + len(self.coords)]),
            max(self.max_tokens, other.max_tokens),
        )

    @classmethod
    def joined(cls, views: Sequence[ImageTokens]) -> ImageTokens:
        """Return the tokens of several views of the same assets, as one condition of each asset.

        This copies from the device to the host once.

        Args:
            views: The tokens of each view of all assets, in which every asset has one image. The
                first one is view 0.

        Raises:
            ValueError: If there is no view, or they are of different numbers of assets.
        """
        sizes = [view.batch_size for view in views]
        if not views or len(set(sizes)) != 1:
            raise ValueError(f"views must be of one number of assets, got {sizes}")
        if len(views) == 1:
            return views[0]
        moved = []
        for number, view in enumerate(views):
            coords = view.coords.clone()
            coords[:, 3] += 2 * number
            moved.append(coords)
        coords = torch.cat(moved)
        order = torch.argsort(coords[:, 0], stable=True)
        starts = torch.stack([view.starts for view in views]).sum(0, dtype=torch.int32)
        return cls(
            torch.cat([view.feats_SC for view in views])[order],
            coords[order],
            starts,
            int(starts.diff().max()),
        )

    def drop(self, dropped_B: Tensor) -> ImageTokens:
        """Return tokens with zero features for the assets where bool [B] `dropped_B` is true."""
        keep_S1 = ~dropped_B.to(self.coords.device)[self.coords[:, 0].long()][:, None]
        return replace(self, feats_SC=torch.where(keep_S1, self.feats_SC, 0))
