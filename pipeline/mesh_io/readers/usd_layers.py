"""Open the layers of a USD asset without letting the library read a file of its own accord.

Every layer is opened as an anonymous layer, and each name of another layer in it is replaced by
the anonymous layer that `pipeline.mesh_io.side_files` finds for it. What lies outside the source
is not found, so the library gets no path that leads there.
"""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import re
import struct
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pxr import Ar, Sdf, Tf

from pipeline.core.errors import Reject
from pipeline.mesh_io.file_checks import check_claimed_bytes
from pipeline.mesh_io.reader_context import ReaderContext
from pipeline.mesh_io.side_files import PackageFiles, SideFiles
from pipeline.mesh_io.zip_package import MEMBER_ERRORS, ZipPackage

LAYER_FORMATS = ("usd", "usda", "usdc")
BINARY_SIGNATURE = b"PXR-USDC"
ZIP_SIGNATURE = b"PK\x03\x04"
MAX_LAYERS = 1000  # of one asset
MAX_NESTED_PACKAGES = 8
MAX_DEPTH = 2000  # of brackets in a text, far below what overflows the stack of the parser
MAX_PRIMS_PER_INSTANCE = 10  # of composed prims, relative to the limit of instances
PRIM_SPECS_PER_STEP = 10_000_000  # largest number of visited specs while prims are counted

# Where a binary layer states the place of its table of sections, and a section: its name, its first
# byte and its size.
TABLE_OFFSET = 16
FIRST_VERSION = (0, 4)  # the first version with compressed sections
SIZES = struct.Struct("<QQQ")
SECTION = struct.Struct("<16sqq")

Files = SideFiles | PackageFiles
Key = tuple[str, ...]  # a path, and the names of the parts in the packages there


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """An opened layer and where its relative names lead."""

    layer: Sdf.Layer
    files: Files
    key: Key


