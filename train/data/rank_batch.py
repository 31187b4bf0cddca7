"""What the batches of all stages have in common."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RankBatch:
    """The part of a step's samples that one rank trains on.

    The random numbers of a sample depend on the sample alone and not on the batch.

    Attributes:
        noise: Standard normal noise, fp32 [N, C], rows by asset.
        share: Weight of one sample in the loss, see `StepSamples.loss_weight`.
        uids: Identifier of each asset.
    """

    noise: Tensor
    share: float
    uids: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Number of assets."""
        return len(self.uids)
