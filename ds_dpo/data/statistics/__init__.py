"""What a set of pairs holds: counted, and reported in text."""
