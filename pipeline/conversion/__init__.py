"""Conversions: training samples for other projects, and closed meshes from single files."""
