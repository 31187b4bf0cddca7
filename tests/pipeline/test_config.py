"""The configuration of a build: which options decide the hash of a product."""

from pipeline.config import BuildConfig
from pipeline.core.product import Product

SDF_64 = Product.sdf(64)
RENDERS = Product.renders("paper")


def test_the_hash_of_a_product_depends_on_what_decides_its_bytes():
    base = BuildConfig()
    sdf = base.product_hash(SDF_64)
    renders = base.product_hash(RENDERS)
    other_outputs = BuildConfig(resolutions=(64, 512), workers=3, out=base.out / "x")
    assert other_outputs.product_hash(SDF_64) == sdf
    assert BuildConfig(views=3).product_hash(SDF_64) == sdf
    assert BuildConfig(views=3).product_hash(RENDERS) != renders
    assert BuildConfig(topology_resolution=256).product_hash(SDF_64) != sdf
    assert base.product_hash(Product.sdf(128)) != sdf
