"""Names that several configurations share: camera sets and image formats."""

from typing import Literal

CameraSet = Literal["paper", "wide"]
ImageFormat = Literal["png", "webp"]
