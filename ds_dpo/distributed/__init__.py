"""Ranks: which one this is, collectives, and work on one rank whose result or error reaches all ranks."""
