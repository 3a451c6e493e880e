"""A launch: hosts asked before anything runs, processes watched until they are gone, ranks that meet."""
