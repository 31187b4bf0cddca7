"""Options of `python -m model.app`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from model.config import Precision, Refine
from pipeline.core.devices import Device, check_device


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Serve a page and an HTTP API that generate meshes from images and browse a build."""

    checkpoint: str | None = None
    """Directory of the trained stages, which python -m train.export writes, or of the published
    Direct3D-S2 weights. "props" takes the weights of the package, hf://OWNER/NAME/SUBFOLDER
    downloads from the Hugging Face hub. Without it only the build of --data is shown."""

    data: Path | None = None
    """Output directory of a build, whose assets the page shows."""

    host: str = "127.0.0.1"
    """Address that the server listens on. The default answers this machine alone. 0.0.0.0 answers
    the whole network, without a password."""

    port: int = 7860
    """Port that the server listens on. 0 takes a free one."""

    device: Device = "auto"
    """Device of the models. "auto" takes a GPU if there is one, "cuda:N" the GPU of number N."""

    precision: Precision = "auto"
    """Precision of matrix products. "auto" is bf16 on a GPU and fp32 on the CPU."""

    refine: Refine | None = None
    """Refiners that are loaded, as in python -m model.generate."""

    image_encoder: str | None = None
    """DINOv2 weights: a folder or a name on the Hugging Face hub. Without it those that the
    checkpoint names are taken."""

    low_memory: bool = False
    """Load each stage when it runs and free it afterwards, in every generation. This needs less
    memory and more time, and gives the same meshes."""

    max_upload_mb: int = 32
    """Largest size of a request in megabytes."""

    max_megapixels: int = 25
    """Largest number of pixels of an image, in millions."""

    max_images: int = 8
    """Largest number of images of one object."""

    max_queue: int = 16
    """Largest number of generations that wait for the device. Further ones are refused."""

    keep_results: int = 64
    """Number of ended generations whose meshes are kept in memory and can be downloaded."""

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.checkpoint is None and self.data is None:
            raise ValueError("checkpoint must be given, or --data, got neither")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        for name in ("max_upload_mb", "max_megapixels", "max_images", "max_queue", "keep_results"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    @property
    def max_upload_bytes(self) -> int:
        """Largest size of a request in bytes."""
        return self.max_upload_mb * 10**6

    @property
    def max_pixels(self) -> int:
        """Largest number of pixels of an image."""
        return self.max_megapixels * 10**6

    @property
    def loopback_only(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
