"""Rows of parquet, Arrow, JSON, CSV and tars behind one face, wherever the files lie."""
