"""Parse XML from untrusted files into a tree of the known elements, and report all others.

A schema names each element that a reader uses, with its attributes and children. What is not in it
is skipped: silently if it stands in `pipeline.mesh_io.ignored_elements`, otherwise with a warning.
Entities and external files are never resolved.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from xml.parsers import expat

from pipeline.core.errors import Reject
from pipeline.mesh_io.load_warnings import WarningLog

CHUNK_BYTES = 1 << 20
MAX_DEPTH = 5000  # nested elements
XML_NAMESPACE = "http://www.w3.org/XML/1998/namespace"
DECLARED_ENCODING = re.compile(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
BOMS = (  # the longer one of two with the same beginning comes first
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"<\0?\0", "utf-16-le"),
    (b"\0<\0?", "utf-16-be"),
)
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
BARE_AMPERSAND = re.compile(r"&(?!(?:amp|lt|gt|quot|apos|#\d+|#x[0-9A-Fa-f]+);)")
LONGEST_ENTITY = 12  # characters from the ampersand to the semicolon


@dataclass(slots=True)
class Element:
    """One element of the tree.

    Attributes:
        name: The name with the prefix that the schema uses for its namespace.
        attributes: The known attributes, by name with the schema's prefix.
        children: The known children.
        text: The text, if the schema says that the element has text.
        stream: What the handler of streamed children keeps here.
        namespaces: {prefix: URI} at the root of the document; {} elsewhere.
    """

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element] = field(default_factory=list)
    text: str = ""
    stream: Any = None
    namespaces: dict[str, str] = field(default_factory=dict)

    def get(self, attribute: str, default: str = "") -> str:
        """Return an attribute without blanks around it, or a default."""
        return self.attributes.get(attribute, default).strip()

    def all(self, *names: str) -> Iterator[Element]:
        """Yield the children with one of these names."""
        return (child for child in self.children if child.name in names)

    def first(self, *names: str) -> Element | None:
        """Return the first child with one of these names."""
        return next(self.all(*names), None)


StreamHandler = Callable[[Element, dict[str, str]], None]


class ElementKind:
    """What a schema says about an element.

    Args:
        attributes: Names of the known attributes, separated by blanks.
        children: Names of the known children, separated by blanks.
        has_text: Whether the text is used.
        stream: Called with the parent and the attributes of each such element. The element is not
            added to the tree, so that long lists need little memory.
        is_opaque: Whether attributes and children are not checked and children are skipped. The
            reader reports the element as a whole.
        is_open: Whether unknown attributes and children are skipped without a warning, for places
            where a format lets every application put its own data.
    """

    def __init__(
        self,
        attributes: str = "",
        children: str = "",
        *,
        has_text: bool = False,
        stream: StreamHandler | None = None,
        is_opaque: bool = False,
        is_open: bool = False,
    ):
        self.attributes = frozenset(attributes.split())
        # These can be compared with the names in the file, which may use other prefixes.
        self.plain_attributes = frozenset(name for name in self.attributes if ":" not in name)
        self.children = frozenset(children.split())
        self.has_text = has_text
        self.stream = stream
        self.is_opaque = is_opaque
        self.is_open = is_open


Schema = Mapping[str, ElementKind]


def parse_xml(
    content: bytes,
    schema: Schema,
    *,
    roots: str,
    namespaces: Mapping[str, str] = MappingProxyType({}),
    ignored: Mapping[str, str] = MappingProxyType({}),
    warnings: WarningLog,
) -> Element:
    """Parse an XML document.

    Args:
        content: The document, in the encoding of its byte order mark or declaration, else UTF-8.
        schema: The known elements by name, or by "parent/name" where the parent matters. Names
            outside the home namespace are "prefix:name".
        roots: Names of the elements that the document may have as its root.
        namespaces: {URI: prefix in the schema}. "" is the prefix of the home namespace. Names
            without namespace count as home.
        ignored: The table of `pipeline.mesh_io.ignored_elements` of the format.
        warnings: Receives "unknown_element", "unknown_attribute", "unknown_extension" for
            namespaces, "text_encoding", "invalid_value" and "trailing_data".

    Returns:
        The root.

    Raises:
        Reject: "unreadable" with the error "xml" (not well-formed), "xml_entities" (the document
            defines entities), "xml_depth" or "xml_root".
    """
    builder = _Builder(schema, frozenset(roots.split()), namespaces, ignored, warnings)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.buffer_size = 1 << 16
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    parser.EntityDeclHandler = _reject_entities
    try:
        for chunk in _clean_text(content, warnings):
            parser.Parse(chunk, False)
        parser.Parse("", True)
    except expat.ExpatError as error:
        if not builder.is_closed:
            raise Reject("unreadable", error="xml", message=str(error)) from error
        warnings.add("trailing_data", f"after the root element: {error}")
    assert builder.root is not None
    return builder.root


def _reject_entities(name: str, *_: object) -> None:
    raise Reject("unreadable", error="xml_entities", entity=ascii(name[:50]))


def _clean_text(content: bytes, warnings: WarningLog) -> Iterator[str]:
    """Yield the text of a document in chunks, without what no parser accepts."""
    encoding, skipped = _encoding(content, warnings)
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    forbidden = bare = 0
    rest = ""
    for start in range(skipped, len(content), CHUNK_BYTES):
        chunk = content[start : start + CHUNK_BYTES]
        text = rest + decoder.decode(chunk, start + CHUNK_BYTES >= len(content))
        if start == skipped:
            text = text.lstrip()  # blanks before the declaration
        # An entity may continue in the next chunk.
        rest = ""
        if start + CHUNK_BYTES < len(content):
            ampersand = text.rfind("&", -LONGEST_ENTITY)
            if ampersand >= 0:
                text, rest = text[:ampersand], text[ampersand:]
        text, count = FORBIDDEN.subn(" ", text)
        forbidden += count
        if "&" in text:
            text, count = BARE_AMPERSAND.subn("&amp;", text)
            bare += count
        yield text
    warnings.add("text_encoding", "characters that XML does not allow", forbidden)
    warnings.add("invalid_value", "an ampersand that begins no known entity", bare)


def _encoding(content: bytes, warnings: WarningLog) -> tuple[str, int]:
    """Return the encoding in which a document can be decoded, and the size of its byte order mark.

    A document that is not in the stated encoding is read as Windows-1252, with a warning.
    """
    mark = next(((bom, name) for bom, name in BOMS if content.startswith(bom)), None)
    if mark is not None:
        skipped, encoding = (0 if b"<" in mark[0] else len(mark[0])), mark[1]
    else:
        skipped, encoding = 0, "utf-8"
        declared = DECLARED_ENCODING.match(content.lstrip()[:300])
        if declared is not None:
            encoding = declared.group(1).decode("ascii").lower()
            if not _is_ascii_superset(encoding):
                warnings.add("text_encoding", f"declared encoding {encoding}")
                encoding = "utf-8"
    if not _can_decode(content, encoding, skipped):
        warnings.add("text_encoding", f"not {encoding}")
        encoding = "cp1252" if _can_decode(content, "cp1252", skipped) else "latin-1"
    return encoding, skipped


def _is_ascii_superset(encoding: str) -> bool:
    ascii_bytes = bytes(range(32, 127))
    try:
        return ascii_bytes.decode(encoding) == ascii_bytes.decode("ascii")
    except (LookupError, ValueError):
        return False


def _can_decode(content: bytes, encoding: str, skipped: int) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for start in range(skipped, len(content), CHUNK_BYTES):
            decoder.decode(content[start : start + CHUNK_BYTES])
        decoder.decode(b"", True)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class _Open:
    """An element that has begun and has not ended."""

    element: Element
    kind: ElementKind
    text: list[str]
    outer_scope: dict[str, str] | None  # the namespaces outside it, if it declares some itself


class _Builder:
    """Builds the tree from the events of the parser."""

    def __init__(
        self,
        schema: Schema,
        roots: frozenset[str],
        namespaces: Mapping[str, str],
        ignored: Mapping[str, str],
        warnings: WarningLog,
    ):
        self.schema = schema
        self.roots = roots
        self.namespaces = dict(namespaces)
        self.ignored = ignored
        self.warnings = warnings
        self.root: Element | None = None
        self.is_closed = False
        self._open: list[_Open] = []
        self._skipped = 0  # number of open elements that are skipped
        self._scope: dict[str, str] = {"xml": XML_NAMESPACE}  # {prefix: URI}
        self._skipped_scope: dict[str, str] | None = None
        # {name in the file: name in the schema} in the current scope
        self._element_names: dict[str, str] = {}
        self._attribute_names: dict[str, str] = {}
        # {name in the file: streamed element} in the current scope
        self._leaves: dict[str, _Open] = {}

    def start(self, raw_name: str, raw_attributes: dict[str, str]) -> None:
        """Handle the beginning of an element."""
        if self._skipped:
            self._skipped += 1
            return
        # Most elements of a long file take this short way.
        leaf = self._leaves.get(raw_name)
        if leaf is not None and raw_attributes.keys() <= leaf.kind.plain_attributes:
            parent = self._open[-1]
            if leaf.element.name in parent.kind.children and leaf.kind.stream is not None:
                leaf.kind.stream(parent.element, raw_attributes)
                self._open.append(leaf)
                return
        if len(self._open) >= MAX_DEPTH:
            raise Reject("unreadable", error="xml_depth", max_depth=MAX_DEPTH)
        outer_scope = self._enter_scope(raw_attributes)
        name = self._element_names.get(raw_name) or self._resolve_element(raw_name)
        parent = self._open[-1] if self._open else None
        if parent is None:
            name = self._checked_root(raw_name, name)
        elif name not in parent.kind.children:
            if not parent.kind.is_open and not self._is_ignored(parent.element.name, name):
                self.warnings.add("unknown_element", f"{parent.element.name}/{name}")
            self._skipped = 1
            self._skipped_scope = outer_scope
            return
        kind = self.schema[name]
        if parent is not None:
            kind = self.schema.get(f"{parent.element.name}/{name}", kind)
        if kind.is_opaque and parent is not None:
            parent.element.children.append(Element(name, raw_attributes))
            self._skipped = 1
            self._skipped_scope = outer_scope
            return
        attributes = raw_attributes
        if not raw_attributes.keys() <= kind.plain_attributes:
            attributes = self._known_attributes(name, kind, raw_attributes)
        element = Element(name, attributes)
        if parent is None:
            element.namespaces = self._scope
            self.root = element
        elif kind.stream is not None:
            kind.stream(parent.element, attributes)
            if outer_scope is None:
                self._leaves[raw_name] = _Open(Element(name), kind, [], None)
        else:
            parent.element.children.append(element)
        self._open.append(_Open(element, kind, [], outer_scope))

    def end(self, _: str) -> None:
        """Handle the end of an element."""
        if self._skipped > 1:
            self._skipped -= 1
            return
        if self._skipped:
            self._skipped = 0
            self._leave_scope(self._skipped_scope)
            return
        closed = self._open.pop()
        self._leave_scope(closed.outer_scope)
        if closed.text:
            closed.element.text = "".join(closed.text)
        self.is_closed = not self._open

    def text(self, text: str) -> None:
        """Handle a run of text."""
        if self._skipped or not self._open:
            return
        current = self._open[-1]
        if current.kind.has_text:
            current.text.append(text)
        elif not text.isspace() and not current.kind.is_open:
            self.warnings.add("unknown_element", f"{current.element.name}/text {text.strip()[:40]}")

    def _checked_root(self, raw_name: str, name: str) -> str:
        """Return the name of the root in the schema.

        A root in an unknown namespace is read as if its namespace were the home namespace.
        """
        prefix, _, local = raw_name.rpartition(":")
        if name not in self.roots:
            if local not in self.roots:
                raise Reject("unreadable", error="xml_root", found=ascii(name[:100]))
            uri = self._scope.get(prefix, "")
            self.warnings.add("unknown_extension", f"namespace {uri}")
            self.namespaces[uri] = ""
            self._element_names = {}
            name = local
        return name

    def _enter_scope(self, raw_attributes: dict[str, str]) -> dict[str, str] | None:
        """Apply the namespace declarations of an element. Return the outer scope, if it changed."""
        declared = None
        for raw in raw_attributes:
            if raw[:5] == "xmlns" and (len(raw) == 5 or raw[5] == ":"):
                declared = declared or {}
                declared[raw[6:]] = raw_attributes[raw].strip()
        if declared is None:
            return None
        outer_scope = self._scope
        self._change_scope({**outer_scope, **declared})
        return outer_scope

    def _leave_scope(self, outer_scope: dict[str, str] | None) -> None:
        if outer_scope is not None:
            self._change_scope(outer_scope)

    def _change_scope(self, scope: dict[str, str]) -> None:
        self._scope = scope
        self._element_names = {}
        self._attribute_names = {}
        self._leaves = {}

    def _resolve_element(self, raw_name: str) -> str:
        """Return the name of an element with the prefix of the schema, and remember it."""
        prefix, _, local = raw_name.rpartition(":")
        name = self._qualified(prefix, local)
        self._element_names[raw_name] = name
        return name

    def _qualified(self, prefix: str, local: str) -> str:
        uri = self._scope.get(prefix, "")
        if uri == XML_NAMESPACE:
            return f"xml:{local}"
        if not uri:
            if prefix:  # an undeclared prefix keeps its name
                self.warnings.add("unknown_extension", f"undeclared prefix {prefix}")
            return f"{prefix}:{local}" if prefix else local
        if uri not in self.namespaces:
            return f"{uri}:{local}"
        home = self.namespaces[uri]
        return f"{home}:{local}" if home else local

    def _known_attributes(
        self, name: str, kind: ElementKind, raw_attributes: dict[str, str]
    ) -> dict[str, str]:
        """Return the attributes that the schema knows, and report the others."""
        known = {}
        for raw, value in raw_attributes.items():
            if raw.startswith("xmlns") and (len(raw) == 5 or raw[5] == ":"):
                continue
            if raw not in self._attribute_names:
                prefix, _, local = raw.rpartition(":")
                self._attribute_names[raw] = self._qualified(prefix, local) if prefix else local
            attribute = self._attribute_names[raw]
            if attribute in kind.attributes:
                known[attribute] = value
            elif not kind.is_open and not self._is_ignored(name, f"@{attribute}"):
                self.warnings.add("unknown_attribute", f"{name}@{attribute}")
        return known

    def _is_ignored(self, parent: str, name: str) -> bool:
        prefix = name.lstrip("@").rpartition(":")[0]
        return (
            name in self.ignored
            or (f"{parent}{name}" if name[0] == "@" else f"{parent}/{name}") in self.ignored
            or bool(prefix and f"{prefix}:*" in self.ignored)
        )
