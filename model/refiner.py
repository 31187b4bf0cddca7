"""Refiners: 3D U-Nets that improve decoded volumes patch by patch.

They have the architecture and the tensor names of the published Direct3D-S2 weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.checkpoint import copy_weights
from model.config import RefinerConfig

FILTER_PASSES = 3  # how often an adaptive filter is applied with the same taps
NORM_EPS = 1e-5


class _Residual(nn.Module):
    """norm -> SiLU -> conv, twice, plus the input, which a 1^3 convolution adapts."""

    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.conv1 = nn.Conv3d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps=NORM_EPS)
        self.conv2 = nn.Conv3d(out, out, 3, padding=1)
        self.conv_shortcut = None if channels == out else nn.Conv3d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Resample(nn.Module):
    """A convolution that halves the resolution, or a transposed one that doubles it."""

    def __init__(self, channels: int, *, up: bool):
        super().__init__()
        kind = nn.ConvTranspose3d if up else nn.Conv3d
        self.conv = kind(channels, channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Depth(nn.Module):
    """The residual blocks of the U-Net at one depth, in one direction."""

    def __init__(self, widths: list[int], out: int, groups: int, *, up: bool, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(width, out, groups) for width in widths)
        name = "upsamplers" if up else "downsamplers"
        if not last:
            self.add_module(name, nn.ModuleList([_Resample(out, up=up)]))
        self.resample = None if last else name

    def resampled(self, x: Tensor) -> Tensor:
        """Change the resolution, except at the last depth of the direction."""
        return x if self.resample is None else getattr(self, self.resample)[0](x)


class _Bottom(nn.Module):
    def __init__(self, width: int, count: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(width, width, groups) for _ in range(count))


class UNet3D(nn.Module):
    """U-Net of dense volumes: [1, in_channels, p, p, p] -> [1, widths[0], p, p, p]."""

    def __init__(self, in_channels: int, config: RefinerConfig):
        super().__init__()
        widths, groups = config.widths, config.groups
        self.conv_in = nn.Conv3d(in_channels, widths[0], 3, padding=1)
        skips = [widths[0]]
        width = widths[0]
        down, up = [], []
        for depth, out in enumerate(widths):
            last = depth == len(widths) - 1
            ins = [width] + [out] * (config.blocks - 1)
            down.append(_Depth(ins, out, groups, up=False, last=last))
            skips += [out] * (config.blocks + (not last))
            width = out
        self.mid_block = _Bottom(width, config.middle_blocks + 1, groups)
        for depth, out in enumerate(reversed(widths)):
            ins = []
            for _ in range(config.blocks + 1):
                ins.append(width + skips.pop())
                width = out
            up.append(_Depth(ins, out, groups, up=True, last=depth == len(widths) - 1))
        self.down_blocks, self.up_blocks = nn.ModuleList(down), nn.ModuleList(up)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features of every voxel. The sides must be divisible at every depth."""
        x = self.conv_in(x)
        skips = [x]
        for part in self.down_blocks:
            assert isinstance(part, _Depth)
            for block in part.resnets:
                x = block(x)
                skips.append(x)
            if part.resample is not None:
                x = part.resampled(x)
                skips.append(x)
        for block in self.mid_block.resnets:
            x = block(x)
        for part in self.up_blocks:
            assert isinstance(part, _Depth)
            for block in part.resnets:
                x = block(torch.cat([x, skips.pop()], 1))
            x = part.resampled(x)
        return F.silu(self.conv_norm_out(x))


class _AdaptiveTaps(nn.Sequential):
    """The 27 taps of every voxel's own filter, whose magnitudes add up to 1."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv3d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv3d(channels, 27, 3, padding=1, bias=False),
        )

    def forward(self, input: Tensor) -> Tensor:
        return F.normalize(super().forward(input).float(), p=1, dim=1, eps=1e-12)


def _filtered(x: Tensor, taps: Tensor) -> Tensor:
    """Filter every channel by each voxel's own taps, with zeros outside the patch.

    Args:
        x: [1, C, p, p, p].
        taps: [1, 27, p, p, p]. Tap 9 i + 3 j + k belongs to the voxel at (i - 1, j - 1, k - 1).

    Returns:
        fp32 [1, C, p, p, p].
    """
    sides = x.shape[2:]
    for _ in range(FILTER_PASSES):
        padded = F.pad(x, (1,) * 6)
        x = torch.zeros_like(x, dtype=torch.float32)
        for tap in range(27):
            i, j, k = tap // 9, tap // 3 % 3, tap % 3
            window = padded[:, :, i : i + sides[0], j : j + sides[1], k : k + sides[2]]
            x.addcmul_(taps[:, tap : tap + 1], window.float())
    return x


class _FeatureMlp(nn.Module):
    """Decoder features of a voxel to the channels of the U-Net."""

    def __init__(self, features: int, out: int):
        super().__init__()
        hidden = [
            layer
            for _ in range(3)
            for layer in (nn.Linear(features, features), nn.ReLU(inplace=True))
        ]
        self.net = nn.Sequential(*hidden, nn.Linear(features, out))

    def forward(self, x_NF: Tensor) -> Tensor:
        return self.net(x_NF)


class VolumeRefiner(nn.Module):
    """A refiner of dense patches of decoded volumes.

    Attributes:
        config: Sizes of the model, and the patches that it sees.
    """

    Config = RefinerConfig

    def __init__(self, config: RefinerConfig):
        super().__init__()
        self.config = config
        width = config.widths[0]
        refines = config.output == "sdf"
        self.unet3d1 = UNet3D(2 * width if refines else width, config)
        self.conv_in = nn.Conv3d(1, width, 3, padding=1)
        if refines:
            self.latent_mlp = _FeatureMlp(config.features, width)
            self.adaptive_conv1 = _AdaptiveTaps(width)
            self.adaptive_conv2 = _AdaptiveTaps(width)
            self.adaptive_conv3 = _AdaptiveTaps(width)
            self.mid_conv = nn.Conv3d(width, width, 3, padding=1)
        self.conv_out = nn.Conv3d(width, 1, 3, padding=1)

    def embed_features(self, features_NF: Tensor) -> Tensor:
        """Turn the decoder's features of voxels into the channels that `forward` takes.

        Args:
            features_NF: [N, features].

        Returns:
            [N, widths[0]].
        """
        return self.latent_mlp(features_NF)

    def forward(self, sdf: Tensor, embedded: Tensor | None = None) -> Tensor:
        """Refine a patch.

        Args:
            sdf: [1, 1, p, p, p], the decoded values, 1 where nothing was decoded.
            embedded: [1, widths[0], p, p, p], the embedded features of all voxels, those that were
                not decoded included. A refiner of signs takes none.

        Returns:
            fp32 [1, 1, p, p, p]: values in [-1, 1], or logits of the signs, which are 1 from 0 on.
        """
        x = self.conv_in(sdf)
        if embedded is None:
            return self.conv_out(self.unet3d1(x)).float()
        x = self.unet3d1(torch.cat([x, embedded.to(x.dtype)], 1))
        x = self.mid_conv(_filtered(x, self.adaptive_conv1(x)))
        x = _filtered(x, self.adaptive_conv2(x))
        return torch.tanh(_filtered(self.conv_out(x), self.adaptive_conv3(x)))

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a published refiner, whose names are ours.

        Args:
            weights: The published state dict.

        Raises:
            CheckpointError: If names or shapes do not fit. The message lists all of them.
        """
        copy_weights(weights, self, "the state dict")
