"""Names and order of products, and the manifest columns of their token counts."""

import random

import pytest

from pipeline.core.product import Product, is_product_name, resolution_of_column, tokens_column


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("sdf-512", Product.sdf(512)),
        ("screen-64", Product.screen(64)),
        ("renders-paper", Product.renders("paper")),
    ],
)
def test_a_name_is_parsed_and_written_back(name, product):
    assert Product.parse(name) == product
    assert str(Product.parse(name)) == f"{product}" == name
    assert is_product_name(name)


@pytest.mark.parametrize("name", ["", "sdf", "sdf-", "sdf-x", "renders-", "latents-64", "fetch"])
def test_another_name_is_refused_with_the_names_that_there_are(name):
    assert not is_product_name(name)
    with pytest.raises(ValueError, match="must be sdf-RESOLUTION, screen-RESOLUTION, or"):
        Product.parse(name)


def test_an_asset_goes_through_the_resolutions_upwards_then_the_renders():
    names = ["sdf-64", "sdf-96", "sdf-512", "sdf-1024", "renders-paper", "renders-wide"]
    products = [Product.parse(name) for name in names]
    random.Random(0).shuffle(products)
    assert [*map(str, sorted(products))] == names


def test_resolution_and_cameras():
    assert (Product.parse("sdf-96").resolution, Product.parse("screen-32").resolution) == (96, 32)
    assert Product.parse("renders-wide").variant == "wide"
    with pytest.raises(ValueError, match="renders-wide has no resolution"):
        _ = Product.parse("renders-wide").resolution


def test_the_column_of_a_resolution_and_back():
    assert tokens_column(512) == "tokens_512"
    assert resolution_of_column("tokens_512") == 512
    assert [resolution_of_column(name) for name in ("tokens", "tokens_", "split")] == [None] * 3
