"""Rows of a remote array: those that Zarr reads, in one request, and damage is noticed."""

import numpy as np
import pytest
import zarr

from pipeline.storage.remote import RemotePath
from pipeline.storage.remote_zarr import zarr_store
from pipeline.storage.row_reader import CHECKSUM_BYTES, RowReader
from pipeline.storage.sdf_shard import CHUNK_ROWS, ArrayWriter

ROWS = 3 * CHUNK_ROWS + 100


@pytest.fixture
def stored(tmp_path):
    """The rows of an array of several chunks, and the URL of its group in an object store."""
    zarr.create_group(tmp_path / "group", zarr_format=3)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((ROWS, 5)).astype(np.float16)
    writer = ArrayWriter(tmp_path / "group", "values", "float16", (5,))
    writer.append(rows)
    writer.close()
    url = RemotePath(f"memory://{tmp_path.name}", (0.0,))
    url.upload(tmp_path / "group")
    return rows, url


def reader_of(url):
    array = zarr.open_group(zarr_store(url), mode="r", zarr_format=3)["values"]
    return RowReader(array, url / "values")


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        *((0, 1), (0, CHUNK_ROWS), (CHUNK_ROWS - 1, CHUNK_ROWS + 1)),
        *((50, ROWS), (ROWS - 1, ROWS), (7, 7)),
    ],
)
def test_object_store_rows_are_those_of_the_array(stored, start, stop):
    rows, url = stored
    found = reader_of(url).read(start, stop)
    assert found.dtype == rows.dtype
    np.testing.assert_array_equal(found, rows[start:stop])


def test_object_store_rows_cost_one_request_after_the_index(stored, monkeypatch):
    rows, url = stored
    reader = reader_of(url)
    reader.read(0, 1)
    requests = []
    original = RemotePath.read_range

    def count(self, start, size):
        requests.append((self.name, size))
        return original(self, start, size)

    monkeypatch.setattr(RemotePath, "read_range", count)
    np.testing.assert_array_equal(reader.read(10, ROWS - 10), rows[10 : ROWS - 10])
    assert len(requests) == 1


def test_object_store_a_damaged_index_is_noticed(stored):
    _, url = stored
    file = url / "values" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[-CHECKSUM_BYTES - 3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"the index of the chunks of .* is damaged"):
        reader_of(url).read(0, 1)


def test_object_store_an_array_of_another_layout_is_refused(tmp_path):
    array = zarr.create_array(tmp_path / "other", shape=(9, 4), chunks=(3, 2), dtype="int16")
    with pytest.raises(ValueError, match=r"must be one file of Blosc chunks .* chunks \(3, 2\)"):
        RowReader(array, RemotePath("memory://other"))


def test_object_store_chunks_of_a_unit_are_one_range_for_all_their_rows(stored, monkeypatch):
    """A file of four chunks in units of about two: every row costs one of the same ranges."""
    rows, url = stored
    reader = reader_of(url)
    reader.read_index()
    ranges = []
    original = RemotePath.read_range

    def note(self, start, size):
        ranges.append((start, size))
        return original(self, start, size)

    monkeypatch.setattr(RemotePath, "read_range", note)
    monkeypatch.setattr(RemotePath, "unit_bytes", int(reader.read_index()[2, 0]))
    for start in range(0, ROWS, 100):
        np.testing.assert_array_equal(reader.read(start, start + 50), rows[start : start + 50])
    spans = reader.read_index()
    assert set(ranges) == {
        (0, int(spans[1].sum())),
        (int(spans[2, 0]), int(spans[3].sum() - spans[2, 0])),
    }
    ranges.clear()
    np.testing.assert_array_equal(reader.read(10, ROWS - 10), rows[10 : ROWS - 10])
    assert len(ranges) == 2
