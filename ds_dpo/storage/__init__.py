"""Files that are complete or absent: manifests, atomic replacement, checkpoint contents, logs on a full disk."""
