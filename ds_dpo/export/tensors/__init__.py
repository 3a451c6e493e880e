"""Tensors of an export: read, restored, streamed, verified."""
