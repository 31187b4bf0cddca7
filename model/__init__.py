"""Inference library: sparse tensors, SS-VAE, SS-DiT, image to mesh."""
