"""Preference losses: errors of pairs in, one loss per pair out; pure functions and what they need of the steps
before.
"""
