"""Which pairs of a dataset count: column roles, candidates, filters, the index."""
