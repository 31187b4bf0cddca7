"""Renders one scene of benchmarks/rendering.py with Blender Cycles. It runs in an environment of
its own, which has bpy and not this project: python render_in_cycles.py SCENE.npz OUT.npy SAMPLES.
"""

import sys

import bpy
import numpy as np
from mathutils import Matrix

TO_Z_UP = Matrix(((1, 0, 0, 0), (0, 0, -1, 0), (0, 1, 0, 0), (0, 0, 0, 1)))


def image_of(name, pixels, colors):
    """Return a Blender image of uint8 [h, w] or [h, w, C] with row 0 at the top."""
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    height, width = pixels.shape[:2]
    image = bpy.data.images.new(name, width, height, alpha=True)
    image.colorspace_settings.name = "sRGB" if colors else "Non-Color"
    rgba = np.ones((height, width, 4), np.float32)
    rgba[..., : pixels.shape[2]] = pixels[::-1].astype(np.float32) / 255
    image.pixels.foreach_set(rgba.ravel())
    return image


def texture(nodes, links, image, uv_name):
    node = nodes.new("ShaderNodeTexImage")
    node.image = image
    uv = nodes.new("ShaderNodeUVMap")
    uv.uv_map = uv_name
    links.new(uv.outputs["UV"], node.inputs["Vector"])
    return node


def product(nodes, links, a, b):
    node = nodes.new("ShaderNodeMix")
    node.data_type, node.blend_type = "RGBA", "MULTIPLY"
    node.inputs["Factor"].default_value = 1
    links.new(a, node.inputs["A"])
    links.new(b, node.inputs["B"])
    return node.outputs["Result"]


def material_of(number, data):
    """Return the material of a draw call from its arrays."""
    material = bpy.data.materials.new(f"material-{number}")
    material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    shader = next(node for node in nodes if node.type == "BSDF_PRINCIPLED")
    shader.inputs["IOR"].default_value = 1.5
    key = f"{number}_"
    tint = nodes.new("ShaderNodeAttribute")
    tint.attribute_name = "tint"
    color = tint.outputs["Color"]
    if key + "texture" in data:
        image = texture(nodes, links, image_of("color", data[key + "texture"], True), "uv")
        color = product(nodes, links, color, image.outputs["Color"])
    links.new(color, shader.inputs["Base Color"])
    finish = nodes.new("ShaderNodeAttribute")
    finish.attribute_name = "finish"
    split = nodes.new("ShaderNodeSeparateXYZ")
    links.new(finish.outputs["Vector"], split.inputs[0])
    links.new(split.outputs["X"], shader.inputs["Metallic"])
    links.new(split.outputs["Y"], shader.inputs["Roughness"])
    for name in ("metallic", "roughness"):
        if key + name in data:
            image = texture(nodes, links, image_of(name, data[key + name], False), f"{name}_uv")
            links.new(image.outputs["Color"], shader.inputs[name.capitalize()])
    if key + "normal" in data:
        image = texture(nodes, links, image_of("normal", data[key + "normal"], False), "normal_uv")
        turned = nodes.new("ShaderNodeNormalMap")
        turned.uv_map = "normal_uv"
        links.new(image.outputs["Color"], turned.inputs["Color"])
        links.new(turned.outputs["Normal"], shader.inputs["Normal"])
    return material


def add_mesh(number, data):
    key = f"{number}_"
    positions, faces = data[key + "positions"], data[key + "faces"]
    mesh = bpy.data.meshes.new(f"mesh-{number}")
    mesh.from_pydata(positions.tolist(), [], faces.tolist())
    corners = faces.ravel()
    for name in ("uv", "normal_uv", "metallic_uv", "roughness_uv"):
        if key + name in data:
            layer = mesh.uv_layers.new(name=name)
            layer.data.foreach_set("uv", data[key + name][corners].astype(np.float32).ravel())
    tint = mesh.attributes.new("tint", "FLOAT_COLOR", "POINT")
    tint.data.foreach_set("color", data[key + "colors"].astype(np.float32).ravel())
    finish = mesh.attributes.new("finish", "FLOAT_VECTOR", "POINT")
    finish.data.foreach_set("vector", data[key + "surface"][:, :3].astype(np.float32).ravel())
    mesh.polygons.foreach_set("use_smooth", np.ones(len(faces), bool))
    mesh.normals_split_custom_set_from_vertices(data[key + "normals"].tolist())
    mesh.materials.append(material_of(number, data))
    item = bpy.data.objects.new(mesh.name, mesh)
    item.matrix_world = TO_Z_UP
    bpy.context.collection.objects.link(item)


def main(scene_file, out, samples):
    bpy.ops.wm.read_factory_settings(use_empty=True)
    with np.load(scene_file) as arrays:
        data = dict(arrays)
    scene = bpy.context.scene
    for number in range(int(data["calls"])):
        add_mesh(number, data)
    # the surroundings: Blender's panorama is the mirror image of ours, a quarter turn on
    world = scene.world = bpy.data.worlds.new("world")
    world.use_nodes = True
    panorama = data["panorama"]
    height, width = panorama.shape[:2]
    columns = (width + width // 4 - 1 - np.arange(width)) % width
    image = bpy.data.images.new("panorama", width, height, float_buffer=True)
    image.colorspace_settings.name = "Linear Rec.709"
    rgba = np.ones((height, width, 4), np.float32)
    rgba[..., :3] = panorama[::-1, columns]
    image.pixels.foreach_set(rgba.ravel())
    node = world.node_tree.nodes.new("ShaderNodeTexEnvironment")
    node.image = image
    background = next(n for n in world.node_tree.nodes if n.type == "BACKGROUND")
    world.node_tree.links.new(node.outputs["Color"], background.inputs["Color"])
    # the camera
    lens = bpy.data.cameras.new("camera")
    lens.sensor_width, lens.lens = 36, float(data["focal_mm"])
    camera = bpy.data.objects.new("camera", lens)
    camera.matrix_world = TO_Z_UP @ Matrix(data["c2w"].tolist())
    scene.collection.objects.link(camera)
    scene.camera = camera
    # linear radiance, no background
    scene.render.engine = "CYCLES"
    scene.cycles.device = "CPU"
    scene.cycles.samples = samples
    scene.cycles.use_denoising = False
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.render.film_transparent = True
    size = int(data["size"])
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.render.resolution_percentage = 100
    scene.render.image_settings.file_format = "OPEN_EXR"
    scene.render.image_settings.color_depth = "32"
    scene.render.filepath = out + ".exr"
    bpy.ops.render.render(write_still=True)
    result = bpy.data.images.load(out + ".exr")
    result.colorspace_settings.name = "Non-Color"
    pixels = np.empty(size * size * 4, np.float32)
    result.pixels.foreach_get(pixels)
    np.save(out, pixels.reshape(size, size, 4)[::-1])  # premultiplied, row 0 at the top


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
