"""Images and prompts into latents and text states: as they come, or once into a cache."""
