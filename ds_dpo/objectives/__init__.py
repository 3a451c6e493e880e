"""Preference losses: pure functions from errors of pairs to one loss per pair, and statistics of earlier steps."""
