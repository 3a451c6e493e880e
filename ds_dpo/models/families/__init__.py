"""The model families: a file for each kind, with text encoders, conditioning, and how a configuration is recognised."""
