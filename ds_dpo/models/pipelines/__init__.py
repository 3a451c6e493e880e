"""A pipeline's models, wherever they are: in a diffusers folder, on the hub, or in one file."""
