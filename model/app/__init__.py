"""A local page and an HTTP API that generate meshes from images and browse builds."""
