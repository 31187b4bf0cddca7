"""Render shards: bytes, reading with `RenderShard` and WebDataset, and checks of the format."""

import json
import tarfile
import tracemalloc
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.core.cameras import sample_camera
from pipeline.core.image_codec import encode
from pipeline.core.schema import View
from pipeline.storage.render_shard import (
    RenderShard,
    ViewFolder,
    check_render_shard,
    index_path,
    read_index,
    save_view,
    write_render_shard,
)

UIDS = ["folder-b", "folder-a", "folder-c-7"]  # in the order of a plan, not sorted
VIEWS, SIZE = 3, 16


def view_of(uid, number, cameras="paper"):
    rng = np.random.default_rng([*uid.encode(), number])
    meta = {
        "uid": uid,
        "view": number,
        "width": SIZE,
        "height": SIZE,
        **sample_camera(uid, number, cameras).meta(),
    }
    return View(rgba=rng.integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8), meta=meta)


def entries(format="png"):
    views = {uid: [view_of(uid, number) for number in range(VIEWS)] for uid in UIDS}
    return [(uid, [(encode(view, format), view.meta) for view in views[uid]]) for uid in UIDS]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "renders" / "paper" / "000007.tar"
    write_render_shard(path, entries())
    return path


def check(path, **options):
    return check_render_shard(path, UIDS, VIEWS, SIZE, "paper", **options)


@pytest.mark.parametrize("format", ["png", "webp"])
def test_views_are_read_back_by_offset(tmp_path, format):
    path = tmp_path / "000000.tar"
    write_render_shard(path, entries(format), format)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000.index.parquet", "000000.tar"]
    shard = RenderShard(path)
    assert shard.uids == UIDS
    assert shard.keys == [
        f"{uid}-{view:02d}" for view in range(VIEWS) for uid in UIDS
    ]  # view-major
    for uid in UIDS:
        assert shard.views(uid) == [0, 1, 2]
        for number in range(VIEWS):
            expected = view_of(uid, number)
            view = shard.read(uid, number)
            assert (view.rgba == expected.rgba).all()
            assert view.meta == expected.meta
    assert shard.views("folder-z") == []
    for uid, number in (("folder-a", 3), ("folder-z", 0)):
        with pytest.raises(KeyError):
            shard.read(uid, number)
    assert check(path) == []


def test_webdataset_reads_a_shard(shard):
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode("rgba8"))
    assert [sample["__key__"] for sample in samples] == [
        f"{uid}-{view:02d}" for view in range(VIEWS) for uid in UIDS
    ]
    assert (samples[4]["png"] == view_of("folder-a", 1).rgba).all()
    assert samples[4]["json"] == view_of("folder-a", 1).meta


def test_bytes_depend_on_the_entries_alone(shard, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for uid, views in reversed(entries()):
        for data, meta in views:
            save_view(scratch, uid, meta["view"], data, dict(reversed(meta.items())), "png")
    again = tmp_path / "elsewhere" / "000007.tar"
    write_render_shard(again, [(uid, ViewFolder(scratch, uid, VIEWS)) for uid in UIDS])
    assert again.read_bytes() == shard.read_bytes()
    assert index_path(again).read_bytes() == index_path(shard).read_bytes()
    with tarfile.open(shard) as tar:
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in tar} == {
            (0, 0, 0, 0o644, "", "")
        }
        names = [
            f"{uid}-{view:02d}.{kind}"
            for view in range(VIEWS)
            for uid in UIDS
            for kind in ("png", "json")
        ]
        assert tar.getnames() == names
        text = tar.extractfile("folder-a-01.json").read()
    assert text == json.dumps(view_of("folder-a", 1).meta, sort_keys=True).encode()


def test_the_index_has_the_offsets_of_the_tar(shard):
    with tarfile.open(shard) as tar:
        expected = [(m.name.split(".")[0], m.name, m.offset_data, m.size) for m in tar]
    assert [tuple(row) for row in read_index(shard)] == expected
    assert pq.read_schema(index_path(shard)).names == ["key", "member", "offset", "size"]


def test_writing_holds_one_view_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "scratch").mkdir()
    for number in range(24):
        save_view(
            tmp_path / "scratch",
            "folder-a",
            number,
            rng.bytes(1 << 20),
            view_of("folder-a", number).meta,
            "png",
        )
    tracemalloc.start()
    write_render_shard(
        tmp_path / "000000.tar", [("folder-a", ViewFolder(tmp_path / "scratch", "folder-a", 24))]
    )
    assert tracemalloc.get_traced_memory()[1] < 6 << 20
    tracemalloc.stop()


def test_wrong_entries_are_refused(tmp_path):
    good = entries()
    path = tmp_path / "000000.tar"
    for wrong in ([good[0], good[0]], [good[0], (good[1][0], good[1][1][:2])]):
        with pytest.raises(ValueError, match="equally many views"):
            write_render_shard(path, wrong)
    with pytest.raises(ValueError, match="meta must be of folder-a view 0"):
        write_render_shard(path, [("folder-a", good[0][1])])
    with pytest.raises(ValueError, match="uid must be"):
        write_render_shard(path, [("Folder.a", [(b"", {"uid": "Folder.a", "view": 0})])])
    assert not list(tmp_path.iterdir())


