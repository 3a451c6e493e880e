"""Where all parts meet: a run assembled, its loop, and one of its steps done again."""
