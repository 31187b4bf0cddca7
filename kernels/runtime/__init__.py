"""Helpers that the kernels share. Nothing here imports kernels.attention, kernels.conv or kernels.sdf."""
