// Reads FBX files with ufbx and prints what came out, one JSON line a file, as mesh_readers_child.py
// does. Compile it in a checkout of ufbx: cc -O2 -I. mesh_readers_ufbx.c ufbx.c -lm

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "ufbx.h"

#define MAX_IMAGES 1024
#define MAX_TRIANGLES_OF_FACE 100000

// Zero-area triangles are dropped by some readers and kept by others. The first pass measures the
// size, and the second counts the others.
static double low[3], high[3], area;
static long triangles;

static ufbx_vec3 corner(const ufbx_node *node, uint32_t index) {
    ufbx_mesh *mesh = node->mesh;
    ufbx_vec3 point = ufbx_get_vertex_vec3(&mesh->skinned_position, index);
    return mesh->skinned_is_local ? ufbx_transform_position(&node->geometry_to_world, point) : point;
}

static void add_face(const ufbx_node *node, ufbx_face face, double smallest) {
    static uint32_t indices[3 * MAX_TRIANGLES_OF_FACE];
    uint32_t count = ufbx_triangulate_face(indices, 3 * MAX_TRIANGLES_OF_FACE, node->mesh, face);
    for (uint32_t k = 0; k < count; k++) {
        ufbx_vec3 p[3];
        for (int c = 0; c < 3; c++) p[c] = corner(node, indices[3 * k + c]);
        double u[3] = {p[1].x - p[0].x, p[1].y - p[0].y, p[1].z - p[0].z};
        double v[3] = {p[2].x - p[0].x, p[2].y - p[0].y, p[2].z - p[0].z};
        double x = u[1] * v[2] - u[2] * v[1], y = u[2] * v[0] - u[0] * v[2];
        double z = u[0] * v[1] - u[1] * v[0], doubled = sqrt(x * x + y * y + z * z);
        if (!(doubled > smallest)) continue;
        triangles++;
        area += doubled / 2;
        for (int c = 0; c < 3; c++) {
            double place[3] = {p[c].x, p[c].y, p[c].z};
            for (int axis = 0; axis < 3; axis++) {
                low[axis] = fmin(low[axis], place[axis]);
                high[axis] = fmax(high[axis], place[axis]);
            }
        }
    }
}

static int is_drawn(const ufbx_scene *scene, const ufbx_node *node) {
    if (!node->mesh || !node->visible) return 0;
    for (size_t k = 0; k < scene->display_layers.count; k++) {
        const ufbx_display_layer *layer = scene->display_layers.data[k];
        for (size_t n = 0; n < layer->nodes.count; n++) {
            if (layer->nodes.data[n] == node && !layer->visible) return 0;
        }
    }
    // Coarser levels of detail repeat the finest one.
    for (const ufbx_node *parent = node->parent; parent; node = parent, parent = node->parent) {
        if (parent->attrib_type == UFBX_ELEMENT_LOD_GROUP && parent->children.data[0] != node) return 0;
    }
    return 1;
}

static void measure(const ufbx_scene *scene, double smallest) {
    triangles = 0;
    area = 0;
    for (int axis = 0; axis < 3; axis++) low[axis] = INFINITY, high[axis] = -INFINITY;
    for (size_t n = 0; n < scene->nodes.count; n++) {
        const ufbx_node *node = scene->nodes.data[n];
        if (!is_drawn(scene, node)) continue;
        for (size_t f = 0; f < node->mesh->faces.count; f++) {
            ufbx_face face = node->mesh->faces.data[f];
            if (node->mesh->face_hole.count && node->mesh->face_hole.data[f]) continue;
            if (face.num_indices >= 3) add_face(node, face, smallest);
        }
    }
}

// Returns the number of distinct image files of the base colours of drawn nodes.
static int count_images(const ufbx_scene *scene) {
    const char *names[MAX_IMAGES];
    int count = 0;
    for (size_t n = 0; n < scene->nodes.count; n++) {
        const ufbx_node *node = scene->nodes.data[n];
        if (!is_drawn(scene, node)) continue;
        for (size_t m = 0; m < node->materials.count; m++) {
            const ufbx_material *material = node->materials.data[m];
            const ufbx_texture *texture = material->pbr.base_color.texture;
            if (!texture) texture = material->fbx.diffuse_color.texture;
            if (!texture || !texture->file_textures.count) continue;
            const char *name = texture->file_textures.data[0]->filename.data;
            int k = 0;
            while (k < count && strcmp(names[k], name)) k++;
            if (k == count && count < MAX_IMAGES) names[count++] = name;
        }
    }
    return count;
}

static void print_text(const char *text) {
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') putchar('\\');
        putchar((unsigned char)*text < 32 ? ' ' : *text);
    }
    putchar('"');
}

int main(void) {
    static char path[1 << 16];
    while (fgets(path, sizeof path, stdin)) {
        path[strcspn(path, "\n")] = 0;
        ufbx_load_opts options = {0};
        ufbx_error error;
        options.evaluate_skinning = true;
        options.target_axes = ufbx_axes_right_handed_y_up;
        ufbx_scene *scene = ufbx_load_file(path, &options, &error);
        printf("{\"path\": ");
        print_text(path);
        if (scene) {
            measure(scene, 0);
            double longest = fmax(fmax(high[0] - low[0], high[1] - low[1]), high[2] - low[2]);
            if (triangles) measure(scene, 1e-12 * longest * longest);
        }
        if (!scene) {
            printf(", \"error\": ");
            print_text(error.description.data);
        } else if (!triangles) {
            printf(", \"error\": \"no triangles\"");
        } else {
            printf(", \"triangles\": %ld, \"area\": %.12g", triangles, area);
            printf(", \"low\": [%.12g, %.12g, %.12g]", low[0], low[1], low[2]);
            printf(", \"high\": [%.12g, %.12g, %.12g]", high[0], high[1], high[2]);
            printf(", \"textures\": %d, \"warnings\": []", count_images(scene));
        }
        printf("}\n");
        fflush(stdout);
        ufbx_free_scene(scene);
    }
    return 0;
}
