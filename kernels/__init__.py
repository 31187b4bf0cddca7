"""Triton kernels and their reference definitions."""
