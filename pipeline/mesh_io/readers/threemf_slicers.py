"""Roles of the volumes of a 3MF package that PrusaSlicer, Bambu Studio and OrcaSlicer write.

These programs store modifiers, negative volumes and helpers of supports as ordinary meshes. Their
settings, which are no part of the 3MF specification, tell them from the model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from pipeline.core.errors import Reject
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.xml_tree import Element, ElementKind, parse_xml
from pipeline.mesh_io.zip_package import MEMBER_ERRORS, ZipPackage

PRUSA_SETTINGS = "/Metadata/Slic3r_PE_model.config"
BAMBU_SETTINGS = "/Metadata/model_settings.config"
# Settings of the print, with the colours of the filaments.
PRUSA_PRINT_SETTINGS = "/Metadata/Slic3r_PE.config"
BAMBU_PRINT_SETTINGS = "/Metadata/project_settings.config"
PRUSA_COLORS = re.compile(rb"^; (?:extruder|filament)_colour = (.*)$", re.MULTILINE)
# Role -> code of the warning with which such a volume is left out.
LEFT_OUT_ROLES = {
    "parametermodifier": "hidden_left_out",
    "modifier_part": "hidden_left_out",
    "supportblocker": "support_left_out",
    "supportenforcer": "support_left_out",
    "support_blocker": "support_left_out",
    "support_enforcer": "support_left_out",
    "negativevolume": "unsupported_primitive",
    "negative_part": "unsupported_primitive",
}
SCHEMA = {
    "config": ElementKind("", "object", is_open=True),
    "object": ElementKind("id", "volume part", is_open=True),
    "volume": ElementKind("firstid lastid", "metadata", is_open=True),
    "part": ElementKind("id subtype", is_open=True),
    "metadata": ElementKind("key value", is_open=True),
}


@dataclass(kw_only=True)
class SlicerRoles:
    """The volumes that are not part of the model.

    Attributes:
        triangles: {id of an object of the root part: [(first triangle, last triangle, code)]}.
        components: {(id of an object of the root part, id of the object that it places): code}.
    """

    triangles: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    components: dict[tuple[str, str], str] = field(default_factory=dict)


def read_slicer_roles(package: ZipPackage, warnings: WarningLog) -> SlicerRoles:
    """Read the settings of slicers in a package, if there are any.

    Args:
        package: The package.
        warnings: Receives "invalid_value" for settings that cannot be read.
    """
    roles = SlicerRoles()
    for path in (PRUSA_SETTINGS, BAMBU_SETTINGS):
        name = package.find(path)
        if name is None:
            continue
        try:
            root = parse_xml(package.read(name), SCHEMA, roots="config", warnings=warnings)
        except (Reject, *MEMBER_ERRORS) as error:
            warnings.add("invalid_value", f"{name}: {error}")
            continue
        for element in root.all("object"):
            _add_object(element, roles, warnings)
    return roles


def warn_of_filament_colors(package: ZipPackage, warnings: WarningLog) -> None:
    """Warn if the settings of a print give colours to filaments. The reader does not draw them.

    Args:
        package: The package.
        warnings: Receives "appearance_ignored", or "invalid_value" for settings that cannot be
            read.
    """
    for path in (PRUSA_PRINT_SETTINGS, BAMBU_PRINT_SETTINGS):
        name = package.find(path)
        if name is None:
            continue
        try:
            content = package.read(name)
            if path == BAMBU_PRINT_SETTINGS:
                settings = json.loads(content)
                colors = settings.get("filament_colour") if isinstance(settings, dict) else None
                texts = colors if isinstance(colors, list) else []
            else:
                lines = PRUSA_COLORS.findall(content)
                texts = [text for line in lines for text in line.decode("latin-1").split(";")]
        except (ValueError, RecursionError, *MEMBER_ERRORS) as error:
            warnings.add("invalid_value", f"{name}: {type(error).__name__}")
            continue
        words = [str(text).strip().strip('"') for text in texts]
        distinct = list(dict.fromkeys(word for word in words if word))
        if distinct:
            warnings.add("appearance_ignored", f"filament colours {' '.join(distinct)}")


def _add_object(element: Element, roles: SlicerRoles, warnings: WarningLog) -> None:
    identifier = element.get("id")
    for volume in element.all("volume"):
        values = {item.get("key"): item.get("value") for item in volume.all("metadata")}
        # Old versions only say that a volume is a modifier.
        is_modifier = values.get("modifier") == "1"
        role = values.get("volume_type", "ParameterModifier" if is_modifier else "ModelPart")
        code = LEFT_OUT_ROLES.get(role.lower())
        if code is None:
            continue
        try:
            first, last = int(volume.get("firstid")), int(volume.get("lastid"))
        except ValueError:
            warnings.add("invalid_value", f"triangles of a volume of object {identifier[:50]}")
            continue
        roles.triangles.setdefault(identifier, []).append((first, last, code))
    for part in element.all("part"):
        code = LEFT_OUT_ROLES.get(part.get("subtype").lower())
        if code is not None:
            roles.components[identifier, part.get("id")] = code
