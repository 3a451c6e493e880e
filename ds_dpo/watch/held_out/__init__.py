"""Pairs that are not trained on, judged on a fixed grid as training goes on."""
