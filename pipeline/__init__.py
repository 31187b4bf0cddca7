"""Catalogue of raw 3D assets -> verified SDF and render shards."""
