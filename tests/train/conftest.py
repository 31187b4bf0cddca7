"""A build of analytic shapes that the tests of a session share."""

import pytest
import torch

from tests.train.builds import make_build

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    return make_build(tmp_path_factory.mktemp("build"), resolutions=(32, 40))
