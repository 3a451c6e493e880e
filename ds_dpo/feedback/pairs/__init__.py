"""Preference pairs of a model's own images: drawn, scored, formed into pairs, written in Pick-a-Pic's form."""
