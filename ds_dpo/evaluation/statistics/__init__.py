"""Comparisons of two models' scores on the same prompts: win rates, differences, intervals, tests. Arithmetic alone."""
