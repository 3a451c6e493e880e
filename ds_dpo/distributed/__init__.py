"""Ranks: which one this is, collectives, and doing a thing on one rank so that all of them learn how it ended."""
