"""The cache of encoded pairs: its format, how all ranks make it, how it is read and verified."""
