"""A DiT together with the image encoder it listens to: what is trained, exported and sampled as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.conditioning.image_encoder import ImageBatch, ImageEncoder, build_encoder
from model.config import ConditionedDiTConfig, Guidance, Method
from model.image_tokens import ImageTokens
from model.rectified_flow import draw_noise, guide, sample
from model.sparse_dit import SparseDiT
from model.sparse_tensor import Level, SparseTensor


class _Shared:
    """Holds a module that a copy of its owner does not copy: frozen weights are the same for all."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __deepcopy__(self, _memo: Any) -> _Shared:
        return self


class ConditionedDiT(nn.Module):
    """Image and noisy latents to velocity.

    An encoder that learns is part of the weights. A frozen one is not: it is neither saved, nor averaged, nor copied,
    and is loaded from where its configuration says. ValueError and UserError as `build_encoder`.
    """

    Config = ConditionedDiTConfig

    def __init__(self, config: ConditionedDiTConfig):
        super().__init__()
        self.config = config
        self.dit = SparseDiT(config.dit)
        encoder = build_encoder(config.encoder)
        self._frozen = None if encoder.trainable else _Shared(encoder)
        self._learning = encoder if encoder.trainable else None

    @property
    def encoder(self) -> ImageEncoder:
        found = self._learning if self._frozen is None else self._frozen.module
        assert isinstance(found, ImageEncoder)
        return found

    def share_encoder(self, other: ConditionedDiT) -> None:
        """Take the other one's encoder if both are frozen and of one configuration, so that it lies in memory once."""
        if (
            self._frozen is not None
            and other._frozen is not None
            and self.config.encoder == other.config.encoder
        ):
            self._frozen = other._frozen

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> ConditionedDiT:
        if self._frozen is not None:
            self._frozen.module._apply(fn)  # .to(device) moves it along
        return super()._apply(fn, recurse)

    def encode_images(self, images: ImageBatch) -> ImageTokens:
        """The images' tokens; without gradients where the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._frozen is None):
            return self.encoder(images)

    def forward(
        self, x: SparseTensor, t_B: Tensor, images: ImageBatch, dropped_B: Tensor | None = None
    ) -> Tensor:
        """Velocity [N, latent_channels] at x, one image an asset; where bool dropped [B] is true without its image."""
        condition = self.encode_images(images)
        return self.dit(x, t_B, condition if dropped_B is None else condition.drop(dropped_B))

    @torch.no_grad()
    def generate(
        self,
        level: Level,
        condition: ImageTokens,
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: Guidance,
        method: Method = "euler",
        shift: float = 1.0,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Tensor:
        """Latents fp32 [N, latent_channels] of the level's cells, denormalised; asset i's noise comes from seeds[i].

        The same asset gets the same noise in every batch and on every device. ValueError if there is not one seed and
        one image an asset, or as `flow.sample`.
        """
        if not len(seeds) == level.batch_size == condition.batch_size:
            found = f"{len(seeds)} seeds and {condition.batch_size} images"
            raise ValueError(
                f"there must be one seed and one image for each of {level.batch_size} assets, got {found}"
            )
        counts, layout = level.asset_starts.diff().tolist(), self.dit.layout(level)

        def towards(tokens: ImageTokens) -> Callable[[Tensor, float], Tensor]:
            def velocity(x_NC: Tensor, t: float) -> Tensor:
                t_B = torch.full((level.batch_size,), t, device=x_NC.device)
                return self.dit(SparseTensor(x_NC, level), t_B, tokens, layout)

            return velocity

        velocity = guide(towards(condition), towards(condition.unconditional()), guidance, counts)
        noise = draw_noise(seeds, counts, self.config.dit.latent_channels, level.device)
        x_NC = sample(velocity, noise, steps=steps, method=method, shift=shift, progress=progress)
        return self.dit.denormalize(x_NC)
