"""Adapters merged, written, or cut out of a full change."""
