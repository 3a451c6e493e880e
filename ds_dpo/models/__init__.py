"""Models of a run: loaded, frozen, started from earlier weights."""
