"""What a set of pairs holds, counted and told."""
