"""The model card, the metadata of single files, and the upload."""
