"""Votes of people on pairs of an evaluation: read, compared, and how well raters and scorers agree."""
