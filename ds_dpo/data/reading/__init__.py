"""Rows of parquet, Arrow, JSON, CSV and tar files behind one interface, local or remote."""
