"""Helpers that the kernels share. They import no other part of kernels."""
