"""Describe a run before it starts: in words, and compared with known recipes."""
