"""Image conditioning: image preparation, image encoders, and the DiT with its encoder."""