class Layers:
    """The layers of one asset.

    Args:
        content: The main file: a layer or a package.
        context: Finds the other files, and receives warnings.

    Raises:
        Reject: "unreadable" if the main layer cannot be read, "allocation_bomb" if the layers
            together are too large, "too_many_faces" if they compose to too many prims.
    """

    def __init__(self, content: bytes, context: ReaderContext):
        self.context = context
        self.warnings = context.warnings
        self._packages: dict[Key, ZipPackage] = {}
        self._opened: dict[Key, _Layer | None] = {}
        self._by_identifier: dict[str, _Layer] = {}
        self._bytes = 0
        self._pending: list[_Layer] = []

        key = (str(context.path),)
        files: Files = context.side_files
        if content.startswith(ZIP_SIGNATURE):
            try:
                content, key, files = self._enter(key, content)
            except MEMBER_ERRORS as error:
                raise _unreadable(f"the first layer of the package is damaged: {error}") from error
        try:
            root = self._open(content, files, key)
        except Tf.ErrorException as error:
            raise _unreadable(error_text(error)) from error
        self.root = root.layer
        while self._pending:
            self._connect(self._pending.pop())
        self._check_prim_count()

    def read(self, layer: Sdf.Layer, name: str) -> bytes | None:
        """Return the content of a file that a layer names, or None with a warning."""
        opened = self._by_identifier.get(layer.identifier)
        if opened is None:
            return None
        found = self._find(name, opened)
        return None if found is None else found[0]

    def _open(self, content: bytes, files: Files, key: Key) -> _Layer:
        """Open a layer.

        Raises:
            Tf.ErrorException: If it cannot be read.
            Reject: "allocation_bomb".
        """
        self._count(content)
        if content.startswith(BINARY_SIGNATURE):
            check_claims(content)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "layer.usdc"
                path.write_bytes(content)
                layer = Sdf.Layer.OpenAsAnonymous(str(path))
        else:
            layer = Sdf.Layer.CreateAnonymous("layer.usda")
            layer.ImportFromString(self._text(content))
        opened = _Layer(layer=layer, files=files, key=key)
        self._opened[key] = opened
        self._by_identifier[layer.identifier] = opened
        self._pending.append(opened)
        return opened

    def _count(self, content: bytes) -> None:
        """Count the bytes of a layer or of a package in a package.

        Raises:
            Reject: "allocation_bomb" if all of them together are too many.
        """
        self._bytes += len(content)
        if self._bytes > self.context.cfg.max_unpacked_bytes or len(self._opened) > MAX_LAYERS:
            raise Reject(
                "allocation_bomb", what="layers", claimed=self._bytes, layers=len(self._opened)
            )

    def _text(self, content: bytes) -> str:
        """Decode a layer of text.

        Raises:
            Reject: "unreadable" if its brackets are nested too deeply for the parser.
        """
        values = np.frombuffer(content, dtype=np.uint8)
        steps = np.zeros(len(values), dtype=np.int8)
        for opening, closing in ("{}", "()", "[]"):
            steps[values == ord(opening)] = 1
            steps[values == ord(closing)] = -1
        depth = int(steps.cumsum(dtype=np.int64).max(initial=0))
        if depth > MAX_DEPTH:
            raise Reject("unreadable", error="nesting_depth", depth=depth, max_depth=MAX_DEPTH)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.warnings.add("text_encoding", self.context.path.name)
            return content.decode("windows-1252", "replace")

    def _package(self, key: Key, content: bytes) -> ZipPackage:
        """Return the package with a key, which is opened once."""
        if key not in self._packages:
            self._packages[key] = ZipPackage(content, self.context.cfg)
        return self._packages[key]

    def _enter(self, key: Key, content: bytes) -> tuple[bytes, Key, PackageFiles]:
        """Return the default layer of a package, its key, and the files relative to it.

        It is the first file, which may be a package itself.

        Raises:
            Reject: "unreadable" or "allocation_bomb".
        """
        package = self._package(key, content)
        formats = (*LAYER_FORMATS, "usdz")
        first = next((name for name in package.names if _extension(name) in formats), None)
        if first is None:
            raise _unreadable("the package has no layer")
        if len(key) > MAX_NESTED_PACKAGES:
            raise _unreadable(f"packages are nested more than {MAX_NESTED_PACKAGES} deep")
        inner, key = package.read(first), (*key, first)
        if inner.startswith(ZIP_SIGNATURE):
            self._count(inner)
            return self._enter(key, inner)
        return inner, key, PackageFiles(package, first, self.warnings)

    def _find(self, name: str, opened: _Layer) -> tuple[bytes, Key, Files] | None:
        """Return (content, key, files relative to it) of a file that a layer names.

        None, with a warning, if there is none in the package or below the root of the source.
        """
        inner = ""
        if Ar.IsPackageRelativePath(name):
            name, inner = Ar.SplitPackageRelativePathOuter(name)
        files = opened.files
        content = files.read(name)
        if content is None:
            return None
        if isinstance(files, PackageFiles):
            part = files.find(name) or ""
            key = (*opened.key[:-1], part)
            there: Files = PackageFiles(files.package, part, self.warnings)
        else:
            path = files.find(name)
            assert path is not None
            key = (str(path),)
            there = SideFiles(path, files.root, self.warnings)
        # A package: the named part of it, which may be a package again, or its default layer.
        try:
            while content.startswith(ZIP_SIGNATURE) and inner:
                part_name = inner
                if Ar.IsPackageRelativePath(inner):
                    part_name, inner = Ar.SplitPackageRelativePathOuter(inner)
                else:
                    inner = ""
                package = self._package(key, content)
                part = package.find(part_name)
                if part is None:
                    self.warnings.add("side_file_missing", f"{name}[{part_name}]")
                    return None
                content, key = package.read(part), (*key, part)
                there = PackageFiles(package, part, self.warnings)
            if content.startswith(ZIP_SIGNATURE):
                return self._enter(key, content)
        except (*MEMBER_ERRORS, Reject) as error:
            if isinstance(error, Reject) and error.reason == "allocation_bomb":
                raise
            self.warnings.add("reference_unresolved", f"{name}: damaged package")
            return None
        return content, key, there

    def _connect(self, opened: _Layer) -> None:
        """Replace the names of other layers in a layer by those of the opened ones."""
        for name in sorted(opened.layer.GetCompositionAssetDependencies()):
            if not name:  # a reference within the layer
                continue
            target = self._target(name, opened)
            if target is None:
                while name in opened.layer.subLayerPaths:
                    opened.layer.subLayerPaths.remove(name)
            identifier = "" if target is None else target.layer.identifier
            opened.layer.UpdateCompositionAssetDependency(name, identifier)

    def _target(self, name: str, opened: _Layer) -> _Layer | None:
        """Return the layer that a layer names, or None with a warning."""
        if name.startswith("`"):
            self.warnings.add("reference_unresolved", f"{name}: an expression")
            return None
        plain_name, _ = Sdf.Layer.SplitIdentifier(name)
        outer = plain_name.partition("[")[0]
        if _extension(outer) not in (*LAYER_FORMATS, "usdz"):
            self.warnings.add("reference_unresolved", f"{plain_name}: not a USD file")
            return None
        found = self._find(plain_name, opened)
        if found is None:
            return None
        content, key, files = found
        if key not in self._opened:
            self._opened[key] = None
            try:
                self._open(content, files, key)
            except Tf.ErrorException as error:
                self.warnings.add("reference_unresolved", f"{plain_name}: {error_text(error)}")
        return self._opened[key]

    def _check_prim_count(self) -> None:
        """Bound the prims of the composed stage before it is composed, and remove value clips.

        Each reference copies what it refers to, so a chain of references can double the prims at
        each step. The bound counts the prims of all variants and layers.

        Raises:
            Reject: "too_many_faces".
        """
        limit = MAX_PRIMS_PER_INSTANCE * self.context.cfg.max_instances
        counter = _PrimCounter(self._by_identifier)
        for opened in self._by_identifier.values():
            for path in counter.remove_clips(opened.layer):
                self.warnings.add("reference_unresolved", f"{path}: value clips")
        prims = counter.count((self.root.identifier, Sdf.Path.absoluteRootPath), limit)
        if prims > limit:
            raise Reject("too_many_faces", prims=prims, max_prims=limit)


