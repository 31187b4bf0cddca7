"""A DiT together with its image encoder: they are trained, exported and sampled as one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.conditioning.image_encoder import ImageBatch, ImageEncoder, build_encoder
from model.config import ConditionedDiTConfig, SamplingOptions
from model.cuda_graph import ReplayedFunction
from model.image_tokens import ImageTokens
from model.rectified_flow import draw_noise, guide, sample
from model.sparse_dit import FixedInputs, SparseDiT
from model.sparse_tensor import Level, SparseTensor

# Most tokens of a batch that holds both passes of classifier-free guidance.
LARGEST_PAIR = 262_144
# Most tokens of a pass whose kernels are recorded. The host issues a larger pass in less time than
# the GPU computes it, so there is nothing to gain.
LARGEST_RECORDED = 32_768


class _Shared:
    """Holds a module that is not copied with its owner. Frozen weights are the same for all."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __deepcopy__(self, _memo: Any) -> _Shared:
        return self


class ConditionedDiT(nn.Module):
    """A DiT that estimates the velocity of noisy latents, given images.

    A trainable encoder is part of the weights. A frozen one is not: it is neither saved nor
    averaged nor copied, and is loaded from where its configuration says.

    Args:
        config: The configuration.
        dit: A DiT of this configuration. None makes one with random weights.
        encoder: An encoder of this configuration. None makes or loads one.

    Raises:
        ValueError: If the encoder's weights have other channels than the configuration says.
        UserError: If the encoder's weights are not available.
    """

    Config = ConditionedDiTConfig

    def __init__(
        self,
        config: ConditionedDiTConfig,
        dit: SparseDiT | None = None,
        encoder: ImageEncoder | None = None,
    ):
        super().__init__()
        self.config = config
        self.dit = SparseDiT(config.dit) if dit is None else dit
        encoder = build_encoder(config.encoder) if encoder is None else encoder
        self._frozen = None if encoder.trainable else _Shared(encoder)
        self._learning = encoder if encoder.trainable else None

    @property
    def encoder(self) -> ImageEncoder:
        """The image encoder, trainable or frozen."""
        encoder = self._learning if self._frozen is None else self._frozen.module
        assert isinstance(encoder, ImageEncoder)
        return encoder

    def share_encoder(self, other: ConditionedDiT) -> None:
        """Use the other model's encoder if both are frozen and have one configuration.

        The encoder is then in memory once.
        """
        if (
            self._frozen is not None
            and other._frozen is not None
            and self.config.encoder == other.config.encoder
        ):
            self._frozen = other._frozen

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> ConditionedDiT:
        # `.to(device)` must move the frozen encoder too, which is no submodule.
        if self._frozen is not None:
            self._frozen.module._apply(fn)
        return super()._apply(fn, recurse)

    def encode_images(self, images: ImageBatch) -> ImageTokens:
        """Return the tokens of a batch of images, without gradients if the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._frozen is None):
            return self.encoder(images)

    def forward(
        self, x: SparseTensor, t_B: Tensor, images: ImageBatch, dropped_B: Tensor | None = None
    ) -> Tensor:
        """Estimate the velocity of the flow, as `SparseDiT.forward` does, but given images.

        Args:
            x: Noisy latents of B assets, as in `SparseDiT.forward`.
            t_B: Time of each asset, as in `SparseDiT.forward`.
            images: One image for each asset, or several views.
            dropped_B: bool [B]. Where it is true, the asset is treated as if it had no image.

        Returns:
            Velocities, as from `SparseDiT.forward`.
        """
        image = self.encode_images(images)
        return self.dit(x, t_B, image if dropped_B is None else image.drop(dropped_B))

    @property
    def joint_views(self) -> bool:
        """Whether the DiT attends to several views together, as it was trained to."""
        return self.config.views > 1

    def check_views(self, count: int) -> None:
        """Check that the model can take a number of views.

        Raises:
            ValueError: If it attends to views together and was trained with fewer.
        """
        if self.joint_views and count > self.config.views:
            raise ValueError(
                f"the model was trained with up to {self.config.views} views of an object, "
                f"got {count}; leave some out"
            )

    @torch.no_grad()
    def generate(
        self,
        level: Level,
        image: ImageTokens | Sequence[ImageTokens],
        seeds: Sequence[int],
        sampling: SamplingOptions,
        *,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Tensor:
        """Sample the latents of given cells.

        The noise of an asset depends on its seed and its number of cells alone.

        Args:
            level: N cells of B assets at resolution R / 8.
            image: Image tokens of the B assets, from `encode_images`. Of several views of the
                assets there is one entry each. A model that was trained with several views attends
                to all of them together, and the first one is that which it was trained to face. Of
                another model the velocities are averaged over the views.
            seeds: Seed of each asset's noise.
            sampling: Steps, guidance and solver.
            progress: Wraps the steps, as tqdm does.

        Returns:
            fp32 [N, latent_channels], latents of the VAE, rows as in `level`.

        Raises:
            ValueError: If there is not one seed and one image for each asset, there are more views
                than the model was trained with together, or as `model.rectified_flow.sample`.
        """
        views = views_of(image)
        self.check_views(len(views))
        if self.joint_views:
            views = [ImageTokens.joined(views)]
        for view in views:
            if not len(seeds) == level.batch_size == view.batch_size:
                raise ValueError(
                    f"there must be one seed and one image for each of {level.batch_size} assets, "
                    f"got {len(seeds)} seeds and {view.batch_size} images"
                )
        counts = level.asset_starts.diff().tolist()
        conditional = mean_velocity([self._velocity(level, view) for view in views])
        without_image = views[0].unconditional()
        if len(views) == 1 and 2 * len(level) <= LARGEST_PAIR:
            # One batch of both passes takes half as many launches.
            in_one_batch = self._velocity(level.twice(), views[0].followed_by(without_image))

            def both(x_NC: Tensor, t: float) -> tuple[Tensor, Tensor]:
                c_NC, u_NC = in_one_batch(torch.cat([x_NC, x_NC]), t).chunk(2)
                return c_NC, u_NC
        else:
            unconditional = self._velocity(level, without_image)

            def both(x_NC: Tensor, t: float) -> tuple[Tensor, Tensor]:
                return conditional(x_NC, t), unconditional(x_NC, t)

        velocity = guide(conditional, both, sampling.guidance, counts)
        noise = draw_noise(seeds, counts, self.config.dit.latent_channels, level.device)
        times = self.config.schedule
        x_NC = sample(
            velocity,
            noise,
            steps=sampling.steps,
            method=sampling.method,
            shift=times.shift,
            spacing=times.spacing,
            progress=progress,
        )
        return self.dit.denormalize(x_NC)

    def _velocity(self, level: Level, tokens: ImageTokens) -> Callable[[Tensor, float], Tensor]:
        """Return the velocity as a function of the noisy latents and the time.

        What depends on the cells and the image alone is computed at the first call.
        """
        fixed: FixedInputs | None = None

        def velocity(x_NC: Tensor, t_B: Tensor) -> Tensor:
            nonlocal fixed
            fixed = fixed or self.dit.fixed_inputs(level, tokens)
            return self.dit(SparseTensor(x_NC, level), t_B, tokens, fixed=fixed)

        call = ReplayedFunction(velocity) if len(level) <= LARGEST_RECORDED else velocity
        return lambda x_NC, t: call(x_NC, torch.full((level.batch_size,), t, device=x_NC.device))


def views_of(image: ImageTokens | Sequence[ImageTokens]) -> Sequence[ImageTokens]:
    """Return the image tokens of each view. A single one is one view.

    Raises:
        ValueError: If there is no view.
    """
    views = [image] if isinstance(image, ImageTokens) else image
    if not views:
        raise ValueError("image must have at least one view, got none")
    return views


def mean_velocity(
    velocities: Sequence[Callable[[Tensor, float], Tensor]],
) -> Callable[[Tensor, float], Tensor]:
    """Return the mean of several velocities, or the only one itself."""
    if len(velocities) == 1:
        return velocities[0]

    def mean(x_NC: Tensor, t: float) -> Tensor:
        total_NC = velocities[0](x_NC, t)
        for velocity in velocities[1:]:
            total_NC = total_NC + velocity(x_NC, t)
        return total_NC / len(velocities)

    return mean
