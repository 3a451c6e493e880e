"""The frozen reference: where its weights are, a check that they do not change, and its refresh."""
