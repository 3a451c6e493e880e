"""The model card, single-file metadata, the upload."""
