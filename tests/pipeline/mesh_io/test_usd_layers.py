"""Composition of USD layers: what is followed, and that nothing outside the source is read."""

import os
from pathlib import Path

import pytest

pytest.importorskip("pxr", reason="the extra usd is not installed")

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.sources.github import find_references
from tests.pipeline.mesh_io.measures import BOX_AREA, area, assert_box, read, rejected
from tests.pipeline.mesh_io.usd_files import HEAD, binary, layer, mesh, package, root


def arc(target: str, name: str = "root", kind: str = "references") -> str:
    return f'def Xform "{name}" (\n    {kind} = {target}\n)\n{{\n}}\n'


PART = layer(root(mesh()))


class TestArcs:
    @pytest.mark.parametrize("kind", ["references", "payload", "prepend references"])
    @pytest.mark.parametrize("name", ["part.usda", "./part.usda", "sub/../part.usda", "PART.usda"])
    def test_files_beside_the_asset_are_followed(self, tmp_path, kind, name):
        (tmp_path / "part.usda").write_text(PART, encoding="utf-8")
        found, codes = read(tmp_path, "a.usda", layer(arc(f"@{name}@", kind=kind)))
        assert_box(found)
        assert codes == {}

    def test_sublayers_variants_and_inherited_classes_are_composed(self, tmp_path):
        (tmp_path / "part.usdc").write_bytes(binary(PART, tmp_path))
        head = HEAD.replace("(\n", "(\n    subLayers = [@part.usdc@]\n", 1)
        assert_box(read(tmp_path, "a.usda", layer(head=head))[0])
        chosen = f"""def Xform "root" (
            variants = {{
                string size = "big"
            }}
            prepend variantSets = "size"
        )
        {{
            variantSet "size" = {{
                "big" {{
                    {mesh()}
                }}
                "small" {{
                    {mesh("other")}
                }}
            }}
        }}
        """
        found, codes = read(tmp_path, "a.usda", layer(chosen))
        assert_box(found)
        assert codes == {}
        inherits = f'class Xform "c"\n{{\n{mesh()}\n}}\n' + arc("</c>", kind="inherits")
        assert_box(read(tmp_path, "a.usda", layer(inherits))[0])

    def test_packages_refer_to_their_parts_and_are_referred_to(self, tmp_path):
        members = {"a.usda": layer(arc("@parts/part.usda@")), "parts/part.usda": PART}
        content = package(members, tmp_path / "p.usdz")
        assert_box(read(tmp_path, "b.usdz", content)[0])
        assert_box(read(tmp_path, "a.usda", layer(arc("@p.usdz@")))[0])
        assert_box(read(tmp_path, "a.usda", layer(arc("@p.usdz[parts/part.usda]@")))[0])
        outer = package({"a.usda": layer(arc("@p.usdz@")), "p.usdz": content}, tmp_path / "q")
        found, codes = read(tmp_path, "c.usdz", outer)
        assert_box(found)
        assert codes == {}

    def test_the_first_file_of_a_package_may_be_a_package(self, tmp_path):
        members = {"a.usda": layer(arc("@part.usda@")), "part.usda": PART}
        content = package(members, tmp_path / "p.usdz")
        decoy = layer(root(mesh("decoy") * 2))
        nested = package({"p.usdz": content, "z.usda": decoy}, tmp_path / "n.usdz")
        for name in ("n.usdz", "n.usdz[p.usdz]", "n.usdz[p.usdz[a.usda]]"):
            found, codes = read(tmp_path, "a.usda", layer(arc(f"@{name}@")))
            assert_box(found)
            assert codes == {}
        assert_box(read(tmp_path, "b.usdz", nested)[0])
        for depth in range(2, 12):
            content = package({"p.usdz": content}, tmp_path / "q.usdz")
            reason = rejected(tmp_path, "b.usdz", content)
            assert reason == ("loaded" if depth <= 8 else "unreadable"), depth
        assert rejected(tmp_path, "b.usdz", nested, max_unpacked_bytes=1000) == "allocation_bomb"

    def test_messages_name_no_temporary_file(self, tmp_path):
        messages = []
        for _ in range(2):
            with pytest.raises(Reject) as caught:
                read(tmp_path, "a.usdc", b"PXR-USDC" + bytes([0, 8]) + bytes(200))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert "/tmp" not in messages[0]

    def test_a_part_that_is_missing_or_unreadable_costs_itself(self, tmp_path):
        (tmp_path / "broken.usda").write_text("#usda 1.0\ndef {", encoding="utf-8")
        (tmp_path / "empty.usda").write_text("#usda 1.0\n", encoding="utf-8")
        (tmp_path / "x.gltf").write_text("{}", encoding="utf-8")
        for target, code in (
            ("@gone.usda@", "side_file_missing"),
            ("@gone.usdz[a.usda]@", "side_file_missing"),
            ("@broken.usda@", "reference_unresolved"),
            ("@empty.usda@", "reference_unresolved"),
            ("</gone>", "reference_unresolved"),
            ("@x.gltf@", "reference_unresolved"),
            ('@`"${NAME}.usda"`@', "reference_unresolved"),
        ):
            found, codes = read(tmp_path, "a.usda", layer(arc(target, "b"), root(mesh())))
            assert_box(found)
            assert codes == {code: 1}, target
        head = HEAD.replace("(\n", "(\n    subLayers = [@gone.usda@, @x.gltf@]\n", 1)
        found, codes = read(tmp_path, "a.usda", layer(root(mesh()), head=head))
        assert_box(found)
        assert codes == {"side_file_missing": 1, "reference_unresolved": 1}

    def test_value_clips_are_reported_and_not_read(self, tmp_path):
        clips = """(
            clips = {
                dictionary default = {
                    asset[] assetPaths = [@clip.usda@]
                    string primPath = "/root"
                    double2[] active = [(0, 0)]
                    double2[] times = [(0, 0)]
                    asset manifestAssetPath = @manifest.usda@
                }
            }
        )"""
        found, codes = read(tmp_path, "a.usda", layer(root(mesh(), metadata=clips)))
        assert_box(found)
        assert codes == {"reference_unresolved": 1}


