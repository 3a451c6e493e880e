"""The frozen reference: where it lives, that it stays as it was, how it is refreshed."""
