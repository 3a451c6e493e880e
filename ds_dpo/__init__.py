"""Diffusion-DPO for text-to-image models on DeepSpeed; docs/architecture.md names every package."""
