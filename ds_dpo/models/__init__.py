"""The models of a run: load them, freeze them, start them from earlier weights."""
