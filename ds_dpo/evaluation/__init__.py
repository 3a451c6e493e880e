"""Evaluate images: draw them with several models, score them, compute win rates, and make pages."""
