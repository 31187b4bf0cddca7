"""The finished build of the data pipeline's tests, for the tests of the page."""

from tests.pipeline.conftest import tiny_build

__all__ = ["tiny_build"]
