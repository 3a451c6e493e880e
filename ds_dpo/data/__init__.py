"""Preference pairs as data: a pair, its images, its keyed draws."""
