"""A launch: check all hosts before anything runs, watch all processes until they end, let the ranks meet."""
