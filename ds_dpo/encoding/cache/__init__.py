"""The cache of encoded pairs: its format, its making on all ranks, its reading."""
