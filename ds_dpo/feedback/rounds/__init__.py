"""Rounds on a model's own images: draw, score, pair, train, evaluate, again and again, resumable at any point."""
