"""The model families: denoiser, text encoders, conditioning, names, and how a configuration is recognised."""