def check_claims(content: bytes) -> None:
    """Check that the tables of a binary layer do not claim far more than the file can have.

    The library allocates what the tables claim. Their header names sections; a section begins with
    the number of its entries, and that of the tokens has the sizes of its text. Files of older
    versions have other sections, and the library refuses them.

    Args:
        content: The layer.

    Raises:
        Reject: "allocation_bomb", or "unreadable" if the sections are not in the file.
    """
    if tuple(content[8:10]) < FIRST_VERSION:
        return
    if len(content) < TABLE_OFFSET + 8:
        raise _unreadable("the layer is cut off")
    (start,) = struct.unpack_from("<q", content, TABLE_OFFSET)
    if not 0 <= start <= len(content) - 8:
        raise _unreadable("the table of sections is not in the file")
    (number,) = struct.unpack_from("<Q", content, start)
    if start + 8 + number * SECTION.size > len(content):
        raise _unreadable("the sections are not in the file")
    for index in range(number):
        name, first, size = SECTION.unpack_from(content, start + 8 + index * SECTION.size)
        if first < 0 or size < 0 or first + size > len(content):
            raise _unreadable("a section is not in the file")
        if size < SIZES.size:
            continue
        entries, unpacked, packed = SIZES.unpack_from(content, first)
        label = name.rstrip(b"\0").decode("ascii", "replace")
        check_claimed_bytes(label, 8 * entries, len(content))
        if label == "TOKENS":
            check_claimed_bytes(label, max(unpacked, packed), len(content))


