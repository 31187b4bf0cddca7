"""Image tokens of a batch of assets, to which the DiT attends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The image tokens of all assets of a batch, concatenated. Each asset has one image.

    Attributes:
        feats_SC: [S, C] features.
        coords: int32 [S, 4]. (asset, column, row, 0) for a patch, (asset, 0, 0, 1) for the class
            token and the registers.
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

    def drop(self, dropped_B: Tensor) -> ImageTokens:
        """Return tokens with zero features for the assets where bool [B] `dropped_B` is true."""
        keep_S1 = ~dropped_B.to(self.coords.device)[self.coords[:, 0].long()][:, None]
        return replace(self, feats_SC=torch.where(keep_S1, self.feats_SC, 0))
