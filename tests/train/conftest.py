"""Builds of analytic shapes that all tests of a session share."""

import pytest
import torch

from tests.train.analytic_builds import add_renders, make_build
from tests.train.ss_dit_fixtures import VIEWS, encode_with, make_vae

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    return make_build(tmp_path_factory.mktemp("build"), resolutions=(32, 40))


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """A build with renders and latents, and the VAE of its latents."""
    root = make_build(tmp_path_factory.mktemp("rendered"), assets=6, val=2, shard_size=4)
    add_renders(root, VIEWS)
    vae = make_vae(tmp_path_factory.mktemp("vae") / "export")
    encode_with(vae, root)
    return root, vae
