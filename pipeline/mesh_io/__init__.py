"""Read mesh files and archives, and normalise meshes."""
