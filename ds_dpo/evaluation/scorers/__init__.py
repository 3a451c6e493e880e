"""Scorers of images: each gives every image a number for its prompt, or says which of two images is better."""
