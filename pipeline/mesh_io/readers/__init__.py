"""One reader for each mesh format. All return a `pipeline.mesh_io.scene.Scene`."""