class TestPaths:
    @pytest.mark.parametrize("form", ["../../secret.usda", "{absolute}", "file://{absolute}"])
    @pytest.mark.parametrize("kind", ["references", "payload", "subLayers"])
    def test_nothing_outside_the_root_is_read(self, tmp_path, form, kind):
        folder = tmp_path / "source" / "asset"
        folder.mkdir(parents=True)
        secret = tmp_path / "secret.usda"
        secret.write_text(PART, encoding="utf-8")
        target = form.format(absolute=secret)
        if kind == "subLayers":
            head = HEAD.replace("(\n", f"(\n    subLayers = [@{target}@]\n", 1)
            text = layer(root(mesh("own")), head=head)
        else:
            text = layer(arc(f"@{target}@", "b", kind), root(mesh("own")))
        path = folder / "a.usda"
        path.write_text(text, encoding="utf-8")
        found, report = load_with_report(path, LoadConfig(), root=tmp_path / "source")
        assert area(found) == pytest.approx(BOX_AREA)
        assert [warning.code for warning in report.warnings] == ["side_file_missing"]
        # The same file counts where it lies below the root.
        found, report = load_with_report(path, LoadConfig(), root=tmp_path)
        assert report.warnings == () or form.startswith("file")

    def test_a_link_that_leads_out_is_not_followed(self, tmp_path):
        folder = tmp_path / "source"
        folder.mkdir()
        (tmp_path / "secret.usda").write_text(PART, encoding="utf-8")
        (folder / "link.usda").symlink_to(tmp_path / "secret.usda")
        found, codes = read(folder, "a.usda", layer(arc("@link.usda@", "b"), root(mesh())))
        assert_box(found)
        assert codes == {"side_file_missing": 1}


