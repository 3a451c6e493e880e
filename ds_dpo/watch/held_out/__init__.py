"""Pairs that are not trained on, evaluated on a fixed grid during training."""
