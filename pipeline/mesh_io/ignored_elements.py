"""What the mesh readers leave out without a warning, with the reason.

Everything else in a file is used or gives a warning. An entry may be here only if it cannot alter
geometry, colour, alpha or frame of the first pose.

In FBX a key is "element", "parent.element", "kind:property" of an object, "kind subtype" of an
object, or "texture property" of a material. Properties of materials are those without vendor and
separators: "basecolor" is "3dsMax|Parameters|base_color". "*" stands for any text.

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
        "document.animations": "They move nodes and weights after the first pose.",
        "document.cameras": "A point of view is no part of the object.",
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
    "obj": {
        "o": "Names alter nothing.",
        "g": "Names alter nothing.",
        "s": "Smoothing groups concern shading normals, which the file may give itself.",
        "mg": "Merging groups join free-form surfaces, which are left out with a warning.",
        "vp": "It describes free-form curves and surfaces, which are left out with a warning.",
        "cstype": "It describes free-form curves and surfaces.",
        "deg": "It describes free-form curves and surfaces.",
        "bmat": "It describes free-form curves and surfaces.",
        "step": "It describes free-form curves and surfaces.",
        "parm": "It describes free-form curves and surfaces.",
        "trim": "It describes free-form curves and surfaces.",
        "hole": "It describes free-form curves and surfaces.",
        "scrv": "It describes free-form curves and surfaces.",
        "sp": "It describes free-form curves and surfaces.",
        "con": "It describes free-form curves and surfaces.",
        "end": "It ends a free-form curve or surface.",
        "ctech": "It says how finely curves are drawn.",
        "stech": "It says how finely surfaces are drawn.",
        "bevel": "It concerns interpolation during rendering.",
        "c_interp": "It concerns interpolation during rendering.",
        "d_interp": "It concerns interpolation during rendering.",
        "lod": "It sets a level of detail of a viewer.",
        "shadow_obj": "It concerns shadows during rendering.",
        "trace_obj": "It concerns ray tracing.",
    },
    "mtl": {
        "Ka": "Ambient light belongs to the scene.",
        "Ks": "Highlights depend on light and view.",
        "Ns": "Highlights depend on light and view.",
        "Ni": "Refraction is not drawn.",
        "illum": "It selects a lighting model. Alpha comes from d, Tr and map_d.",
        "sharpness": "It concerns reflections.",
        "Ps": "Sheen depends on light and view.",
        "Pc": "A clear coat depends on light and view.",
        "Pcr": "A clear coat depends on light and view.",
        "aniso": "Anisotropy of highlights depends on light and view.",
        "anisor": "Anisotropy of highlights depends on light and view.",
        "map_Ks": "Highlights depend on light and view.",
        "map_Ns": "Highlights depend on light and view.",
        "map_Ps": "Sheen depends on light and view.",
        "map_Pc": "A clear coat depends on light and view.",
        "map_Pcr": "A clear coat depends on light and view.",
        "bump": "A height map alters shading normals only.",
        "map_bump": "A height map alters shading normals only.",
        "map_aat": "It switches anti-aliasing of textures.",
        "options -blendu -blendv -boost -texres -bm": "They concern filtering and bump strength.",
    },
    "ply": {
        "comment": "Comments alter nothing, except that TextureFile names a texture.",
        "obj_info": "It is a comment.",
        "camera": "A camera is no geometry.",
        "quality": "It measures the data and is not drawn.",
        "confidence": "It measures the data and is not drawn.",
        "intensity": "It measures the data and is not drawn.",
        "curvature": "It follows from the shape.",
        "radius": "It is the size of a drawn point, and points are not drawn.",
        "flags": "It holds the selection of an editor.",
        "label": "It names a class and is not drawn.",
    },
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
    "fbx": {
        # The file
        **dict.fromkeys(
            ("FBXHeaderExtension", "CreationTime", "Creator", "FileId"), "Notes about the writer."
        ),
        **dict.fromkeys(("Document", "Documents", "References"), "A list of scenes of a program."),
        "Takes": "Animations, which move nodes after the first pose.",
        "Version5": "Settings of the editor, in older files.",
        "Collisions": "Notes of an exporter.",
        "Relations": "A second list of the objects, in older files.",
        "ObjectData": "Data of an application.",
        **dict.fromkeys(
            ("*.Version", "*.MultiLayer", "*.MultiTake", "Model.TypeFlags", "Model.Name"),
            "Labels and versions of elements.",
        ),
        # Objects
        **dict.fromkeys(
            (
                *("Objects.AnimationLayer", "Objects.AnimationStack", "Objects.AnimationCurve"),
                *("Objects.AnimationCurveNode", "Objects.Constraint", "Objects.Character"),
                *("Objects.CharacterPose", "Objects.ControlSetPlug", "Objects.Actor"),
            ),
            "They move nodes after the first pose.",
        ),
        **dict.fromkeys(("Objects.Audio", "Objects.AudioLayer"), "Sound is no part of the shape."),
        **dict.fromkeys(
            ("Objects.BindingTable", "Objects.Implementation", "Objects.BindingOperator"),
            "Programs of shaders. The properties of the material are read.",
        ),
        **dict.fromkeys(
            (
                *("Objects.Collection", "Objects.SelectionNode", "Objects.SelectionSet"),
                *("Objects.SceneInfo", "Objects.ObjectMetaData", "Objects.Object"),
                *("Objects.Container", "Objects.MotionBuilder_*", "Objects.KFCurve*"),
                *("Objects.Thumbnail", "Objects.Document", "Objects.Device", "Objects.Scene"),
                "Objects.PluginParameters",
            ),
            "Lists, notes and settings of editors.",
        ),
        "Objects.Pose": "The matrices of a pose. The nodes and the skins state theirs.",
        "Objects.Cache": "The file of a vertex cache. The deformer that uses it is reported.",
        # Cameras and lights, which older files store as nodes.
        **dict.fromkeys(
            ("Model Camera", "Model CameraSwitcher", "Model Light", "Model LightSource"),
            "Cameras and lights are no part of the object.",
        ),
        **dict.fromkeys(
            (
                *("Model.CameraId", "Model.CameraName", "Model.CameraIndexName", "Model.Position"),
                *("Model.Up", "Model.LookAt", "Model.ShowAudio", "Model.AudioColor"),
                *("Model.ShowInfoOnMoving", "Model.CameraOrthoZoom"),
            ),
            "Cameras and lights are no part of the object.",
        ),
        "Model Marker": "A marker of an editor.",
        **dict.fromkeys(
            (
                *("Model:DisplayLevels*", "Model:MaxDistance", "Model:MinDistance"),
                *("Model:MinMaxDistance", "Model:ThresholdsUsedAsPercentage", "Model:WorldSpace"),
            ),
            "From where a viewer shows coarser levels of detail. The finest one is drawn.",
        ),
        # Nodes
        **dict.fromkeys(
            (
                "Model.Shading",
                "Model.Culling",
                "*.NodeAttributeName",
            ),
            "How a program shows the node. Both sides of faces are drawn.",
        ),
        **dict.fromkeys(
            (
                *("Model:DefaultAttributeIndex", "Model:DefaultKeyingGroup*", "Model:Pickable"),
                *(
                    "Model:Transformable",
                    "Model:CullingMode",
                    "Model:ShowTrajectories",
                    "Model:Size",
                ),
                *("Model:Look", "Model:Color", "Model:ReferentialSize", "Model:LODBox"),
                *("Model:*Visibility", "Model:ManipulationMode", "Model:MultiTake"),
                *("Model:SetPreferedAngle", "Model:LimbLength", "Model:AxisLen", "Model:Freeze"),
                *("Model:ScalingPivotUpdateOffset", "Model:ShowLabel", "Model:DrawLink"),
                "Model:MarkerType",
            ),
            "How an editor shows the node.",
        ),
        "Model:BBox*": "Bounds that follow from the vertices.",
        **dict.fromkeys(
            (
                *("Model:TranslationMin*", "Model:TranslationMax*", "Model:RotationMin*"),
                *("Model:RotationMax*", "Model:ScalingMin*", "Model:ScalingMax*"),
                *("Model:TranslationActive", "Model:ScalingActive", "Model:*DampRange?"),
                *("Model:*DampStrength?", "Model:RotationStiffness?", "Model:PreferedAngle?"),
                *("Model:LookAtProperty", "Model:UpVectorProperty", "Model:QuaternionInterpolate"),
                *("Model:NegativePercentShapeSupport", "Model:IK *", "Model:IKPivot"),
                "Model:IKSync",
            ),
            "Limits of animations. The stated transform already keeps them.",
        ),
        **dict.fromkeys(
            ("Model:Casts Shadows", "Model:Receive Shadows", "Model:Primary Visibility"),
            "Shadows and cameras of a renderer.",
        ),
        **dict.fromkeys(
            (
                *("Model:MoBu*", "Model:3dsMax|*", "*:COLLADA_ID", "Material:colladaid"),
                *("Model:NurbsSetIndex", "GlobalSettings:3dsMax|*"),
            ),
            "Data of an application.",
        ),
        "property with the flag U": "Data of an application or a user.",
        # Geometry
        **dict.fromkeys(
            ("*.GeometryVersion", "*.Layer", "Geometry.Type", "Shape.Normals", "*.ShapeVersion"),
            "Versions and lists of what is read.",
        ),
        "Shape.Normals": "Normals of a moved mesh follow from its faces.",
        "Geometry.Normals": "Normals of a moved mesh follow from its faces.",
        **dict.fromkeys(("Geometry.Edges", "Model.Edges"), "The edges follow from the polygons."),
        **dict.fromkeys(
            ("*.LayerElementBinormal", "*.LayerElementTangent"),
            "The frame of normal maps, which are not drawn.",
        ),
        **dict.fromkeys(
            ("*.LayerElementSmoothing", "LayerElementNormal.NormalsW"),
            "Smoothing concerns shading normals, which the file may give itself.",
        ),
        **dict.fromkeys(
            ("*.LayerElementPolygonGroup", "*.LayerElementUserData"), "Groups and data of editors."
        ),
        **dict.fromkeys(
            ("*.LayerElementEdgeCrease", "*.LayerElementVertexCrease", "*.BoundaryRule"),
            "It concerns subdivision, which is reported where it is switched on.",
        ),
        **dict.fromkeys(
            (
                *("*.PreserveBorders", "*.PreserveHardEdges", "*.PropagateEdgeHardness"),
                *("*.PreviewDivisionLevels", "*.RenderDivisionLevels", "*.DisplaySubdivisions"),
            ),
            "It concerns subdivision, which is reported where it is switched on.",
        ),
        **dict.fromkeys(
            (
                *("*.Form", "*.Dimension", "*.Dimensions", "*.Order", "*.Rational", "*.Step"),
                *("*.KnotVector", "*.KnotVectorU", "*.KnotVectorV", "*.NurbsCurveVersion"),
                *(
                    "*.NurbsSurfaceVersion",
                    "*.NurbsSurfaceOrder",
                    "*.SurfaceDisplay",
                    "*.FlipNormals",
                ),
                *("*.LineVersion", "*.PointsIndex", "*.BoundaryVersion", "*.TrimmedNurbVersion"),
                *("*.NurbVersion", "*.NurbOrder", "*.Multiplicity*", "*.PatchVersion"),
                "*.Weights",
            ),
            "It describes curves and free-form surfaces, which are left out with a warning.",
        ),
        **dict.fromkeys(
            ("LayerElementTexture.BlendMode", "LayerElementTexture.TextureAlpha"),
            "How a texture is laid over others. The first one is drawn.",
        ),
        **dict.fromkeys(
            (
                *("*.LayerElementAmbient*", "*.LayerElementSpecular*", "*.LayerElementReflection*"),
                *("*.LayerElementShininess*", "*.LayerElementBump*", "*.LayerElementNormalMap*"),
            ),
            "Which texture of shading a polygon has, in older files.",
        ),
        # Deformers
        **dict.fromkeys(
            (
                *("Deformer.Link_DeformAcuracy", "Deformer.TransformLink", "Deformer.UserData"),
                *("Deformer.Type", "Deformer.TransformAssociateModel"),
                *("Deformer.BlendWeights", "Deformer:SrcModel*", "Deformer:RootGroup*"),
                "Deformer.AssociateModel",
            ),
            "How a program edits a skin. The bones stand where their nodes stand.",
        ),
        # Materials
        **dict.fromkeys(
            ("Material.ShadingModel", "Material:shadingmodel", "Material:multilayer"),
            "The properties say what is drawn.",
        ),
        **dict.fromkeys(
            (
                *("Material:specular*", "Material:shininess*", "Material:reflect*"),
                *("Material:refl*", "Material:coat*", "Material:clearcoat*", "Material:sheen*"),
                *("Material:fuzz*", "Material:thinfilm*", "Material:*thinwalled"),
                *("Material:subsurface*", "Material:sss*", "Material:scattering*"),
                *("Material:aniso*", "Material:brdf*", "Material:diffuseroughness"),
                *("Material:diffroughness", "Material:basediffuseroughness"),
                *("Material:indirect*", "Material:internalreflections", "Material:caustics"),
                *("Material:indexofrefraction", "Material:tangent", "Material:geometry*tangent"),
                *("texture specular*", "texture shininess*", "texture reflect*", "texture refl*"),
                *("texture coat*", "texture clearcoat*", "texture sheen*", "texture fuzz*"),
                *("texture aniso*", "texture sss*", "texture subsurface*", "texture scattering*"),
                *("texture diffuseroughness*", "texture diffroughmap", "texture thinfilm*"),
            ),
            "Highlights and scattering depend on light and view.",
        ),
        **dict.fromkeys(
            ("Material:ambient*", "texture ambientcolor", "texture ambientfactor"),
            "Ambient light belongs to the scene.",
        ),
        **dict.fromkeys(
            ("Material:bump*", "Material:normal*", "texture bump*", "Material:geometrynormal"),
            "Bump and normal maps alter shading normals only.",
        ),
        **dict.fromkeys(
            ("Material:displacement*", "Material:vectordisplacement*"),
            "Strength of displacement maps, which are reported.",
        ),
        **dict.fromkeys(
            (
                *("Material:*map", "Material:*mapon", "Material:*mapamt", "Material:*usedas"),
                *("Material:*camerafactor", "Material:mapm*", "texture mapm*"),
            ),
            "Whether a texture is used. The connected ones are read.",
        ),
        **dict.fromkeys(
            (
                *("Material:classid*", "Material:superclassid", "Material:typeid", "Material:id?"),
                *("Material:aov*", "Material:aimatte*", "Material:aienablematte"),
                *("Material:hardwareshader", "Material:maya", "Material:3dsmax", "Material:main"),
                *("Material:parameters", "Material:settings", "Material:extension"),
                *("Material:notes", "Material:materialmode", "Material:originalmtl"),
                *("Material:exittobackground", "Material:dielectricpriority", "Material:enable*"),
                *(
                    "Material:ignoremissingtextures",
                    "Material:missingtexture*",
                    "Material:outalpha",
                ),
                *("Material:transmitaovs", "Material:aoaffects*", "Material:usedefault*"),
                *("Material:defaultkeyinggroup*", "Material:multitake", "Material:emitkelvin"),
                *("Material:roughnessinv", "Material:emitluminance", "Material:invert*"),
            ),
            "Settings of a renderer.",
        ),
        **dict.fromkeys(
            ("*:texbrdflut", "*:texglobal*", "texture texbrdflut", "texture texglobal*"),
            "The light around the object.",
        ),
        **dict.fromkeys(
            ("Material:volume*", "Material:dispersion*", "Material:trans?*"),
            "It concerns transmission, which is reported where it is switched on.",
        ),
        "Material:doublesided": "Both sides of faces are drawn.",
        # Textures and images
        **dict.fromkeys(
            (
                *("Texture.Media", "Texture.TextureName", "Texture.Type", "Video.Type"),
                *("Texture.ModelUVTranslation", "Texture.ModelUVScaling", "Video.UseMipMap"),
                *("Texture:UseMaterial", "Texture:UseMipMap", "Texture:VideoProperty"),
                *("Texture:CurrentMappingType", "Texture:TextureTypeUse"),
                *("Texture:Anim*", "Texture:MultiTake", "Texture:Take*"),
            ),
            "Labels, mipmaps, and a second copy of what is read.",
        ),
        **dict.fromkeys(
            ("Texture.Texture_Alpha_Source", "Texture.Cropping", "Texture:PremultiplyAlpha"),
            "How a program prepares the image.",
        ),
        **dict.fromkeys(
            ("Texture:CurrentTextureBlendMode", "Texture:Texture alpha", "LayeredTexture.*"),
            "How a texture is laid over others. The first one is drawn.",
        ),
        "Texture:3dsMax*": "Parameters of textures of 3ds Max. The image that they name is read.",
        **dict.fromkeys(
            (
                *("Video.Original*", "Video:FrameRate", "Video:Height", "Video:Width"),
                *(
                    "Video:AccessMode",
                    "Video:FreeRunning",
                    "Video:InterlaceMode",
                    "Video:LastFrame",
                ),
                *("Video:Loop", "Video:Offset", "Video:PlaySpeed", "Video:StartFrame"),
                *("Video:StopFrame", "Video:Clip*", "Video:Color", "Video:ImageSequence*"),
                *("Video:Mute", "Video:LocalStart", "Video:LocalStop", "Video:ReferenceStart"),
                "Video:ReferenceStop",
            ),
            "The image's content decides, and the first one of a film is drawn.",
        ),
        "CollectionExclusive:Color": "The colour of a layer of an editor.",
        "CollectionExclusive:Freeze": "Whether a layer of an editor is locked.",
        "CollectionExclusive:LODBox": "How an editor shows a layer.",
        # Settings
        **dict.fromkeys(
            (
                *("GlobalSettings:AmbientColor", "GlobalSettings:DefaultCamera"),
                *("GlobalSettings:OriginalU*", "GlobalSettings:Original*"),
                *("GlobalSettings:Time*", "GlobalSettings:CustomFrameRate"),
                *("GlobalSettings:CurrentTimeMarker", "GlobalSettings:SnapOnFrameMode"),
            ),
            "Time, lights and cameras, and the axes before a conversion.",
        ),
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
    "usd": {
        # "prim TYPE" is a type of prim, a name alone a property or an applied schema of any prim,
        # "TYPE.name" a property of one type. "*" stands for any text.
        # Prims
        **dict.fromkeys(
            ("prim Camera", "prim *Light", "prim *Light_1", "prim *LightFilter"),
            "Cameras and lights are no part of the asset.",
        ),
        "prim Render*": "Settings of a renderer.",
        "prim Physics*": "Physics beyond the first pose.",
        "prim SpatialAudio": "Sound is no part of the shape.",
        "prim Backdrop": "A frame in the window of an editor.",
        **dict.fromkeys(
            ("prim Skeleton", "prim SkelAnimation", "prim BlendShape"),
            "Skinned meshes are drawn with the points that they state, which is the bind pose.",
        ),
        **dict.fromkeys(
            ("prim OpenVDBAsset", "prim Field3DAsset"),
            "They belong to volumes, which are reported.",
        ),
        **dict.fromkeys(
            ("prim Preliminary_Action", "prim Preliminary_Behavior", "prim Preliminary_Trigger"),
            "Behaviour in an application.",
        ),
        "prim Preliminary_ReferenceImage": "A picture by which an application finds a place.",
        "prim RealityKit*": "Behaviour in an application.",
        "inactive prims": "The file removes them.",
        "classes": "Templates, which are drawn where prims inherit from them.",
        "variants that are not selected": "Other states of the asset to choose from.",
        "time samples after the first": "They move or alter the asset after the first pose.",
        "materials that nothing binds": "They are drawn nowhere.",
        "parts of a package that no layer names": "They are drawn nowhere.",
        "metadata except upAxis and metersPerUnit": "Descriptions, and settings of players.",
        # Properties of any prim or of one type
        **dict.fromkeys(("extent", "extentsHint"), "Bounds that follow from the values."),
        "doubleSided": "Both sides are drawn, as in the viewer of the format.",
        "proxyPrim": "It names a simpler copy of the prim.",
        **dict.fromkeys(
            ("velocities", "accelerations", "angularVelocities", "motion:*"),
            "Motion around the first pose.",
        ),
        **dict.fromkeys(("guideVisibility", "proxyVisibility"), "Guides and proxies are left out."),
        "primvars:*": "Values for shaders. Those that a drawn material reads are used.",
        "custom properties": "Data of an application, without meaning in the format.",
        "userProperties:*": "Data of an application, without meaning in the format.",
        "ui:*": "The window of an editor.",
        "model:*": "Stand-ins for the geometry, which is drawn itself.",
        "collection:*": "Lists of prims. Those that bind materials are used.",
        "subsetFamily:*": "Whether subsets of faces are complete.",
        "skel:*": "Skinned meshes are drawn with the points that they state.",
        **dict.fromkeys(
            ("Mesh.crease*", "Mesh.corner*", "Mesh.interpolateBoundary"),
            "They shape refined subdivision surfaces, which are drawn as their cage.",
        ),
        **dict.fromkeys(
            ("Mesh.faceVaryingLinearInterpolation", "Mesh.triangleSubdivisionRule"),
            "They shape refined subdivision surfaces, which are drawn as their cage.",
        ),
        **dict.fromkeys(
            ("physics:*", "physx*", "mjc:*", "newton:*"), "Physics beyond the first pose."
        ),
        **dict.fromkeys(("light:*", "shadow:*"), "Lights are no part of the asset."),
        "UsdPreviewSurface.inputs:clearcoatRoughness": "It belongs to a clear coat, which is "
        "reported.",
        "UsdPreviewSurface.inputs:opacityMode": "It says whether highlights are translucent, too.",
        "outputs:* of materials beside outputs:surface": "Shaders of other renderers describe "
        "the same look.",
        # Applied schemas
        **dict.fromkeys(
            ("Physics*", "Physx*", "Mjc*", "Newton*"), "Physics beyond the first pose."
        ),
        **dict.fromkeys(
            ("LightAPI", "ShapingAPI", "ShadowAPI", "MeshLightAPI", "LightListAPI"),
            "Lights are no part of the asset.",
        ),
        "SkelBindingAPI": "Skinned meshes are drawn with the points that they state.",
        "CollectionAPI": "Lists of prims. Those that bind materials are used.",
        "MotionAPI": "Motion around the first pose.",
        **dict.fromkeys(
            ("NodeDefAPI", "NodeGraphNodeAPI", "SceneGraphPrimAPI"),
            "They describe shaders in the window of an editor.",
        ),
        **dict.fromkeys(("AssetPreviewsAPI", "Semantics*", "AccessibilityAPI"), "Descriptions."),
        "MaterialXConfigAPI": "The version of shaders that are reported.",
        "Preliminary_*": "Behaviour in an application.",
    },
}