class _PrimCounter:
    """Counts the prims of a composed stage from above.

    Args:
        layers: The layers by identifier.
    """

    def __init__(self, layers: dict[str, _Layer]):
        self._layers = layers
        self._visited = 0

    def remove_clips(self, layer: Sdf.Layer) -> list[str]:
        """Remove the value clips of a layer, which name files, and return the paths of the prims.

        Clips are values of other files at points of time.
        """
        changed = []
        for prim in self._prims(layer, Sdf.Path.absoluteRootPath):
            if prim.HasInfo("clips"):
                prim.ClearInfo("clips")
                changed.append(str(prim.path))
        return changed

    def count(self, root: tuple[str, Sdf.Path], limit: int) -> int:
        """Return the number of prims below a prim, or one above the limit."""
        totals: dict[tuple[str, Sdf.Path], int] = {}
        arcs: dict[tuple[str, Sdf.Path], Counter[tuple[str, Sdf.Path]]] = {}
        pending = [root]
        while pending:
            target = pending[-1]
            if target in totals:
                pending.pop()
            elif target in arcs:
                # All targets are counted, except those that refer back to this one.
                total = totals.get(target, 0) + arcs[target].pop(target, 0)
                total += sum(times * totals.get(to, 0) for to, times in arcs[target].items())
                totals[target] = total
                pending.pop()
            else:
                own, arcs[target] = self._own(target)
                arcs[target][target] = own
                pending += [to for to in arcs[target] if to not in arcs]
            if self._visited > PRIM_SPECS_PER_STEP:
                return limit + 1
        return totals[root]

    def _own(self, target: tuple[str, Sdf.Path]) -> tuple[int, Counter[tuple[str, Sdf.Path]]]:
        """Return the number of prims that a layer has below a path, and the arcs from there."""
        identifier, path = target
        layer = self._layers[identifier].layer
        arcs: Counter[tuple[str, Sdf.Path]] = Counter()
        for sublayer in layer.subLayerPaths:
            if sublayer in self._layers:
                arcs[sublayer, path] += 1
        number = 0
        for prim in self._prims(layer, path):
            number += 1
            targets = [
                (to, self._default_path(to, reference.primPath))
                for reference in _items(prim.referenceList) + _items(prim.payloadList)
                if (to := reference.assetPath or identifier) in self._layers
            ]
            targets += [
                (identifier, inherited)
                for inherited in _items(prim.inheritPathList) + _items(prim.specializesList)
            ]
            if prim.instanceable:  # the instances of one prim share their descendants
                arcs.update(to for to in targets if to not in arcs)
            else:
                arcs.update(targets)
        return number, arcs

    def _default_path(self, identifier: str, path: Sdf.Path) -> Sdf.Path:
        if not path.isEmpty:
            return path
        layer = self._layers[identifier].layer
        return Sdf.Path.absoluteRootPath.AppendPath(layer.defaultPrim or "none")

    def _prims(self, layer: Sdf.Layer, path: Sdf.Path) -> list[Sdf.PrimSpec]:
        """Return the prims at and below a path, those of all variants, too."""
        first = layer.GetPrimAtPath(path)
        pending = [] if first is None else [first]
        prims = []
        while pending:
            prim = pending.pop()
            prims.append(prim)
            pending += prim.nameChildren.values()
            for variants in prim.variantSets.values():
                pending += [variant.primSpec for variant in variants.variants.values()]
        self._visited += len(prims)
        return prims


def _items(operations: object) -> list:
    """Return the items that a list of operations adds."""
    return list(operations.GetAddedOrExplicitItems())  # pyright: ignore


def error_text(error: Exception) -> str:
    """Return the message of an error of the library without places in its source code."""
    match = re.search(r"file \S+ : '(.*?)'?\s*$", str(error).strip(), re.DOTALL)
    text = match[1] if match else str(error)
    text = re.sub(r"/\S*/(layer\.usdc)", r"\1", text)  # the directory is another one in each run
    return re.sub(r"anon:0x[0-9a-f]+:", "", " ".join(text.split()))[:120]


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _unreadable(message: str) -> Reject:
    return Reject("unreadable", error="usd", message=message[:120])
