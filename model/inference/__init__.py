"""Generation: the chain of stages from an image to a cleaned mesh file."""
