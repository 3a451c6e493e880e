"""The reference's errors, computed before training: how they are made and read."""