class TestCycles:
    @pytest.mark.parametrize(
        "text",
        [
            arc("@a.usda@</root>"),
            arc("</root>"),
            arc("</b>") + arc("</root>", "b"),
            arc("@b.usda@"),
            arc("</root>", kind="inherits"),
        ],
    )
    def test_a_cycle_of_references_ends(self, tmp_path, text):
        (tmp_path / "b.usda").write_text(layer(arc("@a.usda@")), encoding="utf-8")
        found, codes = read(tmp_path, "a.usda", layer(text, mesh()))
        assert_box(found)
        assert codes["node_cycle"] >= 1
        assert set(codes) <= {"node_cycle", "reference_unresolved"}

    def test_a_layer_that_is_its_own_sublayer_ends(self, tmp_path):
        head = HEAD.replace("(\n", "(\n    subLayers = [@a.usda@]\n", 1)
        found, codes = read(tmp_path, "a.usda", layer(root(mesh()), head=head))
        assert_box(found)
        assert codes == {"node_cycle": 1}

    def test_a_chain_of_references_that_doubles_the_prims_is_rejected(self, tmp_path):
        prims = [root(mesh())]
        for level in range(40):
            below = "root" if level == 0 else f"l{level - 1}"
            prims.append(
                f'def Xform "l{level}"\n{{\n'
                + arc(f"</{below}>", "x")
                + arc(f"</{below}>", "y")
                + "}\n"
            )
        assert rejected(tmp_path, "a.usda", layer(*prims)) == "too_many_faces"
        found, codes = read(tmp_path, "a.usda", layer(*prims[:4]))  # 1 + 2 + 4 + 8 boxes
        assert area(found) == pytest.approx(15 * BOX_AREA)
        assert codes == {}


def crash(_: object) -> None:
    """End the process as a fault of the library would."""
    os.kill(os.getpid(), 11)


def load_in_child(path: str) -> None:
    try:
        load_with_report(Path(path), LoadConfig())
    except Reject as verdict:
        raise SystemExit(str(verdict)) from verdict


def test_a_crash_costs_one_asset_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "a.usda"
    path.write_text(PART, encoding="utf-8")
    process = IsolatedProcess("tests.pipeline.mesh_io.test_usd_layers:warm_up")
    try:
        reasons = []
        for name, argument in (("crash", ""), ("load_in_child", str(path))):
            ended = process.call(
                f"tests.pipeline.mesh_io.test_usd_layers:{name}",
                argument,
                log=tmp_path / "log",
                timeout_s=60,
                memory_bytes=4 << 30,
            )
            reasons.append(ended.reason)
        assert reasons == ["crashed_signal_11", ""]
    finally:
        process.close()


def warm_up() -> None:
    """Import nothing before the first child."""


def test_the_files_of_a_layer_are_found_for_downloads(tmp_path):
    text = layer(
        arc("@./part.usda@", "a"),
        arc("@p.usdz[b.usda]@", "b"),
        'def Shader "s"\n{\n    asset inputs:file = @../tex/a b.png@\n}\n',
        arc("@/absolute.usda@", "c"),
        arc("@https://example.org/x.usda@", "d"),
    )
    expected = {"./part.usda", "p.usdz", "../tex/a b.png"}
    (tmp_path / "a.usda").write_text(text, encoding="utf-8")
    assert set(find_references(tmp_path / "a.usda")) == expected
    (tmp_path / "b.usdc").write_bytes(binary(text, tmp_path))
    assert {name.removeprefix("./") for name in find_references(tmp_path / "b.usdc")} == {
        name.removeprefix("./") for name in expected
    }
    (tmp_path / "c.usdc").write_bytes(b"PXR-USDC" + bytes(90))
    assert find_references(tmp_path / "c.usdc") == []
