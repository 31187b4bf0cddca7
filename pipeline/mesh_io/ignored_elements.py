"""What the mesh readers leave out without a warning, with the reason.

Everything else in a file is used or gives a warning. An entry may be here only if it cannot alter
geometry, colour, alpha or frame of the first pose.

In XML formats a key is "element" or "parent/element", "@attribute" or "element@attribute", or
"prefix:*" for a whole namespace.
"""

from __future__ import annotations

# Format -> {element, attribute or extension: reason}.
IGNORED_ELEMENTS: dict[str, dict[str, str]] = {
    "gltf": {
        # Properties of any object, or of one kind of object. "attribute" names an attribute of a
        # primitive. A trailing "*" stands for any text.
        "name": "A label.",
        "extras": "Data of an application, which the format says no other one may depend on.",
        "animations": "They move nodes and weights after the first pose.",
        "cameras": "A point of view is no part of the object.",
        "node.camera": "A point of view is no part of the object.",
        "asset.copyright": "A note.",
        "asset.generator": "A note.",
        "image.mimeType": "The content says which format it has.",
        "sampler.minFilter": "It smooths textures that are far away, which the renderer does "
        "in one way for all.",
        "accessor.min": "Bounds that follow from the values.",
        "accessor.max": "Bounds that follow from the values.",
        "view.target": "A hint for graphics cards.",
        "skin.skeleton": "A hint that names the common root of the joints.",
        "attribute TANGENT": "The frame of normal maps, which are not drawn.",
        "attribute COLOR_*": "The material model uses set 0 only, which is read.",
        "attribute _*": "Values for an application, without meaning in the format.",
        # Extensions
        "CESIUM_RTC": "It moves the whole scene, and the pipeline centres it.",
        "CESIUM_primitive_outline": "Lines on edges of faces that are drawn as faces.",
        "EXT_feature_metadata": "Facts about parts, such as the name of a building.",
        "EXT_instance_features": "Facts about parts, such as the name of a building.",
        "EXT_lights_ies": "Lights are no part of the object.",
        "EXT_lights_image_based": "Lights are no part of the object.",
        "EXT_mesh_features": "Facts about parts, such as the name of a building.",
        "EXT_mesh_manifold": "A second list of the same triangles, with vertices merged.",
        "EXT_structural_metadata": "Facts about parts, such as the name of a building.",
        "AGI_articulations": "Motions beyond the first pose.",
        "AGI_stk_metadata": "Facts about parts for a simulation.",
        "FB_ngon_encoding": "It says which triangles were one polygon. All of them are read.",
        "KHR_animation_pointer": "It moves values after the first pose.",
        "KHR_audio_emitter": "Sound is no part of the shape.",
        "KHR_interactivity": "Behaviour after the first pose.",
        "KHR_lights_environment": "Lights are no part of the object.",
        "KHR_lights_punctual": "Lights are no part of the object.",
        "KHR_materials_variants": "Other looks to choose from. The default one is drawn.",
        "KHR_node_hoverability": "Behaviour in an application.",
        "KHR_node_selectability": "Behaviour in an application.",
        "KHR_physics_rigid_bodies": "Physics beyond the first pose.",
        "KHR_implicit_shapes": "Shapes for physics, which are not drawn.",
        "KHR_xmp": "A note about the author.",
        "KHR_xmp_json_ld": "A note about the author.",
        "MSFT_audio_emitter": "Sound is no part of the shape.",
        "MSFT_packing_normalRoughnessMetallic": "A second copy of maps that are read.",
        "MSFT_packing_occlusionRoughnessMetallic": "A second copy of maps that are read.",
        "OMI_physics_*": "Physics beyond the first pose.",
        "VRMC_node_constraint": "Motions beyond the first pose.",
        "VRMC_springBone*": "Motions beyond the first pose.",
        "VRMC_vrm": "Names of bones, faces and the author of a character.",
    },
    "obj": {},
    "mtl": {},
    "ply": {},
    "stl": {
        "facet normal": "The order of the corners gives the normal.",
        "name of a solid": "Names alter nothing.",
        "attribute bytes without a colour": "Their meaning is not defined.",
    },
    "off": {
        "texture coordinates of ST": "The format has no textures.",
        "number of edges": "It follows from the faces.",
    },
    "3mf": {
        "metadata": "Title, author and other descriptions.",
        "metadatagroup": "Descriptions of an object or a build item.",
        "model@recommendedextensions": "What is used of an extension is reported by element.",
        "model@thumbnail": "A preview picture.",
        "object@thumbnail": "A preview picture.",
        "object@name": "A name for people.",
        "object@partnumber": "A part number for people.",
        "item@partnumber": "A part number for people.",
        "item@printable": "Whether a slicer prints the item now. It is part of the scene.",
        "base@name": "A name for people.",
        "m:pbmetallic@name": "A name for people.",
        "m:texture2d@contenttype": "The content of the image decides.",
        "@p:UUID": "An identifier for databases.",
        "@xml:lang": "The language of names.",
        "@xml:space": "Text is not used.",
        "s:slicestack": "Slices repeat the mesh of their object.",
        "object@s:slicestackid": "Slices repeat the mesh of their object.",
        "t:trianglesets": "Named selections of triangles.",
        "triangle@paint_supports": "Where a slicer puts supports.",
        "triangle@paint_seam": "Where a slicer begins its layers.",
        "triangle@paint_fuzzy_skin": "A setting of a slicer for the print.",
        "triangle@face_property": "A setting of a slicer for the print.",
        "triangle@slic3r:custom_supports": "Where a slicer puts supports.",
        "triangle@slic3r:custom_seam": "Where a slicer begins its layers.",
        "triangle@slic3r:fuzzy_skin": "A setting of a slicer for the print.",
        "Relationship@Id": "Relationships are found by their type.",
        "Relationship@TargetMode": "Only parts of the package are read.",
    },
    "dae": {
        **dict.fromkeys(
            ("contributor", "created", "modified", "keywords", "revision", "subject", "title"),
            "Descriptions for people.",
        ),
        **dict.fromkeys(("coverage", "annotate", "semantics"), "Descriptions for people."),
        **dict.fromkeys(
            (
                *("library_cameras", "library_lights", "instance_camera", "instance_light"),
                *("evaluate_scene", "optics"),
            ),
            "Cameras and lights are no part of the asset.",
        ),
        **dict.fromkeys(
            ("library_animations", "library_animation_clips"),
            "The pose that the nodes and weights state is read.",
        ),
        **dict.fromkeys(
            (
                *("library_physics_materials", "library_physics_models", "library_physics_scenes"),
                *("library_force_fields", "instance_physics_scene", "library_joints"),
                *("library_kinematics_models", "library_kinematics_scenes", "library_formulas"),
                *("library_articulated_systems", "instance_kinematics_scene"),
            ),
            "Physics and kinematics of the asset do not draw anything.",
        ),
        **dict.fromkeys(
            ("profile_CG", "profile_GLSL", "profile_GLES", "profile_GLES2", "profile_BRIDGE"),
            "The common profile describes the same look.",
        ),
        **dict.fromkeys(
            (
                *("ambient", "specular", "shininess", "reflective", "reflectivity"),
                "index_of_refraction",
            ),
            "Highlights and reflections change neither colour nor alpha.",
        ),
        "COLLADA@version": "The elements say what is used.",
        "COLLADA@base": "Files are found by the end of their path.",
        "@xsi:schemaLocation": "The schema is known.",
        "@xsi:type": "The element's name says the same.",
        "@xml:base": "Files are found by the end of their path.",
        "@xml:lang": "The language of descriptions.",
        "@name": "A name for people.",
        "@sid": "Only joints and parameters are found by it.",
        "@layer": "Layers group nodes.",
        "@type": "The element's content says the same.",
        "unit@name": "The length in metres is used.",
        **dict.fromkeys(
            ("@digits", "@magnitude", "@minInclusive", "@maxInclusive"),
            "How numbers were written.",
        ),
        "bind_material/param": "Targets of animations.",
        "instance_material/bind": "Parameters of other profiles.",
        "technique_hint": "It is for other profiles.",
        **dict.fromkeys(("semantic", "modifier"), "Parameters are found by their sid."),
        **dict.fromkeys(
            ("format", "format_hint", "size", "size_exact", "size_ratio", "viewport_ratio"),
            "The image's content decides.",
        ),
        **dict.fromkeys(
            ("mip_levels", "mips", "mipmap_generate", "mipmap_maxlevel", "mipmap_bias"),
            "Smaller copies of the image.",
        ),
        **dict.fromkeys(
            ("mipfilter", "mip_max_level", "mip_min_level", "mip_bias", "max_anisotropy"),
            "How smaller copies of the image are filtered.",
        ),
        "wrap_p": "Images have two dimensions.",
        "border_color": "Beyond a border the last texels are drawn.",
        **dict.fromkeys(
            ("image@format", "image@height", "image@width", "image@depth", "hex@format"),
            "The image's content decides.",
        ),
        **dict.fromkeys(("init_from@mips_generate", "init_from@mip"), "Smaller copies."),
        "surface@type": "Only images of two dimensions are drawn.",
    },
}