def rewrite(path, change):
    """Rewrite a shard with `change` applied to its members (name, bytes), and update its index."""
    with tarfile.open(path) as tar:
        members = change([(m.name, tar.extractfile(m).read()) for m in tar])
    rows = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            rows.append((name.split(".")[0], name, tar.offset + 512, len(data)))
            tar.addfile(header, BytesIO(data))
    columns = [pa.array(column) for column in zip(*rows)]
    schema = pq.read_schema(index_path(path))
    pq.write_table(pa.table(columns, schema=schema), index_path(path))


def edit_json(member, **fields):
    def change(members):
        return [
            (
                name,
                json.dumps({**json.loads(data), **fields}, sort_keys=True).encode()
                if name == member
                else data,
            )
            for name, data in members
        ]

    return change


def replace_data(member, data):
    return lambda members: [(name, data if name == member else old) for name, old in members]


def swap(members):
    return [*members[2:4], *members[:2], *members[4:]]


def damaged(data):
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


A1 = "folder-a-01"
GOOD = view_of("folder-a", 1)
LARGE = encode(View(rgba=np.zeros((SIZE, 2 * SIZE, 4), np.uint8), meta={}))
OTHER_SET = {
    name: value
    for name, value in view_of("folder-a", 1, "wide").meta.items()
    if name in sample_camera("a", 0).meta()
}
BREACHES = {
    "missing view": (lambda members: [m for m in members if A1 not in m[0]], "missing view", A1),
    "missing image": (
        lambda members: [m for m in members if m[0] != f"{A1}.png"],
        "incomplete view",
        A1,
    ),
    "order": (swap, "order", "000007.tar"),
    "asset-major": (lambda members: sorted(members), "order", "000007.tar"),
    "unexpected view": (
        lambda m: [*m, ("folder-z-00.png", b""), ("folder-z-00.json", b"")],
        "unexpected view",
        "folder-z",
    ),
    "third member": (lambda members: [*members, (f"{A1}.webp", b"")], "unexpected member", A1),
    "member twice": (
        lambda members: [m for m in members for _ in range(1 + (m[0] == f"{A1}.png"))],
        "unexpected member",
        A1,
    ),
    "flipped byte": (replace_data(f"{A1}.png", damaged(encode(GOOD))), "image", A1),
    "not an image": (replace_data(f"{A1}.png", b"<html>"), "image", A1),
    "image size": (replace_data(f"{A1}.png", LARGE), "image size", A1),
    "stated size": (edit_json(f"{A1}.json", width=8, height=8), "image size", A1),
    "json of another view": (edit_json(f"{A1}.json", view=2), "json", A1),
    "json of another asset": (edit_json(f"{A1}.json", uid="folder-b"), "json", A1),
    "broken json": (replace_data(f"{A1}.json", b"{"), "json", A1),
    "json is a list": (replace_data(f"{A1}.json", b"[]"), "json", A1),
    "no camera": (replace_data(f"{A1}.json", b'{"uid": "folder-a", "view": 1}'), "json", A1),
    "camera moved": (edit_json(f"{A1}.json", c2w=np.eye(4).tolist()), "camera", A1),
    "camera is text": (edit_json(f"{A1}.json", distance="far"), "camera", A1),
    "camera turned": (
        edit_json(f"{A1}.json", azimuth_degrees=-GOOD.meta["azimuth_degrees"]),
        "camera",
        A1,
    ),
    "other camera set": (edit_json(f"{A1}.json", **OTHER_SET), "camera", A1),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_check_names_the_rule_and_the_asset(shard, breach):
    change, rule, where = BREACHES[breach]
    rewrite(shard, lambda members: members)
    assert check(shard) == []
    rewrite(shard, change)
    problems = check(shard)
    assert problems
    assert any(problem.startswith(rule + ":") and where in problem for problem in problems), (
        problems
    )


def test_a_check_requires_the_expected_assets_views_and_size(shard):
    assert any(
        "lacks folder-z-00" in p for p in check_render_shard(shard, [*UIDS, "folder-z"], VIEWS)
    )
    assert any("lacks folder-a-03" in p for p in check_render_shard(shard, UIDS, VIEWS + 1))
    assert any("holds folder-c-7-00" in p for p in check_render_shard(shard, UIDS[:2], VIEWS))
    assert any(p.startswith("order") for p in check_render_shard(shard, UIDS[::-1], VIEWS))
    assert any(p.startswith("image size") for p in check_render_shard(shard, UIDS, VIEWS, SIZE * 2))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.97, 0.999])
def test_a_check_finds_a_truncated_tar(shard, keep):
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * keep)])
    assert check(shard)


def test_a_check_finds_wrong_offsets(shard):
    table = pq.read_table(index_path(shard))
    offsets = table["offset"].to_pylist()
    offsets[3] += 1
    pq.write_table(table.set_column(2, "offset", pa.array(offsets)), index_path(shard))
    assert [problem.split(":")[0] for problem in check(shard)] == ["index mismatch"]


def test_another_format_version_is_refused(shard):
    table = pq.read_table(index_path(shard)).replace_schema_metadata({"format_version": "2"})
    pq.write_table(table, index_path(shard))
    with pytest.raises(ValueError, match=r"format_version .* must be 1, got 2"):
        RenderShard(shard)
    assert "format_version" in check(shard)[0]
    index_path(shard).unlink()
    assert check(shard)[0].startswith("unreadable")
