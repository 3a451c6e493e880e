"""Turns images and prompts into latents and text states: during training, or once into a cache."""
